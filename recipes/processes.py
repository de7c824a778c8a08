"""The processes of one run: those that torchrun started, or one on its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from prelar_trl.allocator import with_tcmalloc
from prelar_trl.distributed import process_group
from prelar_trl.recipes.entry import Stopped
from prelar_trl.utils import STOPPED

PATIENCE = timedelta(hours=6)  # of the others, while the first evaluates
SEED_STRIDE = 1_000_003  # from process to process; beyond what a run adds to its seed


class Processes:
    """The processes that train one model on joint batches, as one of them sees them.

    Without a group there is one, and nothing is exchanged. What has to be agreed on is asked for by
    all of them, in the same order.

    Args:
        group: theirs. Default: None, a process on its own.
    """

    def __init__(self, group: ProcessGroup | None = None) -> None:
        self.group = group
        self.rank, self.size = (0, 1) if group is None else (group.rank(), group.size())
        self.first = self.rank == 0  # it alone logs, evaluates and saves

    def seed(self, seed: int) -> int:
        """This process's seed; the first one's is the run's."""
        return seed + SEED_STRIDE * self.rank

    def share(self, name: str, value: int) -> int:
        """This process's part of a number that is the run's.

        Raises:
            ValueError: it cannot be divided evenly.
        """
        if value % self.size:
            raise ValueError(
                f"{name}={value} cannot be divided among {self.size} processes: take a multiple"
            )
        return value // self.size

    def any(self, flag: bool) -> bool:
        """Whether a process says True."""
        return any(self.gather(flag))

    def all(self, flag: bool) -> bool:
        """Whether all processes say True."""
        return all(self.gather(flag))

    def gather(self, value: Any) -> list[Any]:
        """What each process has, by rank: in all of them."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        if isinstance(value, bool):  # asked for in every update: without pickling
            flags = torch.zeros(self.size, dtype=torch.int32)
            flags[self.rank] = value
            dist.all_reduce(flags, group=self.group)
            return flags.tolist()
        dist.all_gather_object(values, value, group=self.group)
        return values

    def wait(self) -> None:
        """Until all have come here."""
        self.gather(True)

    def say(self, text: str) -> None:
        """Prints a line, once."""
        if self.first:
            print(text)

    def stop(self, text: str) -> None:
        """Ends the program by an interruption; says so once."""
        if self.first:
            raise Stopped(text)
        sys.exit(STOPPED)


ALONE = Processes()


@contextmanager
def joined(device: torch.device) -> Iterator[Processes]:
    """The processes that torchrun has started with this one; `ALONE` without it."""
    if device.type == "cpu":  # a program that took a GPU for possible starts anew only here
        with_tcmalloc()
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        yield ALONE
        return
    # gloo is there in any case: flags and states of the recipes are exchanged on the CPU.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    with process_group(backend, timeout=PATIENCE):
        processes = Processes(dist.group.WORLD)
        try:
            yield processes
        finally:
            del processes.group
