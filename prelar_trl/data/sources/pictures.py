"""Pictures of any kind, and files that hold several of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import PIL
from PIL import Image, ImageOps, ImageSequence

from prelar_trl.data.sources.base import Clip, ClipError, FrameOptions, Sizes, sized_clip
from prelar_trl.data.sources.flow import FLOW_SIZE

PICTURE_DECODER = f"Pillow {PIL.__version__}"
ANIMATED = (".gif", ".webp", ".png", ".apng", ".avif", ".tif", ".tiff")
PICTURES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".bmp", ".dib", ".jp2", ".j2k", ".jpx", ".tga"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".qoi", ".pcx", ".sgi", *ANIMATED),
)
DARK = "16-bit pictures that stay below an eighth of 65535: dark, set white=<largest value>"


def picture_clip(paths: Sequence[Path], options: FrameOptions) -> Clip:
    """A clip of pictures, one a frame. Those that cannot be read are left out and noted."""
    notes: Counter[str] = Counter()
    return sized_clip(_pictures(paths[:: options.stride], options, notes), options, notes)


def animation_clip(path: Path, options: FrameOptions) -> Clip:
    """A clip of the pictures of one file, e.g. an animated WebP or PNG, a TIFF of many pages."""
    notes: Counter[str] = Counter()
    return sized_clip(_animation(path, options, notes), options, notes)


def array_clip(frames: Iterable[np.ndarray], options: FrameOptions) -> Clip:
    """A clip of frames uint8 ``[H, W, 3]``."""
    frames = islice(frames, 0, None, options.stride)
    return sized_clip((resized(Image.fromarray(f), options) for f in frames), options, Counter())


def is_animated(path: Path) -> bool:
    """Whether a file of one of the formats `ANIMATED` holds several pictures."""
    try:
        with Image.open(path) as picture:
            return getattr(picture, "is_animated", False)
    except Exception:  # decoders fail on damage in many ways
        return False


def to_rgb(picture: Image.Image, white: float | None = None) -> Image.Image:
    """Any picture in 8 bits a channel; an alpha channel is dropped.

    Pictures of more than 8 bits a channel are gray: ``255 * value / white``, rounded, cut off below
    0 and above 255, not-a-number black. ``white`` is 65535 for integers, 1 for floating-point
    numbers unless it is given.

    Raises:
        ClipError: ``white`` is needed: values lie beyond its default.
    """
    if picture.mode not in ("I", "F") and not picture.mode.startswith("I;16"):
        return picture.convert("RGB")
    values = np.nan_to_num(np.asarray(picture, np.float64))
    if white is None:
        white = 1 if picture.mode == "F" else 65535
        if values.min() < 0 or values.max() > white:
            kind = "floating-point" if picture.mode == "F" else "32-bit"
            raise ClipError(f"{kind} pictures with values outside 0..{white}: set white=<largest>")
    gray = np.round(np.clip(255 * values / white, 0, 255)).astype(np.uint8)
    return Image.fromarray(gray).convert("RGB")


def resized(picture: Image.Image, options: FrameOptions) -> Sizes:
    """An RGB picture in the sizes that are needed."""
    if options.resize == "crop":
        fit = partial(ImageOps.fit, method=Image.Resampling.BOX)
    else:
        fit = partial(Image.Image.resize, resample=Image.Resampling.BOX)
    size = (options.size, options.size)
    color = np.asarray(picture if picture.size == size else fit(picture, size))
    if not options.flow:
        return color, None
    return color, np.asarray(fit(picture.convert("L"), (FLOW_SIZE, FLOW_SIZE)))


class _Converter:
    """`to_rgb` for the pictures of one clip; notes it if little can be seen of them."""

    def __init__(self, white: float | None, notes: Counter[str]) -> None:
        self.white, self.notes = white, notes
        self.brightest = 0  # of 16 bits

    def __call__(self, picture: Image.Image) -> Image.Image:
        rgb = to_rgb(picture, self.white)
        if self.white is None and picture.mode.startswith("I"):
            self.notes[DARK] += 1
            self.brightest = max(self.brightest, int(np.asarray(rgb)[..., 0].max()))
            if self.brightest >= 32:
                del self.notes[DARK]
        return rgb


def _pictures(paths: Sequence[Path], options: FrameOptions, notes: Counter[str]) -> Iterator[Sizes]:
    converter = _Converter(options.white, notes)
    bad: list[str] = []
    for path in paths:
        try:
            with Image.open(path) as picture:
                frame = resized(converter(ImageOps.exif_transpose(picture)), options)
        except ClipError:
            raise
        except Exception:  # decoders fail on damage in many ways
            bad.append(path.name)
            notes["pictures left out that cannot be read"] += 1
            continue
        yield frame
    if bad and len(bad) == len(paths):
        raise ClipError(f"damaged: {bad[0]!a} is no readable picture")


def _animation(path: Path, options: FrameOptions, notes: Counter[str]) -> Iterator[Sizes]:
    converter = _Converter(options.white, notes)
    try:
        with Image.open(path) as file:
            # An APNG may begin with a picture for programs that cannot play it.
            first = 1 if file.info.get("default_image") else 0
            for picture in islice(ImageSequence.Iterator(file), first, None, options.stride):
                yield resized(converter(picture), options)
    except ClipError:
        raise
    except Exception:  # decoders fail on damage in many ways
        notes["breaks off before its end"] += 1
