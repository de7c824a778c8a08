"""Checks of what is put into a clip store."""

from __future__ import annotations

import numpy as np
import torch

Array = np.ndarray | torch.Tensor


def checked_frames(key: str, value: Array, size: tuple[int, int]) -> np.ndarray:
    """``value`` as a contiguous array.

    Raises:
        ValueError: it is not uint8 ``[T, 3, *size]`` with T >= 1; the message names ``key``.
    """
    array = _numpy(value)
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[1:] != (3, *size):
        raise ValueError(
            f"{key} must be uint8 [T, 3, {size[0]}, {size[1]}], "
            f"got {array.dtype} {list(array.shape)}"
        )
    if not len(array):
        raise ValueError(f"{key} has no frame")
    return np.ascontiguousarray(array)


def checked_actions(value: Array) -> np.ndarray:
    """``value`` as a contiguous array.

    Raises:
        ValueError: it is not float32 ``[T, A]``, or holds NaN or infinity.
    """
    array = _numpy(value)
    if array.dtype != np.float32 or array.ndim != 2:
        raise ValueError(f"actions must be float32 [T, A], got {array.dtype} {list(array.shape)}")
    if not np.isfinite(array).all():
        raise ValueError("actions hold NaN or infinity")
    return np.ascontiguousarray(array)


def _numpy(value: Array) -> np.ndarray:
    return value.cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
