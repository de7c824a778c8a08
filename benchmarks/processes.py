"""Throughput of updates in one process and in several, which share a batch by gloo.

python -m benchmarks.processes                           # about two minutes on two cores
python -m benchmarks.processes --method apv --size small --phase finetune

Alternating rounds on the same cores: one process with all threads, one with a single thread, and as
many processes as cores with a thread each, on the same joint batch and on a multiple of it. What is
exchanged says benchmarks/exchange.py.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.train import make_updates, random_batch
from prelar_trl.allocator import keep_freed_memory
from prelar_trl.config import METHODS
from prelar_trl.distributed import distribute, process_group

PATIENCE = timedelta(minutes=5)
MOST = 200  # timed updates


class Case(NamedTuple):
    """Processes, threads of each, and rows of the joint batch."""

    processes: int
    threads: int
    batch: int


def make_step(config: dict[str, Any], rows: int) -> Callable[[], None]:
    """One update of everything with this process's share of a batch."""
    group = dist.group.WORLD if dist.is_initialized() else None
    updates = make_updates(config)
    model_update, behavior_update = (each and distribute(each, group) for each in updates)
    batch = random_batch(rows, config["length"], "cpu")

    def step() -> None:
        losses = model_update(batch)
        if behavior_update is not None:
            behavior_update(
                losses["state"].update(batch.select("terminated", "action", "is_first"))
            )

    return step


def slowest(seconds: float) -> float:
    """The most that a process has measured."""
    if not dist.is_initialized():
        return seconds
    value = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return float(value)


def seconds_an_update(step: Callable[[], None], seconds: float) -> float:
    """Measured for about that long, after two updates of warm-up; equal in all processes."""
    step()
    start = time.perf_counter()
    step()
    once = slowest(time.perf_counter() - start)
    count = max(2, min(MOST, round(seconds / once)))
    start = time.perf_counter()
    for _ in range(count):
        step()
    return slowest(time.perf_counter() - start) / count


def work(rank: int, case: Case, configs: list[dict[str, Any]], seconds: float, folder: str) -> None:
    """One process of a case; the first one writes the results."""
    torch.set_num_threads(case.threads)
    torch.manual_seed(0)
    keep_freed_memory()
    init = {"init_method": f"file://{folder}/store", "rank": rank, "world_size": case.processes}
    rows = case.batch // case.processes
    with process_group("gloo", timeout=PATIENCE, **init) if case.processes > 1 else nullcontext():
        results = [seconds_an_update(make_step(config, rows), seconds) for config in configs]
    if rank == 0:
        Path(folder, "results.json").write_text(json.dumps(results))


def measure(case: Case, configs: list[dict[str, Any]], seconds: float) -> list[float]:
    """Seconds an update of each configuration, in processes of their own."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (case, configs, seconds, folder), nprocs=case.processes)
        return json.loads(Path(folder, "results.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    phases = ("pretrain", "finetune")
    parser.add_argument("--method", choices=list(METHODS), default="prelar")
    parser.add_argument("--phase", nargs="+", choices=phases, default=phases)
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--batch", type=int, default=8, help="rows of the joint batch")
    parser.add_argument("--length", type=int, default=25)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    options = parser.parse_args()
    many, batch = options.processes, options.batch
    if many < 2 or batch % many:
        parser.error(f"--batch {batch} must be a multiple of --processes {many}, at least 2")
    chosen = [phase for phase in options.phase if getattr(METHODS[options.method], phase)]
    shared = {"method": options.method, "size": options.size, "length": options.length}
    shared |= {"device": "cpu", "precision": "32", "compile": "off", "plain": False}
    configs = [shared | {"phase": phase} for phase in chosen]
    cases = [Case(1, many, batch), Case(1, 1, batch), Case(many, 1, batch)]
    cases.append(Case(many, 1, many * batch))
    times: dict[Case, list[list[float]]] = {case: [] for case in cases}
    for _ in range(options.rounds):
        for case in cases:
            times[case].append(measure(case, configs, options.seconds))
    print(table(options, chosen, times))


def table(
    options: argparse.Namespace, phases: list[str], times: dict[Case, list[list[float]]]
) -> str:
    """Medians and ranges of the rounds, by phase and case."""
    lines = [
        f"{options.method}, size={options.size}, {options.rounds} rounds in turn, median (range)",
        "phase     processes  threads  batch    ms an update           frames/s  against the first",
    ]
    for i, phase in enumerate(phases):
        first = 0.0
        for case, rounds in times.items():
            ms = [1e3 * one[i] for one in rounds]
            frames = case.batch * options.length / statistics.median(ms) * 1e3
            first = first or frames
            spread = f"{statistics.median(ms):8.0f} ({min(ms):.0f}-{max(ms):.0f})"
            lines.append(
                f"{phase:<10}{case.processes:>9}{case.threads:>9}  {case.batch:>3}x"
                f"{options.length:<4} {spread:<22}{frames:>8.0f}  {frames / first:>17.2f}"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
