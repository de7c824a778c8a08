"""What a source of clips is: an ordered list of items, and a way to read each of them."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal

import numpy as np

from prelar_trl.bounds import Positive, PositiveInt, at_least, check_settings
from prelar_trl.data.sources.flow import FlowPictures

Frame = dict[str, np.ndarray]  # stream -> one frame, e.g. pixels uint8 [3, H, W]
Sizes = tuple[np.ndarray, np.ndarray | None]  # [size, size, 3] and gray [FLOW_SIZE, FLOW_SIZE]


class ClipError(ValueError):
    """A clip that cannot be used; the message is the reason, without the clip's name."""


@dataclass(frozen=True)
class FrameOptions:
    """How frames are made.

    Args:
        size: height and width of a stored frame.
        resize: ``squeeze`` ignores the aspect ratio (official); ``crop`` takes the middle square.
        stride: every how many frames one is kept.
        max_frames: kept frames after which a clip is cut off; None keeps all.
        flow: also store optical flow as a picture, in the stream ``flow``.
        white: value that becomes white in pictures of more than 8 bits; None: 65535 for integers,
            1 for floating-point numbers.
    """

    size: Annotated[int, at_least(8)] = 64
    resize: Literal["squeeze", "crop"] = "squeeze"
    stride: PositiveInt = 1
    max_frames: PositiveInt | None = None
    flow: bool = False
    white: Positive | None = None

    def __post_init__(self) -> None:
        check_settings(type(self), vars(self))


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
        """The whole clip in memory: stream -> ``[T, ...]``."""
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
        """All clips, in an order that depends on the names alone, or on the source's lists."""
        return self._items

    def load(self, item: Item) -> Clip:
        """One clip: ``pixels`` uint8 ``[3, H, W]`` a frame, and what else there is."""
        raise NotImplementedError

    def choose_camera(self, pictures: Sequence[str], camera: str | None) -> str:
        """The picture that ``camera`` names, wholly or by the last part of its name.

        Parts are separated by dots or slashes; without a name there must be one picture only. The
        others are left out. ValueError if there is none, or several fit.
        """
        fitting = [x for x in pictures if x == camera]
        fitting = fitting or [x for x in pictures if camera in (None, re.split(r"[./]", x)[-1])]
        if len(fitting) == 1:
            if others := [name for name in pictures if name not in fitting]:
                self.left_out["cameras that were not chosen"] = others
            return fitting[0]
        where, known = f"source {str(self.root)!r}", ", ".join(pictures)
        if not pictures:
            raise ValueError(f"{where} holds no picture")
        if camera is None:
            raise ValueError(f"{where} has several cameras: add camera=<one of {known}>")
        raise ValueError(f"{where} has no camera {camera!r}; it has {known}")


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

    The first is zero. ClipError for NaN or infinity.
    """
    left = left.reshape(len(left), -1).astype(np.float32)
    if not np.isfinite(left).all():
        raise ClipError("action must be finite, holds NaN or infinity")
    return np.concatenate([np.zeros_like(left[:1]), left])


def sized_clip(frames: Iterator[Sizes], options: FrameOptions, notes: Counter[str]) -> Clip:
    """A clip of frames that have their size already; ``notes`` as in `Clip`."""
    return Clip(_frames(frames, options, notes), notes)


def _frames(frames: Iterator[Sizes], options: FrameOptions, notes: Counter[str]) -> Iterator[Frame]:
    flow = FlowPictures(options.size) if options.flow else None
    empty = True
    for color, gray in islice(frames, options.max_frames):
        empty = False
        frame = {"pixels": _channels_first(color)}
        if flow is not None and gray is not None:
            frame["flow"] = _channels_first(flow(gray))
        yield frame
    if empty:
        raise ClipError("damaged: no frame can be decoded" if notes else "no frame in it")


def _channels_first(frame: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(frame.transpose(2, 0, 1))  # [3, H, W]
