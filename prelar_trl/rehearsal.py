"""Pre-training video that fine-tuning rehearses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from tensordict import TensorDict, TensorDictBase
from torch import nn

from prelar_trl.modules.actions import LatentActionEncoder
from prelar_trl.modules.world_model import RSSMWorldModel
from prelar_trl.objectives import RSSMWorldModelLoss
from prelar_trl.objectives.common import loss_keys

__all__ = ["Rehearsal"]


@contextmanager
def running_statistics_kept(module: nn.Module) -> Iterator[None]:
    """Batch norms in training mode leave their running mean and variance as they are."""
    norms = [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)]
    before = [layer.momentum for layer in norms]
    for layer in norms:
        layer.momentum = 0.0
    try:
        yield
    finally:
        for layer, momentum in zip(norms, before, strict=True):
            layer.momentum = momentum


class Rehearsal(nn.Module):
    """Pre-training video beside an environment's batch, so that what it taught is not forgotten.

    The terms that video can give, ``image`` and ``kl``, become those of the joint batch: their mean
    over the environment's rows and over the video's, by ``share``; free nats are each part's own.
    Batch norms normalize each part by itself; their running statistics, with which the agent acts,
    are the environment's alone.

    Args:
        loss: of the world model that is fine-tuned. Encoder, decoder and RSSM are shared, and so
            are weights and settings of the two terms.
        inverse_model: infers the video's latent actions, and stands still; None for a world model
            that was pre-trained without actions.
        share: the video's share of the joint batch, in (0, 1).

    Raises:
        ValueError: a share outside (0, 1), or a stacked world model, whose imagined RSSM no video
            trains.
    """

    def __init__(
        self, loss: RSSMWorldModelLoss, inverse_model: LatentActionEncoder | None, share: float
    ) -> None:
        super().__init__()
        world_model = cast(RSSMWorldModel, loss.world_model)
        if not 0 < share < 1:
            raise ValueError(f"rehearse={share} must lie between 0 and 1")
        if world_model.lower_rssm is not None:
            raise ValueError(f"rehearse={share}: a stacked world model cannot rehearse video")
        self.share, self.inverse_model = share, inverse_model
        video_model = RSSMWorldModel(
            world_model.encoder,
            world_model.decoder,
            world_model.rssm,
            latent_action_encoder=inverse_model,
            action_free=inverse_model is None,
            context_encoder=world_model.context_encoder,
            gray=world_model.gray,
            sample=world_model.sample,
        )
        self.loss = RSSMWorldModelLoss(
            video_model,
            weights={name: loss.weights[name] for name in ("image", "kl") if name in loss.weights},
            kl_balance=loss.kl_balance,
            free_nats=loss.free_nats,
            free_avg=loss.free_avg,
        )

    def train(self, mode: bool = True) -> Rehearsal:
        super().train(mode)
        if self.inverse_model is not None:
            self.inverse_model.eval()
        return self

    def forward(self, losses: TensorDict, video: TensorDictBase) -> TensorDict:
        """The environment's losses with the video's mixed in."""
        with running_statistics_kept(self.loss):
            seen = self.loss(video)
        mixed = losses.copy()
        for name in loss_keys(self.loss.weights):
            mixed[name] = torch.lerp(losses[name], seen[name], self.share)
        for name in self.loss.weights:
            mixed[f"rehearsal_{name}"] = seen[name]
        return mixed
