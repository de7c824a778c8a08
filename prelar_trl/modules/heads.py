"""MLP heads on features, and the actor."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prelar_trl.modules.distributions import TruncatedNormal, to_float32
from prelar_trl.modules.linear import Linear

__all__ = ["MLP", "Actor"]


class MLP(nn.Module):
    """``layers`` ELU layers of ``units``, then a linear layer: ``[..., in]`` -> ``[..., out]``."""

    def __init__(self, in_features: int, out_features: int, layers: int = 4, units: int = 400):
        super().__init__()
        sizes = [in_features] + [units] * layers
        self.layers = nn.ModuleList(
            Linear(n_in, n_out) for n_in, n_out in zip(sizes, sizes[1:], strict=False)
        )
        self.out = Linear(sizes[-1], out_features)

    def trunk(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.elu(layer(x), inplace=True)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.trunk(x))


class Actor(MLP):
    """Policy on features: a truncated normal on [-1, 1].

    Mean ``tanh(.)``, standard deviation ``2 * sigmoid(raw / 2) + 0.1`` (DreamerV2, section 2).
    """

    def __init__(self, in_features: int, action_dim: int, layers: int = 4, units: int = 400):
        super().__init__(in_features, action_dim, layers, units)
        self.std_out = Linear(self.out.in_features, action_dim)

    def forward(self, feat: Tensor) -> TruncatedNormal:
        x = self.trunk(feat)
        std = 2 * torch.sigmoid(to_float32(self.std_out(x)) / 2) + 0.1
        return TruncatedNormal(torch.tanh(to_float32(self.out(x))), std)
