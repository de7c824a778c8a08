"""Pixels, as they are stored, and images, as networks see them."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["normalize_pixels", "to_gray"]

LUMA = (0.299, 0.587, 0.114)  # of red, green and blue (ITU-R BT.601)


def normalize_pixels(pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 pixels -> images in [-0.5, 0.5]."""
    if pixels.dtype != torch.uint8:
        raise TypeError(f"pixels have dtype {pixels.dtype}; store frames as uint8 in [0, 255]")
    if pixels.dim() < 3 or pixels.shape[-1] <= 4 < pixels.shape[-3]:
        raise ValueError(f"pixels have shape {list(pixels.shape)}; it must be [..., C, H, W]")
    return pixels.to(dtype).div_(255).sub_(0.5)


def to_gray(images: Tensor) -> Tensor:
    """Colored images ``[..., 3 V, H, W]`` of V views -> their brightness ``[..., V, H, W]``."""
    colors = images.unflatten(-3, (-1, 3)).unbind(-3)
    return torch.stack([x * weight for x, weight in zip(colors, LUMA, strict=True)]).sum(0)
