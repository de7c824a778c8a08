"""Latent actions of one-hot variables, alone or beside continuous ones."""

from __future__ import annotations

import torch
from torch import Tensor

from prelar_trl.modules.distributions import Categorical, categorical_kl
from prelar_trl.modules.latent_actions.base import LatentActions, register_latent_actions
from prelar_trl.modules.latent_actions.continuous import GaussianActions

__all__ = ["CategoricalActions", "MixedActions"]


@register_latent_actions("categorical")
class CategoricalActions(LatentActions):
    """One-hot variables with straight-through gradients; U = ``size * classes``.

    Its parameters are logits, ``[..., size, classes]``.

    Args:
        size: number of variables.
        classes: classes of each, at least 2.
    """

    def __init__(self, *, size: int, classes: int = 0) -> None:
        super().__init__(size=size)
        if classes < 2:
            raise ValueError(f"classes={classes}: a categorical latent action needs at least 2")
        self.latent = Categorical(size, classes)
        self.num_outputs = self.dim = self.latent.flat_size

    def forward(self, raw: Tensor, sample: bool = True) -> tuple[Tensor, Tensor]:
        params = self.latent.params(raw)
        return self.latent.flatten(self.latent.rsample(params, sample)), params

    def kl(self, params: Tensor) -> Tensor:
        """KL from the uniform distribution; the authors' code has a constant."""
        return categorical_kl(params, torch.zeros_like(params))

    def distance(self, action_a: Tensor, params_a: Tensor, action_b: Tensor, params_b: Tensor):
        """KL of the first distribution from the second."""
        return categorical_kl(params_a, params_b)

    def features(self, action: Tensor, params: Tensor) -> Tensor:
        """Probabilities, ``[..., U]``."""
        return params.softmax(-1).flatten(-2)


@register_latent_actions("mixed")
class MixedActions(LatentActions):
    """``deter_size`` numbers as they are, then Gaussian or, with ``classes``, one-hot variables.

    KL and distance are those of the stochastic part.

    Args:
        size: number of stochastic variables.
        classes: classes of each; 0 makes them Gaussian. Default: 0.
        deter_size: width of the deterministic part. Default: ``size``.
        prior_std: of the Gaussian part, see :class:`GaussianActions`. Default: 1.
    """

    def __init__(
        self, *, size: int, classes: int = 0, deter_size: int | None = None, prior_std: float = 1.0
    ) -> None:
        super().__init__(size=size)
        self.deter_size = size if deter_size is None else deter_size
        self.stochastic = (
            CategoricalActions(size=size, classes=classes)
            if classes
            else GaussianActions(size=size, prior_std=prior_std)
        )
        self.num_outputs = self.deter_size + self.stochastic.num_outputs
        self.dim = self.deter_size + self.stochastic.dim

    def forward(self, raw: Tensor, sample: bool = True) -> tuple[Tensor, Tensor]:
        deter, stoch = raw.split([self.deter_size, self.stochastic.num_outputs], -1)
        action, params = self.stochastic(stoch, sample)
        return torch.cat([deter, action], -1), params

    def kl(self, params: Tensor) -> Tensor:
        return self.stochastic.kl(params)

    def distance(self, action_a: Tensor, params_a: Tensor, action_b: Tensor, params_b: Tensor):
        a, b = action_a[..., self.deter_size :], action_b[..., self.deter_size :]
        return self.stochastic.distance(a, params_a, b, params_b)

    def features(self, action: Tensor, params: Tensor) -> Tensor:
        deter, stoch = action.split([self.deter_size, self.stochastic.dim], -1)
        return torch.cat([deter, self.stochastic.features(stoch, params)], -1)
