"""All that a GPU has to tell about this package, in one call of less than ten minutes.

python -m benchmarks.gpu --out results/gpu                     # make gpu
python -m benchmarks.gpu --out runs/gpu --device cpu           # a rehearsal, on tiny batches

Every part runs in a process of its own and gets its share of the time, with what those before it
have left, so that one that fails or hangs leaves the others. What was not reached when the time was
up is named, never left out. Writes ``gpu.json`` after each part, and ``gpu.md``, a page of it.

    device      what it is, and the versions
    waits       does an update of a method and phase wait for the GPU (``set_sync_debug_mode``)?
    times       ms and peak memory of updates at full size, float32 (TF32) and bf16, eager and
                recorded as a CUDA graph (compile=off, auto)
    tests       those marked ``gpu``; on a CPU the others of the same files
    rendering   frames a second of MuJoCo, 64x64, by EGL
    baseline    another program's updates, against those above

A baseline is any shell command that prints lines of JSON with ``world_model_ms``, ``behavior_ms``
and ``peak_mib``. Where it also says which ``method, phase, size, batch, length, precision`` a line
is of, the ratios ours / baseline are given. An older state of this package is one:

    git worktree add ../before <commit>
    make gpu BASELINE='cd ../before && python -m benchmarks.gpu --part times'
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.exchange import BATCH, cases
from benchmarks.train import make_updates, measure, random_batch, total_ms
from prelar_trl.fast import use_tensor_cores
from prelar_trl.utils import one_line

ROOT = Path(__file__).parents[1]
PHASES = list(cases())
FIRST = [("prelar", "pretrain"), ("prelar", "finetune"), ("apv", "finetune")]
FIRST += [("dreamerv2", "finetune"), ("contextwm", "finetune")]  # each has a part of its own
CASES = FIRST + [case for case in PHASES if case not in FIRST]
FRAMES = 200  # drawn
TESTS = ["tests/test_devices.py", "tests/fast/test_cuda_graphs.py"]
SHARES = {"waits": 3, "times": 14, "tests": 4, "rendering": 1, "baseline": 5}
SAME = ("method", "phase", "size", "batch", "length", "precision")  # of two updates to compare
SCENE = """<mujoco><worldbody>
<light pos="0 0 3"/><camera name="c" pos="0 -3 1" xyaxes="1 0 0 0 0 1"/>
<geom type="plane" size="3 3 .1"/><geom type="box" size=".2 .2 .2" pos="0 0 .3"/>
</worldbody></mujoco>"""
Result = dict[str, Any]


def settings(method: str, phase: str, precision: str, device: str) -> Result:
    """A configuration of benchmarks/train.py; on a CPU the smallest."""
    batch, length = BATCH[phase] if device == "cuda" else (2, 6)
    return {
        "method": method,
        "phase": phase,
        "precision": precision,
        "device": device,
        "size": "full" if device == "cuda" else "mini",
        "batch": batch,
        "length": length,
        "threads": torch.get_num_threads(),
        "warmup": 5 if device == "cuda" else 1,  # the fourth update is recorded
        "updates": 5 if device == "cuda" else 1,
        "compile": "off",
        "plain": False,
    }


# ------------------------------------------------------------------ parts, each a process


def look_at_waits(device: str) -> Iterator[Result]:
    """Updates during which asking for a value is an error; the first two may ask."""
    for method, phase in CASES:
        config = settings(method, phase, "32", device) | {"batch": 2, "length": 6}
        update, behavior = make_updates(config)
        batch = random_batch(2, 6, device)

        def step(batch=batch, update=update, behavior=behavior) -> None:  # noqa: ANN001
            losses = update(batch)
            if behavior is not None:
                behavior(losses["state"].update(batch.select("terminated", "action", "is_first")))

        result = {"method": method, "phase": phase, "waits": False}
        for _ in range(2):
            step()
        try:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("error")
            step()
        except RuntimeError as error:
            result |= {"waits": True, "error": failure(error)}
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        yield result


def take_times(device: str) -> Iterator[Result]:
    for method, phase in CASES:
        for precision in ("32", "bf16"):
            config = settings(method, phase, precision, device)
            for mode in ("off", "auto") if device == "cuda" else ("off",):
                yield guarded(measure, config | {"compile": mode})


def render(_: str) -> Iterator[Result]:
    from prelar_trl.envs.rendering import check_rendering

    check_rendering()  # chooses the backend
    import mujoco

    model = mujoco.MjModel.from_xml_string(SCENE)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    with mujoco.Renderer(model, 64, 64) as renderer:
        start = time.perf_counter()
        for _frame in range(FRAMES):
            renderer.update_scene(data, "c")
            picture = renderer.render()
    seconds = time.perf_counter() - start
    backend = os.environ.get("MUJOCO_GL")
    yield {"backend": backend, "frames_s": FRAMES / seconds, "black": bool(picture.max() == 0)}


PARTS: dict[str, Callable[[str], Iterator[Result]]] = {
    "waits": look_at_waits,
    "times": take_times,
    "rendering": render,
}


def run_part(name: str, device: str) -> None:
    """A part in this process: a line of JSON for each result."""
    use_tensor_cores(torch.device(device))
    torch.manual_seed(0)
    for result in PARTS[name](device):
        print(json.dumps(result), flush=True)


def guarded(function: Callable[[Result], Result], config: Result) -> Result:
    """The result, or the configuration with an ``error``."""
    try:
        if config["device"] == "cuda":
            gc.collect()  # an update and its recording refer to each other
            torch.cuda.empty_cache()
        return function(config)
    except Exception as error:  # the others go on
        return config | {"error": failure(error)}


def failure(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error)[:300]}"


# ------------------------------------------------------------------ the whole


def describe(device: str) -> Result:
    about: Result = {"python": platform.python_version(), "torch": torch.__version__}
    about |= {"device": device, "cores": os.cpu_count(), "tf32": device == "cuda"}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        about |= {"name": properties.name, "memory_gib": properties.total_memory / 2**30}
        about |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return about


def collect(command: list[str], seconds: float) -> Result:
    """Run a command for so long at most.

    Returns:
        ``results``, the JSON of its lines; ``seconds``; ``error`` if it failed or was cut off.
    """
    start = time.perf_counter()
    error, here = None, Path(sys.executable).parent  # its python is this one
    path = f"{here}{os.pathsep}{os.environ.get('PATH', '')}"
    environment = os.environ | {"PRELAR_MALLOC": "system", "PATH": path}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, cwd=ROOT, env=environment
        )
        out = done.stdout
        if done.returncode:
            error = f"exit code {done.returncode}: {' '.join(done.stderr.split())[-300:]}"
    except subprocess.TimeoutExpired as expired:
        out, error = (expired.stdout or b"").decode(), f"cut off after {seconds:.0f} s"
    results = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    last = [] if results else out.strip().splitlines()[-1:]  # of pytest, how many passed
    told = {"results": results, "last_line": last, "seconds": time.perf_counter() - start}
    return told | ({"error": error} if error else {})


def add_ratios(baseline: list[Result], ours: list[Result]) -> None:
    """Give a baseline's updates ``ratio`` and ``memory_ratio`` where ours were measured too."""

    def which(row: Result) -> str:
        return str([row.get(name) for name in SAME])

    # Of an eager and a recorded one the later, which is recorded.
    measured = {which(row): row for row in ours if "world_model_ms" in row}
    for row in baseline:
        our = measured.get(which(row))
        if our is not None and "world_model_ms" in row:
            row["ratio"] = total_ms(our) / total_ms(row)
            row["memory_ratio"] = our["peak_mib"] / row["peak_mib"]


