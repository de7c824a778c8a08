"""Videos and pictures: comparison grids, contact sheets, mp4 files.

Shapes: T time, B batch, H W height and width. Frames are uint8, channels first.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from prelar_trl.record.quality import psnr
from prelar_trl.utils import atomic_write

BACKGROUND = (255, 255, 255)
INK = (40, 44, 52)
SEEN = (0, 121, 140)
IMAGINED = (209, 73, 91)
GAP = 4  # pixels between the tiles of a picture
LINE = 22  # pixels of a line of text
ERROR_GAIN = 2  # good predictions differ by too little to be seen otherwise
ROWS = ("truth", "model", f"error x{ERROR_GAIN}")


def to_uint8(images: Tensor) -> Tensor:
    """Float images in [0, 1] to uint8, rounded; values outside are clipped, uint8 stays."""
    if images.dtype == torch.uint8:
        return images
    return images.detach().float().clamp(0, 1).mul(255).round().to(torch.uint8)


def video_grid(
    truth: Tensor,
    model: Tensor,
    *,
    context: int | None = None,
    max_sequences: int = 6,
    scale: int = 2,
) -> Tensor:
    """Rows truth | model | error, one column a sequence, as a video uint8 [T, 3, h, w].

    The error row is twice the absolute difference. With ``context``, the frame round the model's
    row and the caption tell the frames that were seen from those that were imagined.

    Args:
        truth: uint8 [B, T, 3, H, W] or [T, 3, H, W].
        model: the same shape; uint8, or float in [0, 1].
        context: number of frames that the model has seen; None: no such mark.
        max_sequences: at most this many columns. Default: 6.
        scale: nearest-neighbor enlargement of each tile. Default: 2.
    """
    truth, model = _pair(truth, model)
    truth, model = truth[:max_sequences], model[:max_sequences]
    values = psnr(model, truth).mean(0)
    rows = (truth, model, _error(model, truth))
    frames = []
    for t in range(truth.shape[1]):
        state = "" if context is None else ("  seen" if t < context else "  imagined")
        frames.append(
            _tile(
                [[sequence[t] for sequence in row] for row in rows],
                row_labels=ROWS,
                caption=f"frame {t + 1:2d}{state}   model {values[t]:.1f} dB",
                model_frames=_frame_colors([t] * len(truth), context),
                scale=scale,
            )
        )
    return torch.stack(frames)


def frame_strip(
    truth: Tensor, model: Tensor, *, context: int | None = None, columns: int = 12, scale: int = 2
) -> Tensor:
    """One sequence as a picture uint8 [3, h, w]: rows truth | model | error, time to the right.

    Args:
        truth: uint8 [T, 3, H, W].
        model: the same shape; uint8, or float in [0, 1].
        context: as in :func:`video_grid`.
        columns: number of evenly spaced frames shown; the first and last always are.
        scale: nearest-neighbor enlargement of each tile. Default: 2.
    """
    if truth.ndim != 4:
        raise ValueError(f"frame_strip: one sequence [T, 3, H, W] is needed, got {truth.ndim} dims")
    truth, model = (video[0] for video in _pair(truth, model))
    times, values = _evenly(len(truth), columns), psnr(model, truth)
    return _tile(
        [[video[t] for t in times] for video in (truth, model, _error(model, truth))],
        row_labels=ROWS,
        labels=[(), (), [f"{t + 1}: {values[t]:.1f} dB" for t in times]],
        caption="" if context is None else f"{context} frames seen, the rest imagined",
        model_frames=_frame_colors(times, context),
        scale=scale,
    )


def film_rows(rows: Mapping[str, Tensor], *, columns: int = 12, scale: int = 2) -> Tensor:
    """Several sequences as a picture uint8 [3, h, w]: one labeled row each, time to the right.

    Args:
        rows: label -> uint8, or float in [0, 1], [T, 3, H, W]; all of one shape.
        columns, scale: as in :func:`frame_strip`.
    """
    videos = [to_uint8(video).cpu() for video in rows.values()]
    times = _evenly(len(videos[0]), columns)
    return _tile(
        [[video[t] for t in times] for video in videos],
        row_labels=list(rows),
        labels=[()] * (len(videos) - 1) + [[str(t + 1) for t in times]],
        scale=scale,
    )


def contact_sheet(
    pictures: Sequence[Tensor],
    *,
    labels: Sequence[str] | None = None,
    columns: int | None = None,
    caption: str = "",
    scale: int = 1,
) -> Tensor:
    """Many pictures of one size as one, uint8 [3, h, w].

    Args:
        pictures: uint8 [3, H, W] each, or one tensor [N, 3, H, W].
        labels: one a picture, written under it.
        columns: default: a sheet slightly wider than high.
        caption: a line above.
        scale: nearest-neighbor enlargement. Default: 1.
    """
    pictures = list(pictures)
    if not pictures:
        raise ValueError("contact_sheet: no pictures")
    columns = columns or max(1, math.ceil(math.sqrt(1.4 * len(pictures))))
    starts = range(0, len(pictures), columns)
    return _tile(
        [pictures[i : i + columns] for i in starts],
        labels=[labels[i : i + columns] for i in starts] if labels else (),
        caption=caption,
        scale=scale,
    )


def write_video(
    path: str | os.PathLike[str], frames: Tensor, fps: float = 10.0, *, scale: int | None = None
) -> Path:
    """Write an mp4 that browsers play (H.264, yuv420p). An existing file is replaced at the end.

    Args:
        path: must end in ``.mp4``; its folder is made.
        frames: uint8 [T, 3, H, W], T >= 1.
        fps: frames a second. Default: 10.
        scale: nearest-neighbor enlargement. Default: the least one, up to 4, that makes the
            smaller side at least 256.
    """
    path = Path(path)
    if path.suffix != ".mp4":
        raise ValueError(f"write_video: path must end in .mp4, got {path}")
    if frames.ndim != 4 or frames.shape[1] != 3 or frames.dtype != torch.uint8 or not len(frames):
        raise ValueError(
            f"write_video: uint8 frames [T, 3, H, W] are needed, got {frames.dtype} "
            f"{list(frames.shape)}"
        )
    if scale is None:
        scale = min(4, math.ceil(256 / min(frames.shape[-2:])))
    array = _enlarge(frames.cpu(), scale).permute(0, 2, 3, 1).numpy()  # [T, h, w, 3]
    pad_height, pad_width = array.shape[1] % 2, array.shape[2] % 2  # yuv420p needs even sides
    array = np.pad(array, ((0, 0), (0, pad_height), (0, pad_width), (0, 0)), mode="edge")
    path.parent.mkdir(parents=True, exist_ok=True)
    rate = Fraction(fps).limit_denominator(1000)
    options = {"movflags": "faststart"}
    with atomic_write(path) as part, av.open(str(part), "w", options=options) as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "18"})
        stream.height, stream.width = array.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for image in array:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def read_video(path: str | os.PathLike[str]) -> Tensor:
    """The frames of a video file, uint8 [T, 3, h, w]."""
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


def write_picture(path: str | os.PathLike[str], picture: Tensor) -> Path:
    """Write a picture, uint8 [3, h, w], in the format of the path's ending (png, jpg, ...)."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture.cpu().permute(1, 2, 0).contiguous().numpy()).save(path)
    return path


