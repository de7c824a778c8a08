"""Any picture as ``pixels``, uint8 [3, size, size]: the one place where that is decided.

=================  ===============================================================================
shape              [H, W, C], [C, H, W] or [H, W], with C = 1 (gray) or 3 (RGB); of ``render()``
                   also 4 (RGBA): among observations these may be four stacked frames
integers           0 to 255
floats             0 to 1, or 0 to 255 where the bounds say so or a value above 1 was seen
lists of pictures  the last one (gymnasium's ``rgb_array_list``)
=================  ===============================================================================

Alpha is dropped, gray becomes equal red, green and blue, and sizes are averaged over areas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

CHANNELS = (1, 3, 4)
SMALLEST = 8  # sides of a picture among observations; smaller arrays are states


@dataclass
class PictureConverter:
    """Turns pictures of one source into uint8 [*batch, 3, size, size]."""

    size: int  # height and width
    white: float | None = None  # its value in floats, 1 or 255; None judges by the values
    batch_dims: int = 0  # number of leading dimensions that count pictures
    source: str = "picture"  # what gives the pictures, for messages

    def __call__(self, picture: Any) -> Tensor:
        """Raises ValueError, in one line, for what is no picture."""
        picture = self._as_tensor(picture)
        batch, shape = picture.shape[: self.batch_dims], picture.shape[self.batch_dims :]
        dim = channel_dim(shape)
        if dim is None:
            given = f"{dtype_name(picture.dtype)} {list(shape)}"
            raise ValueError(f"{self.source} gives {given}, which is no picture")
        if len(shape) == 2:
            picture = picture.unsqueeze(-1)
        picture = picture.reshape(-1, *picture.shape[-3:]).movedim(dim, 1)  # [N, C, H, W]
        if picture.shape[1] == 4:
            picture = picture[:, :3]
        picture = self._resize(self._in_bytes(picture))
        return picture.expand(-1, 3, -1, -1).reshape(*batch, 3, self.size, self.size).contiguous()

    def _as_tensor(self, picture: Any) -> Tensor:
        if isinstance(picture, list | tuple) and picture and hasattr(picture[-1], "shape"):
            picture = picture[-1]
        if isinstance(picture, Tensor):
            return picture
        try:
            array = np.asarray(picture)
        except ValueError:  # lists of unlike lengths
            array = np.asarray(None)
        if array.dtype.kind not in "buif":
            raise ValueError(
                f"{self.source} gives {type(picture).__name__}, which is no picture: make the "
                "environment with render_mode='rgb_array'"
            )
        if array.dtype.kind == "u" and array.dtype != np.uint8:
            array = array.astype(np.int64)  # torch computes with few unsigned types
        return torch.from_numpy(np.ascontiguousarray(array))

    def _in_bytes(self, picture: Tensor) -> Tensor:
        """Values from 0 to 255; float32 where they were floats."""
        if picture.dtype == torch.uint8:
            return picture
        if picture.dtype == torch.bool:
            return picture.to(torch.uint8) * 255
        low, high = picture.min().item(), picture.max().item()
        if not 0 <= low <= high <= 255:  # also where they are NaN
            raise ValueError(
                f"{self.source} gives {dtype_name(picture.dtype)} from {low:g} to {high:g}: "
                "pictures are integers from 0 to 255, or floats from 0 to 1 or 0 to 255"
            )
        if not picture.is_floating_point():
            return picture.to(torch.uint8)
        if self.white is None and high > 1:
            self.white = 255.0
        return picture.float() * (255 / (self.white or 1.0))

    def _resize(self, picture: Tensor) -> Tensor:
        """[N, C, H, W] to uint8 [N, C, size, size]."""
        size = (self.size, self.size)
        if picture.shape[2:] != size:
            picture = nn.functional.interpolate(picture.float(), size=size, mode="area")
        if picture.is_floating_point():
            picture = picture.round().clamp(0, 255)
        return picture.to(torch.uint8)


def channel_dim(shape: Sequence[int]) -> int | None:
    """The dimension of the channels, -1 or -3, of a picture [H, W, C], [C, H, W] or [H, W].

    -1 also for [H, W], to which a dimension is to be added; None where the shape is no picture's.
    """
    if len(shape) == 2 or (len(shape) == 3 and shape[-1] in CHANNELS):
        return -1
    return -3 if len(shape) == 3 and shape[0] in CHANNELS else None


def looks_like_picture(shape: Sequence[int], dtype: torch.dtype | None) -> bool:
    """Whether an observation without batch dimensions is meant as a picture, well-formed or not."""
    sides = sorted(shape)[-2:]
    if dtype is None or len(sides) < 2 or sides[0] < SMALLEST:
        return False
    if dtype == torch.uint8:
        return True
    return dtype.is_floating_point and len(shape) == 3 and channel_dim(shape) is not None


def check_picture(name: str, shape: Sequence[int], dtype: torch.dtype) -> None:
    """Raise ValueError for an observation that cannot be taken as one picture."""
    dim = channel_dim(shape)
    given = f"{name} is {dtype_name(dtype)} {list(shape)}"
    if dim is None:
        raise ValueError(f"{given}, which is no picture: give uint8 [H, W, C] with C = 1 or 3")
    if len(shape) == 3 and shape[dim] == 4:
        raise ValueError(
            f"{given}, which may be RGBA or four stacked frames: give one picture of 1 or 3 "
            "channels (the model remembers earlier frames by itself)"
        )


def white_of(high: Tensor | None) -> float | None:
    """The value of white that the upper bounds of a picture of floats declare."""
    top = None if high is None else high.double().max().item()
    return top if top in (1.0, 255.0) else None


def dtype_name(dtype: torch.dtype) -> str:
    """Such as ``uint8``."""
    return str(dtype).removeprefix("torch.")