def page(report: Result) -> str:
    """The report as a page of Markdown."""
    about = report["device"]
    lines = ["# A GPU", "", ", ".join(f"{key} {value}" for key, value in about.items()), ""]
    for name, part in report.items():
        if name == "device":
            continue
        lines += [f"## {name}", ""]
        if "error" in part:
            lines += [f"**{part['error']}**", ""]
        if "not_reached" in part:
            lines += ["**not reached: the time was up**", ""]
        rows = part.get("results", [])
        hidden = ("updates_ms", "device", "plain", "threads", "warmup", "updates")
        columns = dict.fromkeys(key for row in rows for key in row if key not in hidden)
        if columns:
            lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
            for row in rows:
                cells = [row.get(key, "") for key in columns]
                shown = [f"{x:.4g}" if isinstance(x, float) else str(x) for x in cells]
                lines.append(f"| {' | '.join(shown)} |")
            lines.append("")
        elif part.get("last_line"):
            lines += [*part["last_line"], ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("results/gpu"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seconds", type=float, default=520, help="for everything")
    parser.add_argument("--baseline", help="a shell command, see above")
    parser.add_argument("--part", choices=list(PARTS), help="only it, here, as lines of JSON")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU here; --device cpu rehearses")
    if options.part:
        run_part(options.part, options.device)
        return
    end = time.perf_counter() + options.seconds
    me = [sys.executable, "-m", "benchmarks.gpu", "--device", options.device, "--part"]
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    marked = "gpu" if options.device == "cuda" else "not gpu"
    others = {"tests": [*pytest, *TESTS, "-m", marked]}
    others["baseline"] = ["bash", "-c", options.baseline or ""]
    commands = {name: others.get(name, [*me, name]) for name in SHARES}
    if not options.baseline:
        del commands["baseline"]
    options.out.mkdir(parents=True, exist_ok=True)
    report: Result = {"device": describe(options.device)}
    waiting = list(commands)
    for name, command in commands.items():
        left = end - time.perf_counter()
        seconds = left * SHARES[name] / sum(SHARES[each] for each in waiting)
        waiting.remove(name)
        print(f"{name}: up to {seconds:.0f} s of {left:.0f}", flush=True)
        if left < 5:
            report[name] = {"not_reached": True}
        else:
            report[name] = collect(command, seconds)
        if name == "baseline":
            add_ratios(report[name].get("results", []), report["times"].get("results", []))
        (options.out / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
        (options.out / "gpu.md").write_text(page(report))
    print(options.out / "gpu.md")


if __name__ == "__main__":
    main()
