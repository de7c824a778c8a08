"""How long a recipe takes from the start of its process to its first update (Linux).

The run pre-trains at size ``tiny`` on videos of the toy; its first update is done when its
``metrics.csv`` has a row. Processor time is what the machine's load does not change. With
tcmalloc the program starts itself anew, which is part of what is measured.
"""

from __future__ import annotations

import argparse
import ctypes.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
MALLOCS = {"system": {"PRELAR_MALLOC": "system"}, "tcmalloc": {}}


def recipe(name: str, log: Path, *settings: str, **environment: str) -> subprocess.Popen:
    """A recipe as its own process, of one thread; what it says goes to ``log``."""
    command = [sys.executable, str(REPOSITORY / "recipes" / f"{name}.py"), *settings]
    clean = {k: x for k, x in os.environ.items() if k not in ("LD_PRELOAD", "PRELAR_MALLOC")}
    environment = {**clean, "OMP_NUM_THREADS": "1", **environment}
    with open(log, "w") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=file)


def processor_seconds(pid: int) -> float:
    """Of user and system, of all threads and of children that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def first_update(data: Path, run: Path, malloc: str) -> tuple[float, float]:
    """Seconds until the first update is done: of the clock, of the processor."""
    start = time.perf_counter()
    settings = ["size=tiny", "batch_size=16", "clip_len=25", "threads=1", "log_every=1"]
    log, metrics = run.with_suffix(".log"), run / "metrics.csv"
    process = recipe("pretrain", log, f"data={data}", f"run={run}", *settings, **MALLOCS[malloc])
    try:
        while not metrics.exists() or len(metrics.read_text().splitlines()) < 2:
            if process.poll() is not None:
                sys.exit(f"error: the run ended: {log.read_text()}")
            time.sleep(0.02)
        return time.perf_counter() - start, processor_seconds(process.pid)
    finally:
        process.kill()
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--runs", type=int, default=5, help="of each allocator, in turns")
    args = parser.parse_args()
    mallocs = list(MALLOCS) if ctypes.util.find_library("tcmalloc_minimal") else ["system"]
    times: dict[str, list[tuple[float, float]]] = {malloc: [] for malloc in mallocs}
    with tempfile.TemporaryDirectory() as folder:
        data, log = Path(folder) / "clips", Path(folder) / "clips.log"
        episodes = ["env=toy", "episodes=20", "max_steps=25", "after_success=null"]
        if recipe("collect_videos", log, f"data={data}", *episodes).wait():
            sys.exit(f"error: no videos were collected: {log.read_text()}")
        for number in range(args.runs):
            for malloc in mallocs:
                run = Path(folder) / f"{malloc}{number}"
                times[malloc].append(first_update(data, run, malloc))
    for malloc, pairs in times.items():
        clock, processor = (statistics.median(x) for x in zip(*pairs, strict=True))
        print(f"{malloc:<9} {clock:6.2f} s, of the processor {processor:5.2f} s")


if __name__ == "__main__":
    main()
