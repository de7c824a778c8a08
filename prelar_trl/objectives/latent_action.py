"""PreLAR's losses on latent actions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torch.func import functional_call
from torchrl.objectives import LossModule

from prelar_trl.collectives import ProcessGroup, from_first, gather, joint_mean, own_rows
from prelar_trl.modules.checks import check_entry, check_input
from prelar_trl.modules.distributions import categorical_kl, gaussian_kl
from prelar_trl.modules.latent_actions import GaussianActions, LatentActions
from prelar_trl.objectives import functional as F
from prelar_trl.objectives.common import (
    check_range,
    check_weights,
    dispatch,
    loss_keys,
    weighted,
)
from prelar_trl.utils import check_choice, check_integers

__all__ = ["LatentActionLoss"]

StateKind = Literal["categorical", "gaussian"]
KL: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "categorical": categorical_kl,
    "gaussian": gaussian_kl,
}


def state_kind(given: StateKind | None, rssm: object) -> StateKind:
    """The kind of the states' distribution: as given, or that of the RSSM, or categorical.

    Raises:
        ValueError: the RSSM says another one than is given, or there is none of that name.
    """
    own: StateKind | None = getattr(getattr(rssm, "latent", None), "kind", None)
    kind = given or own or "categorical"
    check_choice("latent", kind, KL)
    if own not in (None, kind):
        raise ValueError(f"latent={given!r}, but the states of the model are {own}")
    return kind


class LatentActionLoss(LossModule):
    """What trains latent actions (PreLAR, sections 3.2 and 3.3), besides the prediction itself.

    From each posterior state the dynamics is stepped with latent actions of *other* sequences of
    the batch; what those actions change, and how much, is compared with how different they are::

        posterior t-1  -- own action u_t -------> prior t           (already in the batch)
                       -- another's action -----> shuffled prior t

    Usable on the output of any TensorDictModule with matching keys (see :meth:`set_keys`). A row is
    frames of one episode: it knows no ``is_first`` but that of t = 0.

    Args:
        dynamics: module called as ``dynamics(stoch, deter, action) -> prior statistics``, such as
            ``world_model.rssm``. States are ``[N, ...]``, actions ``[N, U]``.
        latent_actions: the kind of latent action: its KL, distance and own losses. Default:
            Gaussian ones with the prior N(0, 1), of any size.
        weights: weight of ``latent_kl``, ``action_state_consistency``, ``action_contrast``,
            ``action_label`` and of the kind's own losses. Of the first four, a term without a
            weight is not computed; one of the kind's own has the weight that the kind names, and
            ``None`` removes it. Default: 1 for the first two.
        latent: kind of the state's distribution, ``categorical | gaussian``. Default: that of
            ``dynamics``, if it is an :class:`RSSM`, else ``categorical``.
        consistency: mode of :func:`functional.action_state_consistency`. Default: ``soft``.
        free_nats: below this mean KL, ``latent_kl`` gives no gradient. Default: 0.
        warmup: training calls over which the weight of ``latent_kl`` rises, geometrically, from
            ``warmup_start`` times its value to all of it: latent actions are used before they are
            squeezed. Default: 0.
        warmup_start: default 0.01.
        negatives: number K of other actions a transition is contrasted with. Default: 4.
        temperature: of the contrast; None makes it learnable, from 1. Default: 1.
        contrast_dynamics: let the contrast's gradient reach the dynamics too. Default: True.
        action_dim: size A of the true actions of ``action_label``. Default: none.

    Returns (forward): a TensorDict of ``loss_<term>`` (weighted) and, detached, ``<term>``,
    ``consistency_sign``, ``contrast_accuracy``, ``contrast_chance``, the kind's metrics.

    Raises:
        ValueError: a weight of an unknown term, a number out of its range.

    Raises (forward):
        KeyError, TypeError, ValueError: an entry is missing, of another type, or of another shape
            or device than the others.
    """

    @dataclass
    class _AcceptedKeys:
        """Batch ``[B, T]``. Parameters and latent actions at t = 0 are not used."""

        stoch: NestedKey = "stoch"
        deter: NestedKey = "deter"
        posterior: NestedKey = "posterior"
        prior: NestedKey = "prior"
        latent_action: NestedKey = "latent_action"
        latent_action_statistics: NestedKey = "latent_action_statistics"
        action: NestedKey = "action"
        labeled: NestedKey = "labeled"

    default_keys = _AcceptedKeys
    tensor_keys: _AcceptedKeys
    calls: Tensor  # updates so far
    TERMS = ("latent_kl", "action_state_consistency", "action_contrast", "action_label")
    process_group: ProcessGroup | None = None  # whose processes share the batch

    def __init__(
        self,
        dynamics: nn.Module,
        latent_actions: LatentActions | None = None,
        *,
        weights: Mapping[str, float | None] | None = None,
        latent: StateKind | None = None,
        consistency: F.ConsistencyMode = "soft",
        free_nats: float = 0.0,
        warmup: int = 0,
        warmup_start: float = 0.01,
        negatives: int = 4,
        temperature: float | None = 1.0,
        contrast_dynamics: bool = True,
        action_dim: int | None = None,
    ) -> None:
        super().__init__()
        if weights is None:
            weights = {"latent_kl": 1.0, "action_state_consistency": 1.0}
        if weights.get("action_label") is not None and action_dim is None:
            raise ValueError("action_label needs action_dim, the size of the true actions")
        if latent_actions is None:
            if weights.get("action_label") is not None:
                raise ValueError("action_label needs latent_actions, whose size its head reads")
            latent_actions = GaussianActions(size=1)  # its KL and distance know no size
        outputs = latent_actions.outputs()
        for name in outputs.losses:
            if name in self.TERMS:
                raise ValueError(f"a latent action cannot name a loss of its own {name!r}")
        own = {name: latent_actions.default_weights.get(name, 1.0) for name in outputs.losses}
        chosen = {name: x for name, x in {**own, **weights}.items() if x is not None}
        self.weights = check_weights(chosen, (*self.TERMS, *outputs.losses))
        if not outputs.has_params:
            self.weights.pop("latent_kl", None)
        check_range(0, free_nats=free_nats)
        check_integers(0, warmup=warmup)
        check_integers(negatives=negatives)
        check_choice("consistency", consistency, get_args(F.ConsistencyMode))
        if temperature is not None:
            F.check_temperature(temperature)
        if "action_contrast" in self.weights and not isinstance(dynamics, nn.Module):
            kind = type(dynamics).__name__
            raise TypeError(f"dynamics is {kind}; action_contrast needs a torch.nn.Module")
        if not 0 < warmup_start <= 1:
            raise ValueError(f"warmup_start={warmup_start} must lie in (0, 1]")
        self.dynamics = dynamics
        self.latent_actions: LatentActions = latent_actions
        self.latent_divergence = KL[state_kind(latent, dynamics)]
        self.own_terms, self.own_metrics = outputs.losses, outputs.metrics
        self.has_params = outputs.has_params
        self.consistency: F.ConsistencyMode = consistency
        self.free_nats = free_nats
        self.warmup, self.warmup_start = warmup, warmup_start
        self.negatives, self.contrast_dynamics = negatives, contrast_dynamics
        self.register_buffer("calls", torch.zeros((), dtype=torch.float32))
        self.log_temperature = None
        if temperature is None:
            self.log_temperature = nn.Parameter(torch.zeros(()))
        self.temperature = 1.0 if temperature is None else temperature
        self.label_head = None
        if "action_label" in self.weights:
            assert action_dim is not None
            self.label_head = nn.Linear(latent_actions.dim, action_dim)
        self._set_in_keys()
        metrics = [*self.weights, *outputs.metrics]
        if "action_state_consistency" in self.weights:
            metrics.append("consistency_sign")
        if "action_contrast" in self.weights:
            metrics += ["contrast_accuracy", "contrast_chance"]
        self.out_keys = [*loss_keys(self.weights), *metrics]

    @property
    def functional(self) -> bool:
        return False  # the modules keep their own parameters

    def _set_in_keys(self) -> None:
        keys, weights = self.tensor_keys, self.weights
        consistency, contrast = (
            x in weights for x in ("action_state_consistency", "action_contrast")
        )
        own = bool(self.own_metrics) or any(name in weights for name in self.own_terms)
        in_keys: list[Any] = []
        if self.has_params and (consistency or own or "latent_kl" in weights):
            in_keys.append(keys.latent_action_statistics)
        if consistency or contrast or own or self.label_head is not None:
            in_keys.append(keys.latent_action)
        if consistency or contrast:
            in_keys += [keys.stoch, keys.deter]
        if consistency:
            in_keys.append(keys.prior)
        if contrast:
            in_keys.append(keys.posterior)
        if self.label_head is not None:
            in_keys += [keys.action, keys.labeled]
        self.in_keys = in_keys

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        self._check(tensordict)
        keys, weights = self.tensor_keys, self.weights
        values: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        action = params = None  # [B, T-1, U] and [B, T-1, ...]
        if keys.latent_action in self.in_keys:
            action = tensordict[keys.latent_action][:, 1:]
        if keys.latent_action_statistics in self.in_keys:
            params = tensordict[keys.latent_action_statistics][:, 1:]
        if "latent_kl" in weights:
            values["latent_kl"] = joint_mean(
                self.latent_actions.kl(params).mean(), self.process_group
            )
        if "action_state_consistency" in weights:
            terms = self._consistency(tensordict, action, params)
            values["action_state_consistency"], metrics["consistency_sign"] = terms
        if "action_contrast" in weights:
            contrast, accuracy = self._contrast(tensordict, action)
            values["action_contrast"], metrics["contrast_accuracy"] = contrast, accuracy
            metrics["contrast_chance"] = torch.full_like(accuracy, math.log(1 + self.negatives))
        if self.label_head is not None:
            check_input(
                str(keys.latent_action), action, self.label_head.weight, self.label_head.in_features
            )
            values["action_label"] = self._label(tensordict, self.label_head(action))
        if any(name in weights for name in self.own_terms):
            own = self.latent_actions.extra_losses(action, params)
            values |= {name: x for name, x in own.items() if name in weights}
        if self.own_metrics:
            metrics |= self.latent_actions.metrics(action, params)
        losses = weighted(values, weights).update({k: x.detach() for k, x in metrics.items()})
        if "loss_latent_kl" in losses.keys():
            kl = values["latent_kl"].clamp_min(self.free_nats)
            losses["loss_latent_kl"] = weights["latent_kl"] * self._warmup_factor() * kl
        if self.training:
            self.calls.add_(1)
        return losses

    def _check(self, tensordict: TensorDictBase) -> None:
        """Raise where an entry that is read is missing, or of another type, shape or device."""
        keys = self.tensor_keys
        shapes: dict[NestedKey, tuple[int | str, ...]] = {
            keys.latent_action: ("U",),
            keys.latent_action_statistics: ("U", "..."),
            keys.stoch: ("S", "..."),
            keys.deter: ("D",),
            keys.posterior: ("S", "K"),
            keys.prior: ("S", "K"),
            keys.action: ("A",) if self.label_head is None else (self.label_head.out_features,),
            keys.labeled: (1,),
        }
        batch: tuple[int | str, ...] = ("B", "T")
        first: Tensor | None = None
        for key in self.in_keys:
            value = cast(Tensor, tensordict[key])
            kind = "bool" if key == keys.labeled else "float"
            beside = None if first is None else self.in_keys[0]
            check_entry(key, value, kind, (*batch, *shapes[key]), first, beside)
            if first is None:
                first, batch = value, tuple(value.shape[:2])
        if first is not None and first.shape[1] < 2:
            raise ValueError(f"{self.in_keys[0]} {list(first.shape)}: a transition needs 2 steps")

    def _warmup_factor(self) -> Tensor | float:
        """What the weight of ``latent_kl`` is multiplied by now."""
        if not self.warmup:
            return 1.0
        return self.warmup_start ** (1 - (self.calls / self.warmup).clamp_max(1.0))

    def draw_permutation(self, batch: int, device: torch.device) -> Tensor:
        """A random order of the sequences, ``[B]``."""
        # Not randperm, by which inductor cannot index (torch 2.13).
        order = torch.rand(batch, device=device).argsort()
        return from_first(order, self.process_group)

    def draw_others(self, batch: int, device: torch.device) -> Tensor:
        """``negatives`` other sequences for each, ``[K, B]``, all different while K < B."""
        if batch < 2:
            raise ValueError("action_contrast compares sequences, but the batch has only one")
        order = self.draw_permutation(batch, device)  # in a circle; the others lie further on
        ahead = 1 + torch.arange(self.negatives, device=device) % (batch - 1)
        return order[(order.argsort() + ahead[:, None]) % batch]

    def _consistency(
        self, tensordict: TensorDictBase, action: Tensor, params: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The consistency of the chosen mode, and that of mode ``sign``."""
        keys = self.tensor_keys
        stoch, deter = self._states(tensordict)
        prior = cast(Tensor, tensordict[keys.prior])[:, 1:].flatten(0, 1)  # [N, S, K], N = B*(T-1)
        group = self.process_group
        everyone = gather(action, group)  # of the joint batch, [B', T-1, U]
        order = self.draw_permutation(len(everyone), action.device)
        itself = order == torch.arange(len(order), device=order.device)
        order, itself = own_rows(order, group), own_rows(itself, group)  # [B]
        other = everyone[order]
        with torch.no_grad():  # the state divergence is never differentiated
            shuffled = self.dynamics(stoch, deter, other.detach().flatten(0, 1))
            check_entry("output of the dynamics", shuffled, "float", prior.shape, prior, keys.prior)
            p = self.latent_divergence(prior, shuffled).unflatten(0, action.shape[:2])
            # Exchanged for itself an action changes nothing: zero, without rounding noise,
            # whose signs would count as an ordering.
            p = gather(p.masked_fill(itself[:, None], 0.0).flatten(), group)
        other_params = None if params is None else gather(params, group)[order]
        q = self.latent_actions.distance(action, params, other, other_params).flatten()
        q = gather(q, group)
        loss = F.action_state_consistency(p, q, self.consistency)
        return loss, F.action_state_consistency(p, q.detach(), "sign")

    def _contrast(self, tensordict: TensorDictBase, action: Tensor) -> tuple[Tensor, Tensor]:
        """InfoNCE over own and other actions, and how often the own explains best."""
        keys = self.tensor_keys
        stoch, deter = self._states(tensordict)
        posterior = cast(Tensor, tensordict[keys.posterior])[:, 1:].flatten(0, 1).detach()
        # The own action is stepped anew too: all candidates start from the same state.
        everyone = gather(action, self.process_group)  # of the joint batch, [B', T-1, U]
        others = self.draw_others(len(everyone), action.device).T  # [B', K]
        others = everyone[own_rows(others, self.process_group).T]  # [K, B, T-1, U]
        candidates = torch.cat([action[None], others]).flatten(0, 2)
        count = 1 + self.negatives
        parameters: dict[str, Tensor] = dict(self.dynamics.named_parameters())
        if not self.contrast_dynamics:  # neither by its weights nor by the states it led to
            parameters = {name: x.detach() for name, x in parameters.items()}
            stoch, deter = stoch.detach(), deter.detach()
        repeated = (x.repeat(count, *[1] * (x.dim() - 1)) for x in (stoch, deter))
        predicted = functional_call(self.dynamics, parameters, (*repeated, candidates))
        shape = (len(candidates), *posterior.shape[1:])
        check_entry("output of the dynamics", predicted, "float", shape, posterior)
        kl = [self.latent_divergence(posterior, x) for x in predicted.chunk(count)]
        kl = torch.stack(kl, 1)  # [N, 1+K]
        temperature: Tensor | float = self.temperature
        if self.log_temperature is not None:
            temperature = self.log_temperature.exp()
        accuracy = (kl[:, :1] < kl[:, 1:]).all(1).float().mean()
        return F.action_contrast(kl, temperature), accuracy

    def _label(self, tensordict: TensorDictBase, predicted: Tensor) -> Tensor:
        """Mean squared error of the true actions, read linearly, where they are known."""
        keys = self.tensor_keys
        true, known = tensordict[keys.action][:, 1:], tensordict[keys.labeled][:, 1:]
        true = torch.where(known, true, predicted.detach())  # anything may stand there, NaN too
        error = (predicted - true).square().mean(-1, keepdim=True)  # [B, T-1, 1]
        count = joint_mean(known.sum().to(error.dtype), self.process_group)
        return error.sum() / count.clamp_min(1e-6)

    def _states(self, tensordict: TensorDictBase) -> tuple[Tensor, Tensor]:
        """The states before each transition, ``[N, ...]``."""
        keys = self.tensor_keys
        stoch, deter = tensordict[keys.stoch], tensordict[keys.deter]
        return stoch[:, :-1].flatten(0, 1), deter[:, :-1].flatten(0, 1)
