"""How far things move in videos."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

NOISE = 0.02  # change of brightness, in [0, 1], below which nothing has moved


def typical_motion(pixels: Tensor) -> float:
    """How far things move from one frame to the next, where something moves at all.

    Brightness that moves by v changes by I_t = -v . grad I (Horn and Schunck, 1981). The sum of
    |I_t| over that of |grad I|, where brightness changes, is the mean motion along the gradient.
    Motions wider than what moves are underestimated. Frames are smoothed over 3x3 pixels before.

    Args:
        pixels: uint8 ``[B, T, C, H, W]``, frames in a row.

    Returns:
        Pixels a frame; 0 for videos in which nothing moves.

    Raises:
        ValueError: fewer than two frames, or smaller ones than 4x4.
    """
    if pixels.ndim != 5 or pixels.shape[1] < 2 or min(pixels.shape[-2:]) < 4:
        raise ValueError(
            f"pixels of shape {tuple(pixels.shape)} must be [B, T, C, H, W], "
            "two frames of 4x4 or more"
        )
    brightness = avg_pool2d(pixels.float().mean(2) / 255, 3, stride=1)  # [B, T, H-2, W-2]
    change = (brightness[:, 1:] - brightness[:, :-1]).abs()
    between = (brightness[:, 1:] + brightness[:, :-1]) / 2
    slope = torch.hypot(*torch.gradient(between, dim=(-2, -1)))
    moved = change > NOISE
    return float(change[moved].sum() / slope[moved].sum().clamp_min(1e-6))


def shift_for_motion(pixels: Tensor, times: float = 8.0) -> int:
    """By how many pixels the frames of latent actions are moved in training, for videos like these.

    Too few, and a latent action can say where things are; too many, and it cannot see them move.

    Args:
        pixels: as for :func:`typical_motion`.
        times: of the videos' motion. Default: 8, what ``method=prelar_plus`` takes.

    Returns:
        ``latent_action_shift``: at least 1, at most a third of a frame's shorter side.
    """
    return min(max(1, round(times * typical_motion(pixels))), min(pixels.shape[-2:]) // 3)
