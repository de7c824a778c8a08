"""Hours of fine-tuning in which workers die and hang: does it grow, slow down, lose anything?

``make soak``, or ``python benchmarks/soak.py --minutes 2 --hurt-every 15`` as a rehearsal. For the
toy and for Meta-world in turn, a run of size tiny with two workers; every few minutes one of them
is killed, or stopped so that it hangs. Into ``results/soak/``: ``<env>.csv`` with memory, steps and
lost episodes over time, row by row as they come, ``<env>.log`` with what the run said, and at the
end, also after Ctrl-C or where a run fails, ``<env>_hurt.csv`` with what became of each worker that
was hurt, ``soak.png`` and ``summary.csv`` of what there is. Exits with 1 where a run fails, its
memory grows by more than 1% an hour, it slows down by more than that beyond the noise, a worker
fails that nobody has hurt, or an episode is lost that was not a hurt worker's.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np
import scipy.stats
from matplotlib.figure import Figure

from prelar_trl.record import Series, read_metrics, write_csv
from prelar_trl.utils import STOPPED

REPOSITORY = Path(__file__).resolve().parents[1]
ENVS = ("toy", "metaworld/drawer-open")
SETTINGS = {
    **{"method": "prelar", "size": "tiny", "num_workers": 2, "worker_timeout": 30},
    **{"env_steps": 10**9, "prefill": 400, "train_every": 20, "pretrain_updates": 1},
    **{"batch_size": 8, "batch_length": 16, "max_steps": 100, "capacity": 5_000},
    **{"eval_every": 5_000, "eval_episodes": 2, "log_every": 100, "checkpoint_every": 1_000},
    **{"device": "cpu", "threads": 1, "resume": "auto"},
}
WARM_UP = 10_000  # steps before slopes count: the second evaluation is the last to add memory
MOST_AN_HOUR = 0.01  # growth of the memory, loss of speed
BLOCKS = 20  # of equal steps, whose speeds tell the noise
COLUMNS = ("seconds", "cpu_seconds", "memory_mib", "workers_mib", "steps", "lost", "killed", "hung")
INTERRUPTED = "interrupted"
LEAST_SECONDS = 600  # after the warm-up, for slopes that mean something
START_SECONDS, STOP_SECONDS = 600, 120  # on a busy machine
REPLACED = re.compile(r"\(process (\d+)\) .*: it is replaced(, its episode dropped)?")


@dataclass
class Hurt:
    """A worker that was hurt, and what the run has said of it."""

    seconds: float
    how: str  # killed, hung, or what it was that nobody did
    noticed: float | None = None  # seconds; those of an evaluation are asked at the next one
    dropped: bool = False  # it was in an episode


def children(pid: int) -> list[int]:
    """The processes that a process has started; none where it has ended."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += map(int, path.read_text().split())
    return found


def workers(pid: int) -> list[int]:
    """The processes of a run's environments: what its fork server has forked."""
    return [grandchild for child in children(pid) for grandchild in children(child)]


def memory(pid: int) -> float:
    """Memory of a process without files that it has mapped, MiB; 0 where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(x.split()[1]) for x in lines if x.startswith("RssAnon")) / 1024


def cpu_seconds(pid: int) -> float:
    """What a process has computed; 0 where it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # user and system


def metrics(file: Path) -> dict[str, Series]:
    """What a run has logged so far; nothing before its first row."""
    try:
        return read_metrics(file)
    except (OSError, ValueError):
        return {}


def lost_by(run: Path) -> float:
    """Episodes that a run has lost, as far as it has said."""
    series = metrics(run / "metrics.csv").get("train/dropped")
    return 0.0 if series is None else float(series.values[-1])


def steps_of(run: Path) -> float:
    """Steps of the environment that a run has logged."""
    return max((float(x.steps[-1]) for x in metrics(run / "times.csv").values()), default=0.0)


