"""What a source of clips is: an ordered list of items, and a way to load each of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np


class ClipError(ValueError):
    """A clip that cannot be used; the message is the reason, without the clip's name."""


@dataclass(frozen=True)
class Item:
    """One clip of a source, not yet loaded.

    Args:
        name: unique within the source, any text.
        path: the file or folder.
        label: class, template or None.
        split: ``train``, ``heldout`` or None.
        frames: how many frames a list promises, or None.
    """

    name: str
    path: Path
    label: str | int | None = None
    split: str | None = None
    frames: int | None = None


class Source(Protocol):
    """A data set that can be put into a clip store. Picklable: processes load from it.

    Attributes:
        kind: e.g. ``videos``.
        decoder: what decodes the frames, with its version.
    """

    kind: str
    decoder: str

    def items(self) -> Sequence[Item]:
        """All clips, in an order that depends on the names alone."""
        ...

    def load(self, item: Item) -> dict[str, np.ndarray]:
        """The streams of one clip: ``pixels`` uint8 ``[T, 3, H, W]`` and what else there is.

        Raises:
            ClipError: the clip is damaged, empty or otherwise of no use.
        """
        ...


def text(path: str | Path) -> str:
    """A path as text that UTF-8 can hold: undecodable bytes become ``\\xff``."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
