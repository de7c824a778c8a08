"""Random augmentations of images ``[B, C, H, W]``, by draws of fixed shapes."""

from __future__ import annotations

from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from prelar_trl.types import Augmentation
from prelar_trl.utils import check_choice

__all__ = ["Augmentation", "augment", "random_shift"]


def augment(images: Tensor, augmentation: Augmentation) -> Tensor:
    """Augment each image ``[B, C, H, W]`` in [-0.5, 0.5] by its own random draw."""
    check_choice("augmentation", augmentation, get_args(Augmentation))
    match augmentation:
        case "none":
            return images
        case "shift":
            return random_shift(images, 8)
        case "shift4":
            return random_shift(images, 4)
        case "flip":
            return torch.where(_coin(images), images.flip(-1), images)
        case "scale":
            return _resized_crop(images)
        case "erasing":
            return _erase(images)


def _coin(images: Tensor) -> Tensor:
    return torch.rand(images.shape[0], 1, 1, 1, device=images.device) < 0.5


def _uniform(images: Tensor, low: float, high: float) -> Tensor:
    draws = torch.rand(images.shape[0], dtype=images.dtype, device=images.device)
    return low + (high - low) * draws


def random_shift(images: Tensor, pad: int) -> Tensor:
    """Move each image ``[B, C, H, W]`` by up to ``pad`` pixels, its border repeated.

    Pad, then crop at a random place (DrQ, Yarats et al., 2021, section 3.1).
    """
    batch, channels, height, width = images.shape
    padded = F.pad(images, (pad, pad, 0, 0), mode="replicate").permute(0, 2, 3, 1)
    offset = torch.randint(2 * pad + 1, (2, batch, 1), device=images.device)
    rows = (offset[0] + torch.arange(height, device=images.device) - pad).clamp(0, height - 1)
    # Whole rows are copied, which is faster than picking each pixel.
    windows = padded.flatten(2).unfold(2, width * channels, channels)  # [B, H, 2 pad + 1, W C]
    sequence = torch.arange(batch, device=images.device)[:, None]
    cropped = windows[sequence, rows, offset[1]]  # [B, H, W C]
    return cropped.unflatten(2, (width, channels)).permute(0, 3, 1, 2)


def _rectangle(images: Tensor, area: tuple[float, float], log_ratio: float) -> tuple[Tensor, ...]:
    """Random height and width, as shares of the image, of the given area and aspect ratio."""
    size = _uniform(images, *area)
    ratio = _uniform(images, -log_ratio, log_ratio).exp()
    return (size * ratio).sqrt().clamp(max=1), (size / ratio).sqrt().clamp(max=1)


def _resized_crop(images: Tensor) -> Tensor:
    """Crop 2/3 to all of the area at aspect ratio 3/4 to 4/3, resized to the whole image."""
    height, width = _rectangle(images, (2 / 3, 1.0), 0.2877)  # log(4/3)
    center_y = (1 - height) * _uniform(images, -1, 1)
    center_x = (1 - width) * _uniform(images, -1, 1)
    zero = torch.zeros_like(height)
    theta = torch.stack(
        [torch.stack([width, zero, center_x], -1), torch.stack([zero, height, center_y], -1)], 1
    )
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _erase(images: Tensor) -> Tensor:
    """Gray out a rectangle of 2% to 33% of the area, aspect ratio 0.3 to 3.3, in half of them."""
    height, width = _rectangle(images, (0.02, 0.33), 1.194)  # log(3.3)
    top, left = (1 - height) * _uniform(images, 0, 1), (1 - width) * _uniform(images, 0, 1)

    def inside(length: int, start: Tensor, extent: Tensor) -> Tensor:
        center = (torch.arange(length, device=images.device) + 0.5) / length
        return (center >= start[:, None]) & (center < (start + extent)[:, None])

    box = (
        inside(images.shape[2], top, height)[:, None, :, None]
        & (inside(images.shape[3], left, width)[:, None, None, :])
    )
    # 0 is mid gray: images lie in [-0.5, 0.5].
    return images.masked_fill(box & _coin(images), 0.0)
