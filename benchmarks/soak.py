"""Hours of fine-tuning in which workers die and hang: does it grow, slow down, lose anything?

``make soak``, or ``python benchmarks/soak.py --minutes 2`` as a rehearsal. For the toy and for
Meta-world in turn, a run of size tiny with two workers; every few minutes one of them is killed, or
stopped so that it hangs. Into ``results/soak/``: ``<env>.csv`` with memory, steps and lost episodes
over time, ``soak.png``, and ``summary.csv``. Fails when the memory grows by more than 1% an hour,
or more episodes are lost than workers were hurt.
"""

from __future__ import annotations

import argparse
import csv
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from prelar_trl.record import read_metrics

REPOSITORY = Path(__file__).resolve().parents[1]
ENVS = ("toy", "metaworld/drawer-open")
SETTINGS = {
    **{"method": "prelar", "size": "tiny", "num_workers": 2, "worker_timeout": 20},
    **{"env_steps": 10**9, "prefill": 400, "train_every": 20, "pretrain_updates": 1},
    **{"batch_size": 8, "batch_length": 16, "max_steps": 100, "capacity": 5_000},
    **{"eval_every": 5_000, "eval_episodes": 2, "log_every": 100, "checkpoint_every": 1_000},
    **{"device": "cpu", "threads": 1, "resume": "auto"},
}
WARM_UP = 0.25  # share of the time before the memory's slope counts
MOST_AN_HOUR = 0.01  # growth of the memory
COLUMNS = ("seconds", "memory_mib", "steps", "lost", "killed", "hung")


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    text = "".join(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children"))
    return [int(child) for child in text.split()]


def workers(pid: int) -> list[int]:
    """The processes of a run's environments: what its fork server has forked."""
    return [grandchild for child in children(pid) for grandchild in children(child)]


def memory(pid: int) -> float:
    """Memory of a run's own process without files that it has mapped, MiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(int(x.split()[1]) for x in lines if x.startswith("RssAnon")) / 1024


def latest(run: Path, file: str, name: str) -> float:
    """The last value of a metric; 0 where there is none yet."""
    path = run / file
    series = read_metrics(path).get(name) if path.is_file() and path.stat().st_size else None
    return float(series.values[-1]) if series is not None and len(series.values) else 0.0


def steps_of(run: Path) -> float:
    """Steps of the environment that a run has logged."""
    path = run / "times.csv"
    if not path.is_file() or not path.stat().st_size:
        return 0.0
    return max((float(x.steps[-1]) for x in read_metrics(path).values() if len(x.steps)), default=0)


def soak(env: str, run: Path, seconds: float, every: float, hurt_every: float) -> list[list[float]]:
    """One run; a row of `COLUMNS` each ``every`` seconds."""
    settings = SETTINGS | {"env": env, "run": run}
    command = [sys.executable, str(REPOSITORY / "recipes" / "finetune.py")]
    command += [f"{name}={value}" for name, value in settings.items()]
    generator = np.random.default_rng(0)
    rows, killed, hung = [], 0, 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    begin = time.monotonic()
    hurt = begin + hurt_every
    try:
        while (now := time.monotonic()) < begin + seconds:
            if process.poll() is not None:
                raise SystemExit(f"error: the run in {env} has ended with {process.returncode}")
            alive = workers(process.pid)
            if now > hurt and alive and steps_of(run) > SETTINGS["prefill"]:
                kill = killed <= hung
                killed, hung = killed + kill, hung + (not kill)
                os.kill(int(generator.choice(alive)), signal.SIGKILL if kill else signal.SIGSTOP)
                hurt = now + hurt_every
            lost = latest(run, "metrics.csv", "train/dropped")
            rows.append([now - begin, memory(process.pid), steps_of(run), lost, killed, hung])
            time.sleep(every)
        process.send_signal(signal.SIGTERM)
        code = process.wait()
    finally:
        process.kill()
    if code != 75:
        raise SystemExit(f"error: the run in {env} ended with {code}, not with 75 (stopped)")
    return rows


def slope(rows: np.ndarray) -> float:
    """Growth of the memory an hour, as a share of its mean, by least squares."""
    late = rows[rows[:, 0] >= WARM_UP * rows[-1, 0]]
    growth = np.polyfit(late[:, 0], late[:, 1], 1)[0]
    return float(growth * 3600 / late[:, 1].mean())


def draw(tables: dict[str, np.ndarray], path: Path) -> None:
    """Memory, speed and lost episodes over time, an environment a column."""
    figure = Figure(figsize=(5 * len(tables), 7), layout="constrained")
    axes = figure.subplots(3, len(tables), sharex="col", squeeze=False)
    for (env, rows), column in zip(tables.items(), axes.T, strict=True):
        minutes = rows[:, 0] / 60
        column[0].plot(minutes, rows[:, 1])
        column[0].set(title=env, ylabel="memory, MiB", ylim=(0, None))
        rate = np.gradient(rows[:, 2], rows[:, 0]) if len(rows) > 1 else rows[:, 2]
        width = max(1, len(rate) // 20)
        column[1].plot(minutes, np.convolve(rate, np.ones(width) / width, "same"))
        column[1].set(ylabel="steps a second", ylim=(0, None))
        column[2].step(minutes, rows[:, 4] + rows[:, 5], label="workers killed or hung")
        column[2].step(minutes, rows[:, 3], "--", label="episodes lost")
        column[2].set(ylabel="count", xlabel="minutes")
        column[2].legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=120.0, help="of all environments together")
    parser.add_argument("--hurt-every", type=float, default=180.0, help="seconds")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "results" / "soak")
    parser.add_argument("--envs", nargs="+", default=ENVS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    seconds = 60 * args.minutes / len(args.envs)
    tables, summary = {}, []
    for env in args.envs:
        with tempfile.TemporaryDirectory() as folder:
            rows = soak(env, Path(folder, "run"), seconds, seconds / 400, args.hurt_every)
        table = tables[env] = np.array(rows)
        with open(args.out / f"{env.replace('/', '_')}.csv", "w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *([f"{x:.6g}" for x in row] for row in rows)])
        _, _, steps, lost, killed, hung = rows[-1]
        summary.append([env, f"{seconds / 60:.1f}", int(steps), f"{slope(table):.4f}", int(lost)])
        summary[-1] += [int(killed), int(hung)]
    head = ["env", "minutes", "steps", "memory_slope_per_hour", "lost", "killed", "hung"]
    with open(args.out / "summary.csv", "w", newline="") as file:
        csv.writer(file).writerows([head, *summary])
    draw(tables, args.out / "soak.png")
    for line in (head, *summary):
        print(*line, sep="\t")
    faults = [x[0] for x in summary if float(x[3]) > MOST_AN_HOUR or x[4] > x[5] + x[6]]
    if faults:
        sys.exit(f"error: memory grows, or episodes are lost, in {', '.join(faults)}")


if __name__ == "__main__":
    main()
