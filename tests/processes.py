"""Functions run in several gloo processes on the CPU, as torchrun would run them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_in_processes(function: Callable[..., Any], *args: Any, world_size: int = 2) -> list[Any]:
    """``function(*args)`` in each process of a group; what each gives, by rank."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_run, (world_size, Path(folder), function, args), nprocs=world_size)
        files = [Path(folder, f"{rank}.pt") for rank in range(world_size)]
        return [torch.load(file, weights_only=False) for file in files]


def _run(rank: int, world_size: int, folder: Path, function: Callable, args: tuple) -> None:
    torch.set_num_threads(1)
    init = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=world_size)
    try:
        torch.save(function(*args), folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
