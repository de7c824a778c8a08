"""Updates that are not finite are skipped without waiting for the GPU."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer

from prelar_trl.fast.private import fused_adam_skips
from prelar_trl.updates import Update, step_unless

__all__ = ["skip_on_device"]

U = TypeVar("U", bound=Update)


def skip_on_device(update: U) -> U:
    """Let the kernel of a fused Adam read whether an update is skipped, in place.

    The host need not know, and queues the next operations meanwhile. Weights, moments and counts of
    steps are the same. Other optimizers, and devices whose kernel cannot do it, step as before.

    Args:
        update: its module must be on its device.

    Returns:
        The same update.
    """
    kind = next(update.module.parameters()).device.type
    if kind != "meta" and fused_adam_skips(kind):
        update.step_unless = step_unless_on_device
    return update


def step_unless_on_device(skip: Tensor, optimizer: Optimizer) -> None:
    """:func:`prelar_trl.updates.step_unless` without waiting, if the optimizer is a fused Adam."""
    if isinstance(optimizer, Adam) and optimizer.defaults["fused"]:
        vars(optimizer)["found_inf"] = skip.to(torch.float32)
        optimizer.step()
    else:
        step_unless(skip, optimizer)