def _pair(truth: Tensor, model: Tensor) -> tuple[Tensor, Tensor]:
    """Both as uint8 [B, T, 3, H, W] on the CPU."""
    if truth.shape != model.shape or truth.ndim not in (4, 5) or truth.shape[-3] != 3:
        raise ValueError(
            "truth and model must both be [B, T, 3, H, W] or [T, 3, H, W], got "
            f"{list(truth.shape)} and {list(model.shape)}"
        )
    truth, model = to_uint8(truth).cpu(), to_uint8(model).cpu()
    return (truth[None], model[None]) if truth.ndim == 4 else (truth, model)


def _evenly(length: int, count: int) -> Sequence[int]:
    """At most ``count`` evenly spaced times, the first and the last among them."""
    return np.unique(np.linspace(0, length - 1, min(count, length)).round().astype(int)).tolist()


def _frame_colors(times: Sequence[int], context: int | None) -> list[tuple[int, int, int]]:
    """Of the frames round the model's pictures; none where it is not said what it has seen."""
    return [] if context is None else [SEEN if t < context else IMAGINED for t in times]


def _error(model: Tensor, truth: Tensor) -> Tensor:
    return (ERROR_GAIN * (model.short() - truth.short()).abs()).clamp_max(255).to(torch.uint8)


def _enlarge(images: Tensor, scale: int) -> Tensor:
    return images.repeat_interleave(scale, dim=-2).repeat_interleave(scale, dim=-1)


@cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=13)


def _tile(
    rows: Sequence[Sequence[Tensor]],
    *,
    row_labels: Sequence[str] = (),
    labels: Sequence[Sequence[str]] = (),
    caption: str = "",
    model_frames: Sequence[tuple[int, int, int]] = (),
    scale: int = 1,
) -> Tensor:
    """Pictures uint8 [3, H, W] on a white sheet, uint8 [3, h, w].

    ``labels``: of each row, under its pictures. ``model_frames``: colors round those of the second.
    """
    font = _font()
    height, width = (side * scale for side in rows[0][0].shape[-2:])
    left = GAP + (max(int(font.getlength(label)) for label in row_labels) + 8 if row_labels else 0)
    labels = labels or [()] * len(rows)
    bottoms = np.cumsum([height + GAP + (LINE if below else 0) for below in labels])
    bottoms = (bottoms + (LINE if caption else 0)).tolist()
    right = left + max(map(len, rows)) * (width + GAP)
    sheet = Image.new("RGB", (right, bottoms[-1] + (0 if labels[-1] else GAP)), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    if caption:
        draw.text((left, GAP), caption, fill=INK, font=font)
    for i, (row, below, bottom) in enumerate(zip(rows, labels, bottoms, strict=True)):
        y = bottom - height - (LINE if below else 0)
        if row_labels:
            draw.text((GAP, y + height // 2), row_labels[i], fill=INK, font=font, anchor="lm")
        for j, picture in enumerate(row):
            x = left + j * (width + GAP)
            array = _enlarge(picture, scale).permute(1, 2, 0).contiguous().numpy()
            sheet.paste(Image.fromarray(array), (x, y))
            if i == 1 and model_frames:
                box = (x - 2, y - 2, x + width + 1, y + height + 1)
                draw.rectangle(box, outline=model_frames[j], width=2)
        for j, label in enumerate(below):
            x = left + j * (width + GAP) + width // 2
            draw.text((x, bottom - 5), label, fill=INK, font=font, anchor="ms")
    return torch.from_numpy(np.array(sheet)).permute(2, 0, 1)
