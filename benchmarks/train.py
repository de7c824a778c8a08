"""Cost of one training update: time, memory, and the share of what the machine can do.

    python benchmarks/train.py --method prelar --phase pretrain --batch 16 --length 25
    python benchmarks/train.py --method prelar dreamerv2 --phase finetune --precision 32 bf16
    python benchmarks/train.py --batch 16 32 64 --length 25 50   # growth
    python benchmarks/train.py --plain                           # without prelar_trl.fast
    python benchmarks/train.py --baseline '<command>'            # against another program

Every configuration runs in a fresh process, on random frames. Options with several values are
combined. A baseline is any command that prints, as its last line, JSON with ``world_model_ms``,
``behavior_ms`` (0 in pre-training) and ``peak_mib``; it runs in turn with ours, A B A B, and the
ratio ours / baseline is that of the medians, its spread that of the rounds.

Memory is the process's high-water mark (CPU; libraries take about 450 MiB of it) or the most that
the allocator reserved after the warm-up (CUDA). The share is the time that the update's matrix
products and convolutions would take at the rates measured for them, divided by the time it takes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, get_args

import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch.utils.flop_counter import FlopCounterMode

from prelar_trl.allocator import keep_freed_memory, tcmalloc_environment
from prelar_trl.config import METHODS, SIZES
from prelar_trl.fast import CompileMode, accelerate, compile_update, skip_on_device
from prelar_trl.fast.linear import linear
from prelar_trl.models import make_agent, make_world_model, make_world_model_loss
from prelar_trl.stopwatch import Stopwatch
from prelar_trl.updates import BehaviorUpdate, WorldModelUpdate

ACTION_DIM = 4
PROTOCOL = ("world_model_ms", "behavior_ms", "peak_mib")
DTYPES = {"32": torch.float32, "bf16": torch.bfloat16}


def random_batch(sequences: int, steps: int, device: str) -> TensorDict:
    """A training batch ``[B, T]`` of noise; each sequence is a window of a longer episode."""
    shape = (sequences, steps)
    is_first = torch.zeros(*shape, 1, dtype=torch.bool)
    is_first[:, 0] = True
    action = torch.rand(*shape, ACTION_DIM) * 2 - 1
    batch = TensorDict(
        {
            "pixels": torch.randint(0, 256, (*shape, 3, 64, 64), dtype=torch.uint8),
            "action": action * ~is_first,
            "reward": torch.rand(*shape, 1),
            "is_first": is_first,
            "terminated": torch.zeros(*shape, 1, dtype=torch.bool),
        },
        batch_size=shape,
    )
    return batch.to(device)


def peak_mib(device: str) -> float:
    """The most memory this process, or its allocator on the GPU, took so far."""
    if device == "cuda":
        return torch.cuda.max_memory_reserved() / 2**20
    # Not getrusage, which starts from the memory of the process that started this one.
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**10


def make_updates(config: dict[str, Any]) -> tuple[WorldModelUpdate, BehaviorUpdate | None]:
    """The training steps of a configuration, with new weights."""
    method, phase, options = config["method"], config["phase"], {"size": config["size"]}
    precision = config["precision"]
    behavior_update = bonus = None
    if phase == "pretrain":
        model = make_world_model(method, phase, action_dim=ACTION_DIM, **options)
        model.to(config["device"])
    else:
        agent = make_agent(method, action_dim=ACTION_DIM, **options).to(config["device"])
        model, bonus = agent.world_model, agent.video_bonus
        behavior_update = BehaviorUpdate(agent, precision=precision)
    loss = make_world_model_loss(method, phase, model, video_bonus=bonus).to(config["device"])
    pretrained = phase == "finetune" and METHODS[method].checkpoint
    update = WorldModelUpdate(loss, frozen_updates=0 if pretrained else None, precision=precision)
    for each in (update, behavior_update):
        if each is not None and not config["plain"]:
            accelerate(each.module)
            skip_on_device(each)
            compile_update(each, config["compile"])
    return update, behavior_update


def measure(config: dict[str, Any]) -> dict[str, Any]:
    """Time one configuration in this process."""
    torch.set_num_threads(config["threads"])
    torch.manual_seed(0)
    device = config["device"]
    if device == "cpu":
        keep_freed_memory()
    update, behavior_update = make_updates(config)
    watch = Stopwatch(torch.cuda.synchronize if device == "cuda" else lambda: None)
    step = stepper(config, update, behavior_update, watch)
    for _ in range(config["warmup"]):
        step()
    watch.times.clear()
    if device == "cuda":
        torch.cuda.empty_cache()  # what cuDNN's trials took
        torch.cuda.reset_peak_memory_stats()
    for _ in range(config["updates"]):
        step()
    trained = update.loss if behavior_update is None else behavior_update.agent
    result = {
        **config,
        "world_model_ms": statistics.median(watch.times["world_model"]),
        "behavior_ms": statistics.median(watch.times.get("behavior", [0.0])),
        "updates_ms": watch.times,
        "peak_mib": peak_mib(device),
        "parameters": sum(p.numel() for p in trained.parameters()),
        **count_gflop(config),
    }
    return result


def stepper(
    config: dict[str, Any],
    update: WorldModelUpdate,
    behavior_update: BehaviorUpdate | None,
    watch: Stopwatch,
) -> Callable[[], None]:
    """One whole update on a new batch, as a function."""

    def step() -> None:
        batch = random_batch(config["batch"], config["length"], config["device"])
        with watch("world_model"):
            losses = update(batch)
        if behavior_update is not None:
            start = losses["state"].update(batch.select("terminated", "action", "is_first"))
            with watch("behavior"):
                behavior_update(start)

    return step


def count_gflop(config: dict[str, Any]) -> dict[str, float]:
    """Operations of one update, on the meta device, which has shapes but computes nothing."""
    counted = ("method", "phase", "size", "batch", "length", "plain")
    return dict(_count_gflop(json.dumps({name: config[name] for name in counted})))


@cache
def _count_gflop(text: str) -> dict[str, float]:
    config = json.loads(text) | {"device": "meta", "precision": "32", "compile": "off"}
    with FlopCounterMode(display=False) as counter:
        stepper(config, *make_updates(config), Stopwatch())()
    counts = counter.get_flop_counts()["Global"]
    conv = sum(count for op, count in counts.items() if "conv" in str(op))
    return {"conv_gflop": conv / 1e9, "matmul_gflop": (sum(counts.values()) - conv) / 1e9}


def rates(device: str, precision: str, threads: int) -> dict[str, float]:
    """What this machine reaches, in GFLOP/s: matrix product, and convolution with its gradients.

    The best of several shapes of this size of network.
    """
    torch.set_num_threads(threads)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    kind = {"device": device, "dtype": DTYPES[precision]}
    images, side = (2048, 8192) if device == "cuda" else (64, 2048)

    def best(work: Callable[[], Any], flop: float) -> float:
        times = []
        for _ in range(6):
            wait()
            start = time.perf_counter()
            work()
            wait()
            times.append(time.perf_counter() - start)
        return flop / min(times) / 1e9

    a, b = torch.randn(side, side, **kind), torch.randn(side, side, **kind)
    convs = []
    for channels, size in ((48, 32), (96, 16), (192, 8)):
        shape = (images, channels, size, size)
        x = torch.randn(shape, **kind).contiguous(memory_format=torch.channels_last)
        weight = torch.randn(channels, channels, 3, 3, **kind)
        weight = weight.contiguous(memory_format=torch.channels_last).requires_grad_()
        x.requires_grad_()

        def conv(x: torch.Tensor = x, weight: torch.Tensor = weight) -> None:
            y = F.conv2d(x, weight, padding=1)
            torch.autograd.grad(y, (x, weight), torch.ones_like(y))

        convs.append(best(conv, 3 * 2 * images * (channels * size) ** 2 * 9))
    return {"matmul_gflops": best(lambda: linear(a, b), 2 * side**3), "conv_gflops": max(convs)}


def run(command: list[str], environment: Mapping[str, str] = {}) -> dict[str, Any]:  # noqa: B006
    """The JSON of a command's last line; ``environment`` is added to this process's own.

    Raises:
        SystemExit: the command failed or printed something else.
    """
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | environment)
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)} failed with code {done.returncode}")
    try:
        result = json.loads(done.stdout.strip().splitlines()[-1])
        return result | {key: float(result[key]) for key in PROTOCOL}
    except (IndexError, KeyError, TypeError, ValueError):
        raise SystemExit(
            f"{shlex.join(command)} printed no JSON line with the numbers {', '.join(PROTOCOL)}"
        ) from None


def total_ms(row: dict[str, Any]) -> float:
    return row["world_model_ms"] + row["behavior_ms"]


def summarize(rounds: list[dict[str, Any]], peak: dict[str, float]) -> dict[str, Any]:
    """One row from the rounds of a configuration: medians, spread, rates."""
    row = dict(rounds[0])
    updates = {
        name: [ms for one in rounds for ms in one["updates_ms"][name]] for name in row["updates_ms"]
    }
    for name, values in updates.items():
        row[f"{name}_ms"] = statistics.median(values)
        row[f"{name}_ms_range"] = [min(values), max(values)]
    row["updates_ms"] = updates
    row["peak_mib"] = statistics.median(one["peak_mib"] for one in rounds)
    seconds = total_ms(row) / 1e3
    row["frames_per_s"] = row["batch"] * row["length"] / seconds
    floor = row["conv_gflop"] / peak["conv_gflops"] + row["matmul_gflop"] / peak["matmul_gflops"]
    row["floor_ms"], row["share_of_peak"] = 1e3 * floor, floor / seconds
    return row


def compare(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> dict[str, Any]:
    """Ratios ours / baseline: of the medians, and smallest and largest of the rounds."""
    measures: dict[str, Callable[[dict[str, Any]], float]] = {
        "total": total_ms,
        "world_model": lambda row: row["world_model_ms"],
        "behavior": lambda row: row["behavior_ms"],
        "peak_mib": lambda row: row["peak_mib"],
    }
    result: dict[str, Any] = {"rounds": theirs}
    for name, of in measures.items():
        a, b = [of(row) for row in ours], [of(row) for row in theirs]
        if min(b) > 0:
            ratios = [x / y for x, y in zip(a, b, strict=True)]
            median = statistics.median(a) / statistics.median(b)
            result[name] = {"ratio": median, "range": [min(ratios), max(ratios)]}
    return result


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text."""
    lines = [
        "method       phase    size  batch  prec comp   world model ms         behavior ms"
        "           frames/s  peak MiB  TFLOP  share"
    ]
    for row in rows:
        sections = []
        for name in ("world_model", "behavior"):
            low, high = row.get(f"{name}_ms_range", (0, 0))
            sections.append(f"{row[f'{name}_ms']:8.0f} ({low:.0f}-{high:.0f})" if high else "-")
        lines.append(
            f"{row['method']:<12} {row['phase']:<8} {row['size']:<5} "
            f"{row['batch']:>2}x{row['length']:<3} {row['precision']:>4} "
            f"{row['compile']:>4}   {sections[0]:<22} {sections[1]:<22} "
            f"{row['frames_per_s']:>6.0f}  {row['peak_mib']:>8.0f}  "
            f"{(row['conv_gflop'] + row['matmul_gflop']) / 1e3:5.2f}  {row['share_of_peak']:5.0%}"
        )
        for name in ("total", "world_model", "behavior", "peak_mib"):
            if name in row.get("baseline", {}):
                ratio = row["baseline"][name]
                low, high = ratio["range"]
                lines.append(
                    f"    ours / baseline, {name}: {ratio['ratio']:.3f} ({low:.3f}-{high:.3f})"
                )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Read the command line, measure, print; returns the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", nargs="+", default=["prelar"], choices=sorted(METHODS))
    parser.add_argument(
        "--phase", nargs="+", default=["pretrain"], choices=["pretrain", "finetune"]
    )
    parser.add_argument("--size", nargs="+", default=["full"], choices=list(SIZES))
    parser.add_argument("--batch", type=int, nargs="+", default=[16])
    parser.add_argument("--length", type=int, nargs="+", default=[25])
    parser.add_argument("--precision", nargs="+", default=["32"], choices=list(DTYPES))
    parser.add_argument("--compile", nargs="+", default=["off"], choices=get_args(CompileMode))
    parser.add_argument("--plain", action="store_true", help="without prelar_trl.fast")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--warmup",
        type=int,
        default=2,
        help="updates before the clock starts; recorded ones: 4 at least",
    )
    parser.add_argument("--updates", type=int, default=5, help="timed updates of a process")
    parser.add_argument("--rounds", type=int, help="processes a configuration; default 1, or 2")
    parser.add_argument("--baseline", help="command to compare with")
    parser.add_argument("--json", type=Path, help="write the report here")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.worker:
        result = measure(args.worker)
        print(json.dumps(result))
        return result
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has no CUDA device; use --device cpu")

    peaks = {precision: rates(args.device, precision, args.threads) for precision in args.precision}
    shared = {
        name: getattr(args, name) for name in ("device", "threads", "warmup", "updates", "plain")
    }
    allocator = tcmalloc_environment() if args.device == "cpu" else {}
    rows = []
    for method, phase, size, batch, length, precision, compiled in itertools.product(
        args.method, args.phase, args.size, args.batch, args.length, args.precision, args.compile
    ):
        if getattr(METHODS[method], phase) is None:
            continue
        config = {"method": method, "phase": phase, "size": size, "batch": batch, "length": length}
        config |= {"precision": precision, "compile": compiled, **shared}
        command = [sys.executable, __file__, "--worker", json.dumps(config)]
        ours, theirs = [], []
        for _ in range(args.rounds or (2 if args.baseline else 1)):
            ours.append(run(command, allocator))
            if args.baseline:
                theirs.append(run(shlex.split(args.baseline)))
        row = summarize(ours, peaks[precision])
        if theirs:
            row["baseline"] = compare(ours, theirs)
        rows.append(row)
    report = {
        "rows": rows,
        "peaks": peaks,
        "baseline": args.baseline,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "machine": platform.machine(),
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if args.device == "cuda" else None,
    }
    print(table(rows))
    for precision, peak in peaks.items():
        print(
            f"{precision}: matrix product {peak['matmul_gflops']:.0f}, "
            f"convolution {peak['conv_gflops']:.0f} GFLOP/s"
        )
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return report


if __name__ == "__main__":
    main()