def wait_for_start(env: str, process: subprocess.Popen, run: Path) -> None:
    """Until a run makes its first steps: its time does not count from before."""
    deadline = time.monotonic() + START_SECONDS
    while not metrics(run / "times.csv"):
        if process.poll() is not None:
            raise RuntimeError(f"the run in {env} has ended with {process.returncode}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"the run in {env} did not start within {START_SECONDS} s")
        time.sleep(1)


def read_notices(log: Path, seconds: float, hurts: dict[int, Hurt]) -> None:
    """Enter what a run has said of its workers by now into ``hurts``, by their processes."""
    for pid, dropped in REPLACED.findall(log.read_text(encoding="utf-8")):
        hurt = hurts.setdefault(int(pid), Hurt(seconds, "by itself"))
        if hurt.noticed is None:
            hurt.noticed, hurt.dropped = seconds, bool(dropped)


def soak(
    env: str, run: Path, seconds: float, hurt_every: float, log: TextIO, hurts: dict[int, Hurt]
) -> Iterator[list[float]]:
    """One run; gives a row of `COLUMNS` every few seconds, and enters into ``hurts``.

    Raises:
        RuntimeError: the run has ended by itself, or did not stop as it should.
    """
    settings = SETTINGS | {"env": env, "run": run}
    command = [sys.executable, str(REPOSITORY / "recipes" / "finetune.py")]
    command += [f"{name}={value}" for name, value in settings.items()]
    generator = np.random.default_rng(0)
    every = max(1.0, seconds / 400)
    process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        wait_for_start(env, process, run)
        begin = time.monotonic()
        hurt = begin + hurt_every
        while (now := time.monotonic()) < begin + seconds:
            if process.poll() is not None:
                raise RuntimeError(f"the run in {env} has ended with {process.returncode}")
            alive = workers(process.pid)
            well = [worker for worker in alive if worker not in hurts]
            if now > hurt and well:
                kill = len(hurts) % 2 == 0
                chosen = int(generator.choice(well))
                with contextlib.suppress(ProcessLookupError):
                    os.kill(chosen, signal.SIGKILL if kill else signal.SIGSTOP)
                    hurts[chosen] = Hurt(now - begin, "killed" if kill else "hung")
                hurt = now + hurt_every
            used = [cpu_seconds(process.pid), memory(process.pid), sum(map(memory, alive))]
            made = [steps_of(run), lost_by(run)]
            read_notices(Path(log.name), now - begin, hurts)  # said before it is counted as lost
            how = [each.how for each in hurts.values()]
            yield [now - begin, *used, *made, how.count("killed"), how.count("hung")]
            time.sleep(every)
        process.send_signal(signal.SIGTERM)
        code = process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"the run in {env} did not stop within {STOP_SECONDS} s") from None
    finally:
        if process.poll() is None:  # its workers end with it
            process.kill()
            process.wait()
    if code != STOPPED:
        raise RuntimeError(f"the run in {env} ended with {code}, not with {STOPPED} (stopped)")


def record(
    env: str, out: Path, seconds: float, hurt_every: float, hurts: dict[int, Hurt]
) -> tuple[list[list[float]], str | None]:
    """Soak and write down; the rows, and why it failed if it did."""
    rows, name = [], env.replace("/", "_")
    with (
        tempfile.TemporaryDirectory() as folder,
        open(out / f"{name}.log", "w", encoding="utf-8") as log,
        open(out / f"{name}.csv", "w", newline="", encoding="utf-8", buffering=1) as file,
    ):
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        try:
            for row in soak(env, Path(folder, "run"), seconds, hurt_every, log, hurts):
                rows.append(row)
                writer.writerow([f"{x:.6g}" for x in row])
        except RuntimeError as error:
            return rows, f"{error}, see {log.name}"
        except KeyboardInterrupt:
            return rows, INTERRUPTED
    return rows, None


def after_warm_up(rows: np.ndarray) -> np.ndarray | None:
    """The rows that count for slopes; None where too little time is left."""
    late = rows[rows[:, COLUMNS.index("steps")] > WARM_UP]
    return late if len(late) and late[-1, 0] - late[0, 0] >= LEAST_SECONDS else None


def memory_slope(rows: np.ndarray) -> float:
    """Growth of the memory an hour, as a share of its mean, by least squares."""
    seconds, values = rows[:, 0], rows[:, COLUMNS.index("memory_mib")]
    return float(np.polyfit(seconds, values, 1)[0] * 3600 / values.mean())


def speed_slope(rows: np.ndarray) -> tuple[float, float]:
    """Growth of the steps a second of CPU time, an hour, as a share of their mean.

    By least squares over the speeds of `BLOCKS` equal parts.

    Returns:
        The slope, and half the width of its 95% interval.
    """
    seconds, used, steps = (rows[:, COLUMNS.index(x)] for x in ("seconds", "cpu_seconds", "steps"))
    edges = np.linspace(used[0], used[-1], BLOCKS + 1)
    speeds = np.diff(np.interp(edges, used, steps)) / np.diff(edges)
    times = np.interp((edges[1:] + edges[:-1]) / 2, used, seconds) / 3600
    fit = scipy.stats.linregress(times, speeds / speeds.mean())
    return fit.slope, fit.stderr * scipy.stats.t.ppf(0.975, BLOCKS - 2)


def unexplained(rows: np.ndarray, hurts: dict[int, Hurt]) -> int:
    """Episodes that were lost before, or without, a hurt worker whose episode was dropped."""
    explained = sorted(x.noticed for x in hurts.values() if x.dropped and x.noticed is not None)
    lost = rows[:, COLUMNS.index("lost")]
    return int(max(0, (lost - np.searchsorted(explained, rows[:, 0], side="right")).max()))


