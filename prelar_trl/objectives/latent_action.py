"""PreLAR's losses on latent actions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import dispatch
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torch.func import functional_call
from torchrl.objectives import LossModule

from prelar_trl.modules.distributions import at_least_float32, categorical_kl, gaussian_kl
from prelar_trl.objectives import functional as F
from prelar_trl.objectives.common import check_weights, loss_keys, weighted

__all__ = ["LatentActionLoss"]

Kind = Literal["categorical", "gaussian"]
KL: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "categorical": categorical_kl,
    "gaussian": gaussian_kl,
}


class LatentActionLoss(LossModule):
    """Latent KL, action-state consistency and action contrast (PreLAR, sections 3.2 and 3.3).

    From each posterior state the dynamics is stepped with latent actions of *other* sequences of
    the batch; what those actions change, and how much, is compared with how different they are::

        posterior t-1  -- own action u_t -------> prior t           (already in the batch)
                       -- another's action -----> shuffled prior t

    Usable on the output of any TensorDictModule with matching keys (see :meth:`set_keys`).

    Args:
        dynamics: module called as ``dynamics(stoch, deter, action) -> prior statistics``, such as
            ``world_model.rssm``. States are ``[N, ...]``, actions ``[N, U]``.
        weights: weight of ``latent_kl``, ``action_state_consistency`` and ``action_contrast``; a
            term without a weight is not computed. Default: 1 for the first two.
        latent: kind of the state's distribution. Default: ``categorical``.
        action: kind of the latent action's distribution, ``None`` for deterministic ones (which
            have no ``latent_kl`` and are compared by squared distance). Default: ``gaussian``.
        consistency: mode of :func:`functional.action_state_consistency`. Default: ``soft``.
        prior_std: std of the latent action's prior; the authors' code has 1.2449187. Default: 1.
        negatives: number K of other actions a transition is contrasted with. Default: 4.
        temperature: of the contrast; None makes it learnable, from 1. Default: 1.
        contrast_dynamics: let the contrast's gradient reach the dynamics too. Default: True.

    Returns (forward): a TensorDict of ``loss_<term>`` (weighted) and, detached, ``<term>``,
    ``consistency_sign``, ``contrast_accuracy``, ``contrast_chance``.
    """

    @dataclass
    class _AcceptedKeys:
        """Batch ``[B, T]``. Statistics and latent actions at t = 0 are not used."""

        stoch: NestedKey = "stoch"
        deter: NestedKey = "deter"
        posterior: NestedKey = "posterior"
        prior: NestedKey = "prior"
        latent_action: NestedKey = "latent_action"
        latent_action_statistics: NestedKey = "latent_action_statistics"

    default_keys = _AcceptedKeys
    tensor_keys: _AcceptedKeys
    TERMS = ("latent_kl", "action_state_consistency", "action_contrast")

    def __init__(
        self,
        dynamics: nn.Module,
        *,
        weights: Mapping[str, float] | None = None,
        latent: Kind = "categorical",
        action: Kind | None = "gaussian",
        consistency: F.ConsistencyMode = "soft",
        prior_std: float = 1.0,
        negatives: int = 4,
        temperature: float | None = 1.0,
        contrast_dynamics: bool = True,
    ) -> None:
        super().__init__()
        if weights is None:
            weights = {"latent_kl": 1.0, "action_state_consistency": 1.0}
        self.weights = check_weights(weights, self.TERMS)
        if action is None:
            self.weights.pop("latent_kl", None)
        if prior_std <= 0:
            raise ValueError(f"prior_std={prior_std} must be positive")
        if negatives < 1:
            raise ValueError(f"negatives={negatives}: the contrast needs at least 1")
        self.dynamics = dynamics
        self.latent_divergence, self.action_kind = KL[latent], action
        self.consistency, self.prior_std = consistency, prior_std
        self.negatives, self.contrast_dynamics = negatives, contrast_dynamics
        self.log_temperature = None
        if temperature is None:
            self.log_temperature = nn.Parameter(torch.zeros(()))
        self.temperature = temperature
        self._set_in_keys()
        metrics = list(self.weights)
        if "action_state_consistency" in metrics:
            metrics.append("consistency_sign")
        if "action_contrast" in metrics:
            metrics += ["contrast_accuracy", "contrast_chance"]
        self.out_keys = [*loss_keys(self.weights), *metrics]

    @property
    def functional(self) -> bool:
        return False  # the modules keep their own parameters

    def _set_in_keys(self) -> None:
        keys, self.in_keys = self.tensor_keys, []
        consistency = "action_state_consistency" in self.weights
        if self.action_kind is not None and (consistency or "latent_kl" in self.weights):
            self.in_keys.append(keys.latent_action_statistics)
        if consistency or "action_contrast" in self.weights:
            self.in_keys += [keys.latent_action, keys.stoch, keys.deter]
        if consistency:
            self.in_keys.append(keys.prior)
        if "action_contrast" in self.weights:
            self.in_keys.append(keys.posterior)

    def _forward_value_estimator_keys(self, **kwargs: NestedKey) -> None:
        self._set_in_keys()

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        keys = self.tensor_keys
        out: dict[str, Tensor] = {}
        statistics = None
        if self.tensor_keys.latent_action_statistics in self.in_keys:
            statistics = tensordict[keys.latent_action_statistics][:, 1:]  # [B, T-1, ...]
        if "latent_kl" in self.weights:
            out["latent_kl"] = self.latent_kl(statistics).mean()
        if "action_state_consistency" in self.weights or "action_contrast" in self.weights:
            out |= self._shuffled_terms(tensordict, statistics)
        return weighted(out, self.weights)

    def latent_kl(self, statistics: Tensor) -> Tensor:
        """KL of the latent actions from their prior (Gaussian: N(0, prior_std^2), else uniform)."""
        reference = torch.zeros_like(statistics)
        if self.action_kind == "categorical":
            return categorical_kl(statistics, reference)
        reference[..., 1] = self.prior_std
        return gaussian_kl(statistics, reference)

    def draw_permutation(self, batch: int, device: torch.device) -> Tensor:
        """A random order of the sequences, ``[B]``."""
        # Not randperm, by which inductor cannot index (torch 2.13).
        return torch.rand(batch, device=device).argsort()

    def draw_others(self, batch: int, device: torch.device) -> Tensor:
        """``negatives`` other sequences for each, ``[K, B]``, all different while K < B."""
        if batch < 2:
            raise ValueError("action_contrast compares sequences, but the batch has only one")
        order = self.draw_permutation(batch, device)  # in a circle; the others lie further on
        ahead = 1 + torch.arange(self.negatives, device=device) % (batch - 1)
        return order[(order.argsort() + ahead[:, None]) % batch]

    def _shuffled_terms(
        self, tensordict: TensorDictBase, statistics: Tensor | None
    ) -> dict[str, Tensor]:
        keys, out = self.tensor_keys, {}
        action = tensordict[keys.latent_action][:, 1:]  # [B, T-1, U]
        stoch = tensordict[keys.stoch][:, :-1].flatten(0, 1)  # [N, S, K], N = B*(T-1)
        deter = tensordict[keys.deter][:, :-1].flatten(0, 1)
        batch = action.shape[0]
        if "action_state_consistency" in self.weights:
            prior = tensordict[keys.prior][:, 1:].flatten(0, 1)  # [N, S, K]
            order = self.draw_permutation(batch, action.device)
            with torch.no_grad():  # the state divergence is never differentiated
                shuffled = self.dynamics(stoch, deter, action[order].flatten(0, 1))
                p = self.latent_divergence(prior, shuffled).unflatten(0, action.shape[:2])
                # Exchanged for itself an action changes nothing: zero, without rounding noise,
                # whose signs would count as an ordering.
                itself = order == torch.arange(batch, device=order.device)
                p = p.masked_fill(itself[:, None], 0.0).flatten()
            q = self._action_divergence(action, statistics, order)
            out["action_state_consistency"] = F.action_state_consistency(p, q, self.consistency)
            out["consistency_sign"] = F.action_state_consistency(p, q.detach(), "sign")
        if "action_contrast" in self.weights:
            posterior = tensordict[keys.posterior][:, 1:].flatten(0, 1).detach()
            # The own action is stepped anew too: all candidates start from the same state.
            others = action[self.draw_others(batch, action.device)]  # [K, B, T-1, U]
            candidates = torch.cat([action[None], others]).flatten(0, 2)
            count = 1 + self.negatives
            parameters = dict(self.dynamics.named_parameters())
            if not self.contrast_dynamics:  # neither by its weights nor by the states it led to
                parameters = {name: x.detach() for name, x in parameters.items()}
                stoch, deter = stoch.detach(), deter.detach()
            repeated = (x.repeat(count, *[1] * (x.dim() - 1)) for x in (stoch, deter))
            predicted = functional_call(self.dynamics, parameters, (*repeated, candidates))
            kl = [self.latent_divergence(posterior, x) for x in predicted.chunk(count)]
            kl = torch.stack(kl, 1)  # [N, 1+K]
            temperature = self.temperature
            if self.log_temperature is not None:
                temperature = self.log_temperature.exp()
            out["action_contrast"] = F.action_contrast(kl, temperature)
            out["contrast_accuracy"] = (kl[:, :1] < kl[:, 1:]).all(1).float().mean()
            out["contrast_chance"] = torch.full_like(
                out["contrast_accuracy"], math.log(1 + self.negatives)
            )
        return out

    def _action_divergence(
        self, action: Tensor, statistics: Tensor | None, order: Tensor
    ) -> Tensor:
        """How different each action is from the one it was exchanged for, ``[N]``."""
        if statistics is None:
            action = at_least_float32(action)
            return (action - action[order]).square().sum(-1).flatten()
        return KL[self.action_kind](statistics, statistics[order]).flatten()
