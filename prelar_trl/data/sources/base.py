"""What a source of clips is: an ordered list of items, and a way to read each of them."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from prelar_trl.data.sources.frames import FrameOptions

Frame = dict[str, np.ndarray]  # stream -> one frame, e.g. pixels uint8 [3, H, W]


class ClipError(ValueError):
    """A clip that cannot be used; the message is the reason, without the clip's name."""


@dataclass(frozen=True)
class Item:
    """One clip of a source, not yet read."""

    name: str  # unique within the source, any text
    path: Path  # the file or folder
    label: str | int | None = None  # class or template
    split: str | None = None  # train or heldout
    frames: int | None = None  # how many a list promises


@dataclass
class Clip:
    """A clip that is being read, one frame in memory at a time.

    ``frames`` can be read once; it raises `ClipError` when the clip turns out to be of no use.
    ``notes`` tells then what was left out of the clip, reason -> how many.
    """

    frames: Iterator[Frame]
    notes: Counter[str] = field(default_factory=Counter)

    def arrays(self) -> dict[str, np.ndarray]:
        """The whole clip in memory: stream -> ``[T, ...]``.

        Raises:
            ClipError: the clip is damaged, empty or otherwise of no use.
        """
        frames = list(self.frames)
        return {key: np.stack([frame[key] for frame in frames]) for key in frames[0]}


class Source:
    """A data set that can be put into a clip store. Picklable: processes read from it.

    A kind of source gives ``kind``, e.g. ``videos``, and ``decoder``, what decodes the frames, with
    its version; it fills ``_items`` and ``left_out``, and loads an item.

    Args:
        root: the folder.
        options: how frames are made.
        actions: also store the actions, for probes.

    Attributes:
        left_out: what lies in the folder and is no clip, reason -> names.

    Raises:
        FileNotFoundError: ``root`` is no folder.
        ValueError: actions together with a stride, which leaves steps out.
    """

    kind: str
    decoder: str

    def __init__(self, root: str | Path, options: FrameOptions, actions: bool = False) -> None:
        self.root, self.options, self.actions = Path(root), options, actions
        if not self.root.is_dir():
            raise FileNotFoundError(f"source folder {str(root)!r} does not exist")
        if actions and options.stride > 1:
            raise ValueError(f"actions=true needs stride=1, got stride={options.stride}")
        self.left_out: dict[str, list[str]] = defaultdict(list)
        self._items: list[Item] = []

    def items(self) -> list[Item]:
        """All clips, in an order that depends on the names alone."""
        return self._items

    def load(self, item: Item) -> Clip:
        """One clip: ``pixels`` uint8 ``[3, H, W]`` a frame, and what else there is."""
        raise NotImplementedError


def text(path: str | Path) -> str:
    r"""A path as text that UTF-8 can hold: undecodable bytes become ``\xff``."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def with_distinct_names(items: Sequence[Item]) -> list[Item]:
    """Items ordered by name; of two that share one, the second becomes ``<name> (2)``."""
    taken: set[str] = set()
    distinct = []
    for item in sorted(items, key=lambda item: (item.name, item.path)):
        plain, slash = item.name.rstrip("/"), "/" * item.name.endswith("/")
        name, number = plain, 1
        while name in taken:
            number += 1
            name = f"{plain} ({number})"
        taken.add(name)
        distinct.append(replace(item, name=name + slash))
    return distinct


def leading_actions(left: np.ndarray) -> np.ndarray:
    """Actions that led to each frame, float32 ``[T + 1, A]``, of those that left from one ``[T]``.

    The first is zero.

    Raises:
        ClipError: they hold NaN or infinity.
    """
    left = left.reshape(len(left), -1).astype(np.float32)
    if not np.isfinite(left).all():
        raise ClipError("action must be finite, holds NaN or infinity")
    return np.concatenate([np.zeros_like(left[:1]), left])


def choose_camera(pictures: Sequence[str], camera: str | None, root: Path) -> str:
    """The one of several pictures that ``camera`` names, wholly or by the last part of its name.

    Parts are separated by dots or slashes; without a name there must be one picture only.

    Raises:
        ValueError: there is none, or several fit.
    """
    if camera in pictures:
        return camera
    fitting = [x for x in pictures if camera in (None, re.split(r"[./]", x)[-1])]
    if len(fitting) == 1:
        return fitting[0]
    if not pictures:
        raise ValueError(f"source {str(root)!r} holds no picture")
    known = ", ".join(pictures)
    if camera is None:
        raise ValueError(f"source {str(root)!r} has several cameras: add camera=<one of {known}>")
    raise ValueError(f"source {str(root)!r} has no camera {camera!r}; it has {known}")