def speed(rows: np.ndarray, clock: str) -> np.ndarray:
    """Steps a second of a clock at each row: those of the last twentieth of its time.

    By ``seconds``, other programs on the machine and the wait for a hung worker count; by
    ``cpu_seconds``, what the run's own process computes.
    """
    seconds, steps = rows[:, COLUMNS.index(clock)], rows[:, COLUMNS.index("steps")]
    earlier = np.maximum(seconds - (seconds[-1] - seconds[0]) / 20, seconds[0])
    made = steps - np.interp(earlier, seconds, steps)
    return made / np.maximum(seconds - earlier, 1e-9)


def draw(tables: dict[str, np.ndarray], path: Path) -> None:
    """Memory, speed and lost episodes over time, an environment a column."""
    figure = Figure(figsize=(5 * len(tables), 7), layout="constrained")
    axes = figure.subplots(3, len(tables), sharex="col", squeeze=False)
    for (env, rows), column in zip(tables.items(), axes.T, strict=True):
        minutes, _, own, theirs, _, lost, killed, hung = rows.T
        minutes = minutes / 60
        column[0].plot(minutes, own, label="the run's own process")
        column[0].plot(minutes, theirs, label="its workers")
        column[0].set(title=env, ylabel="memory, MiB", ylim=(0, None))
        column[1].plot(minutes, speed(rows, "cpu_seconds"), label="of the run's CPU time")
        column[1].plot(minutes, speed(rows, "seconds"), label="by the clock")
        column[1].set(ylabel="steps a second", ylim=(0, None))
        column[2].step(minutes, killed + hung, where="post", label="workers killed or hung")
        column[2].step(minutes, lost, "--", where="post", label="episodes lost")
        column[2].set(ylabel="count", xlabel="minutes", ylim=(0, None))
        for axis in column:
            axis.legend()
    figure.savefig(path, dpi=120)


def summarize(
    tables: dict[str, np.ndarray], hurts: dict[str, dict[int, Hurt]], out: Path
) -> list[str]:
    """Write and print ``summary.csv``, write what became of the hurt workers; what is wrong."""
    head = ["env", "minutes", "steps", "memory_slope_per_hour", "speed_slope_per_hour"]
    head += ["speed_slope_95", "lost", "dropped", "killed", "hung"]
    lines, faults = [], []
    for env, rows in tables.items():
        seconds, _, _, _, steps, lost, killed, hung = rows[-1]
        late, slopes = after_warm_up(rows), ["", "", ""]
        if late is not None:
            growth, (faster, noise) = memory_slope(late), speed_slope(late)
            slopes = [f"{x:.4f}" for x in (growth, faster, noise)]
            if growth > MOST_AN_HOUR:
                faults.append(f"the memory in {env} grows by {growth:.1%} an hour")
            if faster + noise < -MOST_AN_HOUR:
                faults.append(f"the run in {env} gets slower by {-faster:.1%} an hour")
        theirs = hurts[env].values()
        counts = [lost, sum(x.dropped for x in theirs), killed, hung]
        line = [env, f"{seconds / 60:.1f}", f"{steps:.0f}", *slopes]
        lines.append([*line, *(f"{x:.0f}" for x in counts)])
        if alone := sum(x.how == "by itself" for x in theirs):
            faults.append(f"in {env} {alone} workers failed that nobody had hurt")
        if more := unexplained(rows, hurts[env]):
            faults.append(f"in {env} {more} episodes are lost that were no hurt worker's")
        table = []
        for x in theirs:
            noticed = None if x.noticed is None else f"{x.noticed:.0f}"
            table.append([f"{x.seconds:.0f}", x.how, noticed, int(x.dropped)])
        columns = ["seconds", "how", "noticed", "episode_dropped"]
        write_csv(out / f"{env.replace('/', '_')}_hurt.csv", columns, table)
    write_csv(out / "summary.csv", head, lines)
    for line in (head, *lines):
        print(*line, sep="\t")
    return faults


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
    tables: dict[str, np.ndarray] = {}
    hurts: dict[str, dict[int, Hurt]] = {env: {} for env in args.envs}
    faults = []
    for env in args.envs:
        rows, fault = record(env, args.out, seconds, args.hurt_every, hurts[env])
        faults += [] if fault is None else [fault]
        if len(rows) > 1:
            tables[env] = np.array(rows)
        if fault == INTERRUPTED:
            break
    if tables:
        faults += summarize(tables, hurts, args.out)
        draw(tables, args.out / "soak.png")
    if faults:
        sys.exit(f"error: {'; '.join(faults)}")


if __name__ == "__main__":
    main()
