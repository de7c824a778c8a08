"""How alike two images are: PSNR and structural similarity."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

MAX_PSNR = 100.0
SIZE, SIGMA = 11, 1.5  # the window: a Gaussian
C1, C2 = 0.01**2, 0.03**2


def psnr(prediction: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each frame, in dB, float32 [...]; higher is better.

    ``10 log10(1 / mse)`` with pixel values in [0, 1] and the mean over C, H, W; at most 100
    (equal frames). ``psnr(...).mean(0)`` of [B, T, C, H, W] is the curve by step.

    Args:
        prediction: uint8, or float in [0, 1]; [..., C, H, W].
        truth: the same shape; the type may differ.
    """
    if prediction.shape != truth.shape:
        raise ValueError(
            f"psnr: shapes differ: prediction {tuple(prediction.shape)}, truth {tuple(truth.shape)}"
        )
    error = _unit(prediction) - _unit(truth)
    mse = error.square().mean(dim=(-3, -2, -1))
    return -10 * torch.log10(mse.clamp_min(10 ** (-MAX_PSNR / 10)))


def ssim(prediction: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity of each frame, float32 ``[...]``; 1 for equal ones, higher is better.

    ``(2 m_x m_y + C1) (2 s_xy + C2) / ((m_x^2 + m_y^2 + C1) (s_x^2 + s_y^2 + C2))`` with pixel
    values in [0, 1] and local means, variances and covariance under an 11x11 Gaussian window of
    standard deviation 1.5; the mean over the positions where the window fits, and over C
    (Wang et al., 2004, section III.B).

    Args:
        prediction: uint8, or float in [0, 1]; ``[..., C, H, W]``, H and W at least 11.
        truth: the same shape; the type may differ.
    """
    if prediction.shape != truth.shape or prediction.dim() < 3:
        raise ValueError(
            f"ssim: prediction {tuple(prediction.shape)} and truth {tuple(truth.shape)} must both "
            "be [..., C, H, W]"
        )
    if min(prediction.shape[-2:]) < SIZE:
        raise ValueError(f"ssim: frames of {tuple(prediction.shape[-2:])} are below {SIZE}x{SIZE}")
    x, y = _unit(prediction), _unit(truth)
    mean_x, mean_y = _blur(x), _blur(y)
    variance_x, variance_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    similarity = (2 * mean_x * mean_y + C1) * (2 * covariance + C2)
    similarity = similarity / ((mean_x**2 + mean_y**2 + C1) * (variance_x + variance_y + C2))
    return similarity.mean((-3, -2, -1))


def _unit(images: Tensor) -> Tensor:
    images = images.detach()
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()


def _blur(images: Tensor) -> Tensor:
    """Weighted local means, ``[..., H-10, W-10]``: two products, for a Gaussian is separable."""
    rows, columns = (_window(side).to(images) for side in images.shape[-2:])
    return rows @ images @ columns.T


@cache
def _window(side: int) -> Tensor:
    """The window at each place where it fits, ``[side-10, side]``."""
    offset = torch.arange(SIZE, dtype=torch.float64) - SIZE // 2
    kernel = torch.exp(-(offset**2) / (2 * SIGMA**2))
    places = torch.zeros(side - SIZE + 1, side, dtype=torch.float64)
    for i, place in enumerate(places):
        place[i : i + SIZE] = kernel / kernel.sum()
    return places
