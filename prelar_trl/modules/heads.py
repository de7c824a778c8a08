"""MLP heads on features, and the actor."""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from prelar_trl.modules.checks import check_input
from prelar_trl.modules.distributions import OneHot, TruncatedNormal, to_float32
from prelar_trl.utils import check_integers

__all__ = ["MLP", "Actor", "OneHotActor", "VectorEncoder"]


def _hidden_layers(in_features: int, layers: int, units: int) -> nn.ModuleList:
    sizes = [in_features] + [units] * layers
    return nn.ModuleList(map(nn.Linear, sizes, sizes[1:]))


class MLP(nn.Module):
    """``layers`` ELU layers of ``units``, then a linear one; ``[..., in]`` -> ``[..., out]``.

    The output is float32 under autocast too.
    """

    def __init__(self, in_features: int, out_features: int, layers: int = 4, units: int = 400):
        super().__init__()
        check_integers(in_features=in_features, units=units)
        check_integers(0, layers=layers, out_features=out_features)
        self.layers = _hidden_layers(in_features, layers, units)
        self.act = nn.ELU()
        self.out = nn.Linear(units if layers else in_features, out_features)

    def trunk(self, x: Tensor) -> Tensor:
        """The hidden layers: ``[..., in_features]`` -> ``[..., units]``.

        Raises:
            TypeError, ValueError: the features are of another type, width or device.
        """
        first = cast(nn.Linear, self.layers[0]) if len(self.layers) else self.out
        check_input("feat", x, first.weight, first.in_features)
        for layer in self.layers:
            x = self.act(layer(x))
        return x

    def forward(self, x: Tensor) -> Tensor:
        return to_float32(self.out(self.trunk(x)))


class VectorEncoder(nn.Module):
    """``layers`` ELU layers of ``units``: ``[..., V]`` -> ``[..., E]`` (DreamerV2's ``mlp_keys``).

    The output is float32 under autocast too. ``embed_dim = units``.
    """

    def __init__(self, in_features: int, layers: int = 4, units: int = 400) -> None:
        super().__init__()
        check_integers(in_features=in_features, units=units)
        check_integers(0, layers=layers)
        self.layers = _hidden_layers(in_features, layers, units)
        self.in_features, self.embed_dim = in_features, units if layers else in_features

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.elu(layer(x))
        return to_float32(x)


class Actor(MLP):
    """Policy on features: a truncated normal on [-1, 1] (DreamerV2, section 2)."""

    def __init__(self, in_features: int, action_dim: int, layers: int = 4, units: int = 400):
        super().__init__(in_features, action_dim, layers, units)
        self.action_dim = action_dim
        self.std_out = nn.Linear(self.out.in_features, action_dim)

    def forward(self, feat: Tensor) -> TruncatedNormal:
        x = self.trunk(feat)
        return TruncatedNormal.from_raw(self.out(x), self.std_out(x))


class OneHotActor(MLP):
    """Policy on features for one of A choices: a one-hot vector (DreamerV2, section 2)."""

    def __init__(self, in_features: int, action_dim: int, layers: int = 4, units: int = 400):
        super().__init__(in_features, action_dim, layers, units)
        self.action_dim = action_dim

    def forward(self, feat: Tensor) -> OneHot:
        return OneHot(self.out(self.trunk(feat)))
