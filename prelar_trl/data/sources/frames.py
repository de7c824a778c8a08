"""From a video file or pictures to frames of one size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
import PIL
from av.video.reformatter import Interpolation
from PIL import Image, ImageOps

from prelar_trl.data.sources.base import ClipError
from prelar_trl.data.sources.flow import FLOW_SIZE, flow_pictures

DECODER = (
    f"PyAV {av.__version__} (libavcodec {'.'.join(map(str, av.library_versions['libavcodec']))})"
)
PICTURE_DECODER = f"Pillow {PIL.__version__}"
PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


@dataclass(frozen=True)
class FrameOptions:
    """How frames are made.

    Args:
        size: height and width of a stored frame.
        resize: ``squeeze`` ignores the aspect ratio (official); ``crop`` takes the middle square.
        stride: every how many frames one is kept.
        max_frames: kept frames after which a clip is cut off; None keeps all.
        flow: also store optical flow as a picture, in the stream ``flow``.
    """

    size: int = 64
    resize: Literal["squeeze", "crop"] = "squeeze"
    stride: int = 1
    max_frames: int | None = None
    flow: bool = False

    def __post_init__(self) -> None:
        if self.size < 8:
            raise ValueError(f"frame size={self.size} must be at least 8 pixels")
        if self.resize not in ("squeeze", "crop"):
            raise ValueError(f"resize={self.resize!r} is unknown: choose squeeze or crop")
        if self.stride < 1:
            raise ValueError(f"stride={self.stride} must be at least 1")
        if self.max_frames is not None and self.max_frames < 1:
            raise ValueError(f"max_frames={self.max_frames} must be null or at least 1")

    @property
    def info(self) -> dict[str, Any]:
        """As JSON, for the store's metadata."""
        return asdict(self)


def video_clip(path: Path, options: FrameOptions) -> dict[str, np.ndarray]:
    """Decodes a video file.

    Returns:
        ``pixels`` uint8 ``[T, 3, size, size]``, and ``flow`` alike if asked for.

    Raises:
        ClipError: not a video, no picture in it, or damaged.
    """
    if not path.stat().st_size:
        raise ClipError("the file is empty")
    try:
        # absolute: "12:30.mp4" is no protocol; a playlist in disguise must not reach the network
        container = av.open(str(path.absolute()), options={"protocol_whitelist": "file"})
    except (av.FFmpegError, UnicodeError):
        raise ClipError("not readable as a video") from None
    with container:
        if not container.streams.video:
            raise ClipError("no picture in it (audio only?)")
        return _clip(_decoded(container, options), options)


def picture_clip(paths: Sequence[Path], options: FrameOptions) -> dict[str, np.ndarray]:
    """Reads a sequence of pictures, one a frame. Otherwise as `video_clip`."""
    return _clip(_pictures(paths[:: options.stride], options), options)


def array_clip(frames: np.ndarray, options: FrameOptions) -> dict[str, np.ndarray]:
    """Frames uint8 ``[T, H, W, 3]`` that are in memory. Otherwise as `video_clip`."""
    frames = frames[:: options.stride]
    pictures = (_resized(Image.fromarray(f), options) for f in frames)
    return _clip(pictures, options)


Sizes = tuple[np.ndarray, np.ndarray | None]  # [size, size, 3] and grey [FLOW_SIZE, FLOW_SIZE]


def _clip(frames: Iterator[Sizes], options: FrameOptions) -> dict[str, np.ndarray]:
    pixels: list[np.ndarray] = []
    grey: list[np.ndarray] = []
    for colour, shade in frames:
        pixels.append(colour)
        if shade is not None:
            grey.append(shade)
        if len(pixels) == options.max_frames:
            break
    if not pixels:
        raise ClipError("no frame in it")
    clip = {"pixels": _channels_first(pixels)}
    if options.flow:
        clip["flow"] = _channels_first(flow_pictures(grey, options.size))
    return clip


def _channels_first(frames: Sequence[np.ndarray]) -> np.ndarray:
    return np.ascontiguousarray(np.stack(frames).transpose(0, 3, 1, 2))  # [T, 3, H, W]


def _decoded(container: av.container.InputContainer, options: FrameOptions) -> Iterator[Sizes]:
    stream = container.streams.video[0]
    stream.thread_type = "NONE"  # one process a core is faster than threads within a clip
    count = 0
    try:
        for frame in container.decode(stream):
            if frame.is_corrupt:
                raise ClipError("damaged: a frame is corrupt")
            if count % options.stride == 0:
                yield _scaled(frame, options)
            count += 1
    except (av.FFmpegError, UnicodeError):
        raise ClipError("damaged: it cannot be decoded to its end") from None


def _scaled(frame: av.VideoFrame, options: FrameOptions) -> Sizes:
    turns = round(frame.rotation / 90) % 4  # e.g. a phone held upright
    colour = _scale(frame, options.size, "rgb24", options.resize)
    grey = _scale(frame, FLOW_SIZE, "gray", options.resize) if options.flow else None
    return np.rot90(colour, turns), None if grey is None else np.rot90(grey, turns)


def _scale(frame: av.VideoFrame, size: int, pixel_format: str, resize: str) -> np.ndarray:
    width, height = size, size
    if resize == "crop":
        short = min(frame.width, frame.height)
        width, height = (max(size, round(x * size / short)) for x in (frame.width, frame.height))
    scaled = frame.reformat(width, height, pixel_format, interpolation=Interpolation.AREA)
    array = scaled.to_ndarray()
    top, left = (height - size) // 2, (width - size) // 2
    return array[top : top + size, left : left + size]


def _pictures(paths: Sequence[Path], options: FrameOptions) -> Iterator[Sizes]:
    for path in paths:
        try:
            with Image.open(path) as picture:
                yield _resized(ImageOps.exif_transpose(picture).convert("RGB"), options)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            reason = f"damaged: {path.name!a} is no readable picture"
            raise ClipError(reason) from None


def _resized(picture: Image.Image, options: FrameOptions) -> Sizes:
    if options.resize == "crop":
        fit = partial(ImageOps.fit, method=Image.Resampling.BOX)
    else:
        fit = partial(Image.Image.resize, resample=Image.Resampling.BOX)
    size = (options.size, options.size)
    colour = np.asarray(picture if picture.size == size else fit(picture, size))
    if not options.flow:
        return colour, None
    return colour, np.asarray(fit(picture.convert("L"), (FLOW_SIZE, FLOW_SIZE)))
