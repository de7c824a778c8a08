"""Environment steps a second of a whole fine-tuning run, and where its time goes.

    python benchmarks/end_to_end.py --env toy --size tiny
    python benchmarks/end_to_end.py --env metaworld/drawer-open --batch 50 --length 50 --workers 4
    python benchmarks/end_to_end.py --device cuda --wait     # a true split on a GPU

It is the recipe itself, in a temporary folder. Start-up and prefill (random steps, and the first
updates, which are slow) stand apart; then come ``--steps`` steps with everything, and at their end
one checkpoint and one evaluation, which in a real run come every 10 000 steps.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch

from prelar_trl.allocator import with_tcmalloc
from prelar_trl.config import METHODS, SIZES
from prelar_trl.recipes.finetune import finetune
from prelar_trl.recipes.schema import FinetuneConfig
from prelar_trl.stopwatch import Stopwatch

STRETCHES = ("env", "policy", "replay", "world_model", "behavior", "evaluation", "logging", "rest")


def settings(args: argparse.Namespace, run: Path) -> FinetuneConfig:
    """Prefill is an episode of each worker; all that comes once comes at the end."""
    prefill = args.episode * args.workers
    return FinetuneConfig(
        method=args.method,
        size=args.size,
        run=str(run),
        device=args.device,
        precision=args.precision,
        threads=args.threads,
        env=args.env,
        render_quality=args.quality,
        max_steps=args.episode,
        num_workers=args.workers,
        prefill=prefill,
        env_steps=prefill + args.steps,
        pretrain_updates=args.warmup,
        train_every=args.train_every,
        batch_size=args.batch,
        batch_length=args.length,
        eval_episodes=args.eval_episodes,
        eval_every=prefill + args.steps,
        checkpoint_every=prefill + args.steps,
        log_every=prefill,
    )


def split(rows: list[dict[str, str]]) -> dict[str, float]:
    """Seconds of each section over several rows of ``times.csv``."""
    return {
        name: sum(float(row["seconds"]) * float(row.get(f"time/{name}") or 0) for row in rows)
        for name in STRETCHES
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run, and sum up what the run noted."""
    watch = Stopwatch(torch.cuda.synchronize) if args.wait else Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        cfg = settings(args, Path(folder) / "run")
        finetune(cfg, watch=watch)
        with open(Path(cfg.run) / "times.csv", newline="") as file:
            start, prefill, *training = csv.DictReader(file)
    seconds = split(training)
    total = sum(seconds.values())
    return {
        "startup_s": float(start["startup_s"]),
        "prefill": {"steps": cfg.prefill, "seconds": split([prefill])},
        "steps": args.steps,
        "updates": args.steps // args.train_every,
        "seconds": seconds,
        "share": {name: value / total for name, value in seconds.items()},
        "steps_per_s": args.steps / total,
        "steps_per_s_without_evaluation": args.steps / (total - seconds["evaluation"]),
    }


def table(result: dict[str, Any]) -> str:
    """The split as text."""
    lines = [f"{'':<12} {'seconds':>8} {'share':>6} {'ms a step':>10}"]
    for name, seconds in result["seconds"].items():
        each, share = 1e3 * seconds / result["steps"], result["share"][name]
        lines.append(f"{name:<12} {seconds:8.2f} {share:6.1%} {each:10.2f}")
    prefill = result["prefill"]
    lines.append(
        f"{result['steps_per_s']:.1f} steps/s, without evaluation "
        f"{result['steps_per_s_without_evaluation']:.1f}: {result['steps']} steps, "
        f"{result['updates']} updates; before them start-up {result['startup_s']:.1f} s, "
        f"prefill of {prefill['steps']} steps {sum(prefill['seconds'].values()):.1f} s"
    )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Read the command line, measure, print; returns the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--env", default="metaworld/drawer-open")
    parser.add_argument("--quality", default="fast", choices=["fast", "full"])
    parser.add_argument("--method", default="prelar", choices=sorted(METHODS))
    parser.add_argument("--size", default="full", choices=list(SIZES))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=25)
    parser.add_argument("--steps", type=int, default=200, help="environment steps measured")
    parser.add_argument("--episode", type=int, default=100, help="steps of an episode")
    parser.add_argument("--train-every", type=int, default=5, help="environment steps an update")
    parser.add_argument("--warmup", type=int, default=1, help="updates before, in the prefill")
    parser.add_argument("--eval-episodes", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1, help="environments at once")
    parser.add_argument("--precision", default="32", choices=["32", "bf16"])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--wait", action="store_true", help="for the GPU after each section")
    parser.add_argument("--json", type=Path, help="write the report here")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has no CUDA device; use --device cpu")
    if args.wait and args.device == "cpu":
        parser.error("--wait is for --device cuda: nothing runs on beside the program on a CPU")
    if args.steps % args.workers:
        parser.error(f"--steps {args.steps} is no multiple of --workers {args.workers}")
    if args.device == "cpu":
        with_tcmalloc()  # as the recipe
    result = measure(args)
    report = {
        **{name: value for name, value in vars(args).items() if name != "json"},
        **result,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "machine": platform.machine(),
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if args.device == "cuda" else None,
    }
    print(table(result))
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return report


if __name__ == "__main__":
    main()
