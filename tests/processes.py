"""Functions run in several gloo processes on the CPU, as torchrun would run them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from prelar_trl.distributed import process_group


def run_in_processes(function: Callable[..., Any], *args: Any, world_size: int = 2) -> list[Any]:
    """``function(*args)`` in each process of a group; what each gives, by rank."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_run, (world_size, Path(folder), function, args), nprocs=world_size)
        files = [Path(folder, f"{rank}.pt") for rank in range(world_size)]
        return [torch.load(file, weights_only=False) for file in files]


def _run(rank: int, world_size: int, folder: Path, function: Callable, args: tuple) -> None:
    torch.set_num_threads(1)
    init = f"file://{folder / 'store'}"
    with process_group("gloo", init_method=init, rank=rank, world_size=world_size):
        torch.save(function(*args), folder / f"{rank}.pt")
    assert not gloo_threads()


def gloo_threads() -> list[str]:
    """Names of the threads of this process that belong to a process group; none but on Linux."""
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if "gloo" in name]
