"""Speed of the environments, and of drawing them.

    python benchmarks/env.py [--env metaworld/drawer-open] [--workers 1 2] [--json FILE]
    python benchmarks/env.py --pictures docs/images     # fast and full quality side by side

Prints a table (milliseconds a frame, then environment steps a second) and writes the same as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from prelar_trl.envs import make_env
from prelar_trl.envs.camera import Camera
from prelar_trl.envs.metaworld import MetaworldTask, task_name


def frame_milliseconds(task: str, quality: str, frames: int) -> tuple[float, float]:
    """Median and least time to draw one 64x64 frame of a Meta-world task from ``corner``."""
    env = MetaworldTask(task_name(task))
    env.reset(seed=0)
    draw = Camera(env.sim.model, env.sim.data, camera="corner", quality=quality, flip=True)
    draw()
    times = []
    for _ in range(frames):
        start = time.perf_counter()
        draw()
        times.append(1000 * (time.perf_counter() - start))
    draw.close()
    return statistics.median(times), min(times)


def steps_per_second(
    name: str, pixels: int | None, quality: str, workers: int, steps: int
) -> float:
    """Random steps a second over all workers, resets included, start-up not."""
    env = make_env(name, pixels=pixels, render_quality=quality, num_workers=workers)
    env.rollout(5, break_when_any_done=False)
    start = time.perf_counter()
    env.rollout(steps, break_when_any_done=False)
    elapsed = time.perf_counter() - start
    env.close()
    return workers * steps / elapsed


def measure(name: str, workers: list[int], steps: int) -> list[dict]:
    """All rows of the table."""
    rows = []
    is_metaworld = name.startswith("metaworld/")
    if is_metaworld:
        for quality in ("fast", "full"):
            median, least = frame_milliseconds(name.split("/")[1], quality, max(steps // 5, 10))
            row = {"what": f"frame, {quality}", "workers": 1, "ms_median": median, "ms_min": least}
            rows.append(row)
    modes = [("no pictures", None, "fast", 4 * steps), ("fast", 64, "fast", steps)]
    if is_metaworld:
        modes.append(("full", 64, "full", max(steps // 10, 10)))
    for count in workers:
        for label, pixels, quality, length in modes:
            value = steps_per_second(name, pixels, quality, count, length)
            row = {"what": f"steps, {label}", "workers": count, "steps_per_second": value}
            rows.append(row)
    return rows


def draw_pictures(folder: Path, tasks: tuple[str, ...] = ("drawer-open", "dial-turn")) -> None:
    """One PNG a task, ``render_<task>.png``: fast, full, and their difference, as agents see it."""
    for task in tasks:
        frames = []
        for quality in ("fast", "full"):
            env = make_env(f"metaworld/{task}", render_quality=quality)
            frames.append(env.reset()["pixels"].permute(1, 2, 0).int())
            env.close()
        difference = (frames[0] - frames[1]).abs()
        figure, axes = plt.subplots(1, 3, figsize=(9, 3.3), layout="constrained")
        mean = difference.float().mean()
        titles = ("fast", "full", f"4 x |difference| (mean {mean:.1f} of 255)")
        shown = (*frames, (4 * difference).clamp(max=255))
        for axis, picture, title in zip(axes, shown, titles, strict=True):
            axis.imshow(picture.to(torch.uint8).numpy(), interpolation="nearest")
            axis.set_title(title, fontsize=9)
            axis.axis("off")
        figure.suptitle(f"{task}, camera corner, 64x64")
        figure.savefig(folder / f"render_{task}.png", dpi=80)
        plt.close(figure)


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--env", default="metaworld/drawer-open")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--json", type=Path, help="default: print it after the table")
    parser.add_argument("--pictures", type=Path, help="only write the pictures to this folder")
    arguments = parser.parse_args()
    if arguments.pictures:
        draw_pictures(arguments.pictures)
        return
    rows = measure(arguments.env, arguments.workers, arguments.steps)
    for row in rows:
        value = (
            f"{row['ms_median']:8.1f} ms/frame, at least {row['ms_min']:.1f}"
            if "ms_median" in row
            else f"{row['steps_per_second']:8.0f} steps/s"
        )
        print(f"{row['what']:<20} {row['workers']} worker(s) {value}")
    report = {
        "env": arguments.env,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "mujoco_gl": os.environ.get("MUJOCO_GL"),
        "rows": rows,
    }
    text = json.dumps(report, indent=2)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    else:
        sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
