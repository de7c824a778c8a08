"""From a video file or pictures to frames of one size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Literal

import numpy as np

from prelar_trl.bounds import Positive, PositiveInt, at_least, check_settings
from prelar_trl.data.sources.base import Clip, ClipError, Frame
from prelar_trl.data.sources.flow import FlowPictures


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


Sizes = tuple[np.ndarray, np.ndarray | None]  # [size, size, 3] and gray [FLOW_SIZE, FLOW_SIZE]


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
