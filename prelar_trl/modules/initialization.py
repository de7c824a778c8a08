"""The weights that networks begin with."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from prelar_trl.modules.latent_actions import LatentActions

__all__ = ["initialize"]


@torch.no_grad()
def initialize(module: nn.Module, kept: Iterable[nn.Module | None] = ()) -> Any:
    """Xavier-uniform weights and zero biases of linear and convolution layers.

    Those of ``kept`` and of kinds of latent action stay. Of an action window the last one's weights
    alone are not zero, see :class:`ActionEncoder`.
    """
    kinds = [layer for layer in module.modules() if isinstance(layer, LatentActions)]
    own = {layer for each in (*kept, *kinds) if each is not None for layer in each.modules()}
    for layer in module.modules():
        if layer in own:
            continue
        if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)):
            weight = layer.weight
            if isinstance(layer, nn.Conv1d):
                weight = nn.init.zeros_(layer.weight)[..., -1]
            nn.init.xavier_uniform_(weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return module
