"""The world-model loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.objectives import LossModule

from prelar_trl.collectives import ProcessGroup, joint_mean
from prelar_trl.modules.checks import check_entry
from prelar_trl.modules.pixels import normalize_pixels, to_gray
from prelar_trl.objectives.common import (
    check_range,
    check_weights,
    dispatch,
    loss_keys,
    weighted,
)
from prelar_trl.objectives.functional import balanced_kl, gaussian_nll
from prelar_trl.objectives.latent_action import KL, LatentActionLoss, StateKind, state_kind
from prelar_trl.objectives.video_bonus import VideoBonus
from prelar_trl.types import ClipRewards
from prelar_trl.utils import check_choice

__all__ = ["RSSMWorldModelLoss"]

CLIP_REWARDS: dict[ClipRewards, Callable[[Tensor], Tensor]] = {
    "identity": torch.positive,
    "sign": torch.sign,
    "tanh": torch.tanh,
}


class RSSMWorldModelLoss(LossModule):
    """Negative evidence lower bound of a recurrent world model, plus PreLAR's terms.

    ``sum_i w_i L_i`` over ``image``, ``vector`` and the scalar heads ``reward``, ``aux_reward``,
    ``discount`` (negative log-likelihoods, mean over B and T, sum over pictures and numbers),
    ``kl`` (balanced), ``af_kl`` (of the lower RSSM of a stack) and the terms of a
    :class:`LatentActionLoss`. Source: DreamerV2 section 2, APV section 3, PreLAR section 3.

    A batch is one of frames: ``action`` and ``reward`` at time t are those that led to frame t.
    TorchRL's collectors and ``env.rollout`` give steps, where they leave from it:
    :func:`prelar_trl.data.to_frames` turns steps into frames.

    Args:
        world_model: any TensorDictModule that writes the keys below from a batch ``[B, T]``.
        weights: weight of each term; a term without a weight is not computed. Default:
            ``{"image": 1, "kl": 1}``.
        latent: kind of the state's distribution, ``categorical | gaussian``. Default: that of the
            world model's ``rssm``, if it has one, else ``categorical``.
        kl_balance, free_nats, free_avg: see :func:`functional.balanced_kl`.
        discount: gamma; the target of the ``discount`` head is ``gamma * (1 - terminated)``.
            Default: the world model's own, or 0.99.
        latent_action: PreLAR's terms, computed on the same prediction.
        video_bonus: intrinsic bonus added to the target of ``reward``; the last ``window - 1``
            steps of an episode and of a row, which have none, are then left out. ``aux_reward``
            always sees the plain reward.
        bonus_scale: factor beta of the bonus. Default: 1.
        clip_rewards: ``sign`` or ``tanh`` of the reward is what its heads learn, before any bonus
            (DreamerV2's, for Atari). Default: ``identity``.

    Returns (forward): a TensorDict of ``loss_<term>`` (weighted, scalar); ``<term>`` (unweighted,
    detached) and the mean ``bonus``; and ``state``, the detached posterior states (``stoch``,
    ``deter``, batch ``[B, T]``) from which imagination starts.

    Raises (forward):
        TypeError: ``pixels``, the target of ``image``, are not uint8; ``is_first`` or
            ``terminated`` are not bool, ``reward`` or ``action`` not floating point.
        ValueError: one of the latter has another shape than ``[B, T, 1]``, ``action`` another than
            ``[B, T, A]``, or is empty; ``pixels`` have their channels last.
    """

    @dataclass
    class _AcceptedKeys:
        pixels: NestedKey = "pixels"
        is_first: NestedKey = "is_first"
        vector: NestedKey = "vector"
        reward: NestedKey = "reward"
        terminated: NestedKey = "terminated"
        stoch: NestedKey = "stoch"
        deter: NestedKey = "deter"
        posterior: NestedKey = "posterior"
        prior: NestedKey = "prior"
        lower_posterior: NestedKey = ("lower", "posterior")
        lower_prior: NestedKey = ("lower", "prior")
        prediction: NestedKey = "prediction"
        bonus_embed: NestedKey = "embed"

    default_keys = _AcceptedKeys
    tensor_keys: _AcceptedKeys
    TERMS = ("image", "vector", "kl", "af_kl", "reward", "aux_reward", "discount")
    process_group: ProcessGroup | None = None  # whose processes share the batch

    def __init__(
        self,
        world_model: TensorDictModuleBase,
        *,
        weights: Mapping[str, float] | None = None,
        latent: StateKind | None = None,
        kl_balance: float = 0.8,
        free_nats: float = 0.0,
        free_avg: bool = True,
        discount: float | None = None,
        latent_action: LatentActionLoss | None = None,
        video_bonus: VideoBonus | None = None,
        bonus_scale: float = 1.0,
        clip_rewards: ClipRewards = "identity",
    ) -> None:
        super().__init__()
        self.weights = check_weights(
            {"image": 1.0, "kl": 1.0} if weights is None else weights, self.TERMS
        )
        if discount is None:
            discount = cast(float, getattr(world_model, "discount", 0.99))
        check_range(0, 1, kl_balance=kl_balance, discount=discount)
        check_range(0, free_nats=free_nats, bonus_scale=bonus_scale)
        self.world_model = world_model
        self.divergence = KL[state_kind(latent, getattr(world_model, "rssm", None))]
        self.kl_balance, self.free_nats, self.free_avg = kl_balance, free_nats, free_avg
        self.discount = discount
        for name in () if latent_action is None else latent_action.own_terms:
            if name in self.TERMS:
                raise ValueError(f"a latent action cannot name a loss of its own {name!r}")
        self.latent_action, self.video_bonus = latent_action, video_bonus
        self.bonus_scale = bonus_scale
        check_choice("clip_rewards", clip_rewards, CLIP_REWARDS)
        self.clip_rewards = CLIP_REWARDS[clip_rewards]
        if video_bonus is not None:
            self.set_keys(bonus_embed=video_bonus.embed_key)
        self._set_in_keys()
        terms = [*self.weights, *(["bonus"] if video_bonus is not None else [])]
        own_keys = [] if latent_action is None else latent_action.out_keys
        out_keys: list[Any] = [*loss_keys(self.weights), *terms, *own_keys, "state"]
        self.out_keys = out_keys

    @property
    def functional(self) -> bool:
        return False  # the modules keep their own parameters

    def _set_in_keys(self) -> None:
        keys: list[Any] = list(self.world_model.in_keys)
        if "image" in self.weights:
            keys.append(self.tensor_keys.pixels)
        if "vector" in self.weights:
            keys.append(self.tensor_keys.vector)
        if "reward" in self.weights or "aux_reward" in self.weights:
            keys.append(self.tensor_keys.reward)
        if "discount" in self.weights:
            keys.append(self.tensor_keys.terminated)
        if self.latent_action is not None:  # what the world model does not write: labels
            written = getattr(self.world_model, "out_keys", ())
            keys += [x for x in self.latent_action.in_keys if x not in written]
        self.in_keys = list(dict.fromkeys(keys))

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        keys = self.tensor_keys
        out = self.world_model(tensordict.copy())
        deter = cast(Tensor, out[keys.deter])
        batch = deter.shape[:2]
        if "reward" in self.weights or "aux_reward" in self.weights:
            check_entry(keys.reward, out[keys.reward], "float", (*batch, 1), deter)
        if "discount" in self.weights:
            check_entry(keys.terminated, out[keys.terminated], "bool", (*batch, 1), deter)
        values: dict[str, Tensor] = {}
        for name, prefix in (("kl", ""), ("af_kl", "lower_")):
            if name in self.weights:
                posterior = out[getattr(keys, prefix + "posterior")]
                prior = out[getattr(keys, prefix + "prior")]
                values[name] = balanced_kl(
                    posterior,
                    prior,
                    self.divergence,
                    self.kl_balance,
                    self.free_nats,
                    self.free_avg,
                    mean=self._mean,
                )
        if "image" in self.weights:
            target = normalize_pixels(out[keys.pixels])
            if getattr(self.world_model, "gray", False):
                target = to_gray(target)
            values["image"] = gaussian_nll(self._prediction(out, "pixels"), target, 3).mean()
        if "vector" in self.weights:
            prediction = self._prediction(out, "vector")
            values["vector"] = gaussian_nll(prediction, out[keys.vector], 1).mean()
        if "reward" in self.weights:
            target, counts = self.clip_rewards(out[keys.reward]), 1.0
            if self.video_bonus is not None:
                is_first = out.get(keys.is_first, None)
                bonus = self.video_bonus(out[keys.bonus_embed], is_first)  # [B, T-window+1]
                if is_first is not None:
                    counts = self.video_bonus.within_episodes(is_first).to(bonus.dtype)
                    counts = counts / self._mean(counts).clamp_min(1e-6)
                values["bonus"] = (bonus * counts).mean()
                target = target[:, : bonus.shape[1]] + self.bonus_scale * bonus.unsqueeze(-1)
            prediction = self._prediction(out, "reward")[:, : target.shape[1]]
            values["reward"] = (gaussian_nll(prediction, target) * counts).mean()
        if "aux_reward" in self.weights:
            prediction = self._prediction(out, "aux_reward")
            target = self.clip_rewards(out[keys.reward])
            values["aux_reward"] = gaussian_nll(prediction, target).mean()
        if "discount" in self.weights:
            logits = self._prediction(out, "discount")
            target = self.discount * (~out[keys.terminated]).to(logits.dtype)
            values["discount"] = F.binary_cross_entropy_with_logits(logits, target)
        losses = weighted(values, self.weights)
        if self.latent_action is not None:
            losses.update(self.latent_action(out))
        state = {"stoch": out[keys.stoch], "deter": out[keys.deter]}
        losses["state"] = TensorDict(state, batch_size=out.batch_size).detach()
        return losses

    def _mean(self, x: Tensor) -> Tensor:
        return joint_mean(x.mean(), self.process_group)

    def _prediction(self, out: TensorDictBase, head: str) -> Tensor:
        key = self.tensor_keys.prediction
        return out[(key, head) if isinstance(key, str) else (*key, head)]
