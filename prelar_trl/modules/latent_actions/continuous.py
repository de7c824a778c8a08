"""Latent actions of continuous variables: Gaussian (the paper's) and deterministic."""

from __future__ import annotations

import torch
from torch import Tensor

from prelar_trl.modules.distributions import Gaussian, gaussian_kl
from prelar_trl.modules.latent_actions.base import LatentActions, register_latent_actions

__all__ = ["DeterministicActions", "GaussianActions"]


@register_latent_actions("gaussian")
class GaussianActions(LatentActions):
    """Independent Gaussians, reparameterized (PreLAR, section 3.2); std = ``2 sigmoid(raw / 2)``.

    Its parameters are mean and standard deviation, ``[..., U, 2]``.

    Args:
        size: number U of variables.
        prior_std: standard deviation of the prior N(0, prior_std^2); the authors' code has
            1.2449187. Default: 1.
    """

    def __init__(self, *, size: int, prior_std: float = 1.0) -> None:
        super().__init__(size=size)
        if not prior_std > 0:
            raise ValueError(f"prior_std={prior_std} must be positive")
        self.latent = Gaussian(size, min_std=0.0)
        self.prior_std = prior_std
        self.num_outputs, self.dim = self.latent.num_outputs, size

    def forward(self, raw: Tensor, sample: bool = True) -> tuple[Tensor, Tensor]:
        params = self.latent.params(raw)
        return self.latent.rsample(params, sample), params

    def kl(self, params: Tensor) -> Tensor:
        """KL from N(0, prior_std^2), summed over the variables."""
        if params.dim() < 2 or params.shape[-1] != 2:
            given = f"latent_action_statistics {list(params.shape)}"
            raise ValueError(f"{given} must be mean and standard deviation, [..., U, 2]")
        prior = torch.zeros_like(params)
        prior[..., 1] = self.prior_std
        return gaussian_kl(params, prior)

    def distance(self, action_a: Tensor, params_a: Tensor, action_b: Tensor, params_b: Tensor):
        """KL of the first distribution from the second."""
        if params_a.shape[:-1] != action_a.shape:
            given = f"latent_action {list(action_a.shape)}, latent_action_statistics"
            raise ValueError(f"{given} {list(params_a.shape)} must be [..., U] and [..., U, 2]")
        return gaussian_kl(params_a, params_b)


@register_latent_actions("deterministic")
class DeterministicActions(LatentActions):
    """The network's output as it is: no distribution, hence no KL.

    Args:
        size: width U.
    """

    def __init__(self, *, size: int) -> None:
        super().__init__(size=size)
        self.num_outputs = self.dim = size

    def forward(self, raw: Tensor, sample: bool = True) -> tuple[Tensor, None]:
        return raw, None
