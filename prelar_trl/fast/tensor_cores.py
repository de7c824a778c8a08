"""What a GPU does with float32, which is a setting of the whole process."""

from __future__ import annotations

import torch

__all__ = ["use_tensor_cores"]


def use_tensor_cores(device: torch.device) -> None:
    """On CUDA: float32 products on the tensor cores, and the fastest convolution of each shape.

    TF32 rounds the factors of a product to 10 bits of mantissa and adds up in float32. Shapes are
    the same in every update, so that cuDNN's trials pay. Nothing changes for other devices.
    """
    if device.type != "cuda":
        return
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
