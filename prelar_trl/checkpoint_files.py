"""Where a checkpoint and those before it lie: ``last.pt``, ``last_1.pt``, ``last_2.pt``, ...

Without torch, for programs that only look whether there is one.
"""

from __future__ import annotations

import os
from pathlib import Path

LAST = "last.pt"  # the newest, from which a run goes on
BEST = "best.pt"  # of what was evaluated while fine-tuning


def before(path: Path, number: int) -> Path:
    """The place of the checkpoint that is ``number`` older than the one at ``path``."""
    return path.with_stem(f"{path.stem}_{number}")


def all_before(path: Path) -> dict[int, Path]:
    """Those that lie before ``path``, by their number: the newest first.

    One may be missing among them, where a process was killed that moved them on. What lies beyond
    a wider gap, such as a ``last_5000.pt``, is a copy that somebody has made.
    """
    found: dict[int, Path] = {}
    number = 1
    while number <= max(found, default=0) + 2:
        if before(path, number).is_file():
            found[number] = before(path, number)
        number += 1
    return found


def has_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether there is one to go on from: at ``path``, or one before it."""
    path = Path(path)
    return path.is_file() or bool(all_before(path))
