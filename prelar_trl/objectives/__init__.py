"""Losses: TorchRL ``LossModule`` objects around the pure functions of :mod:`functional`."""

from prelar_trl.objectives import functional
from prelar_trl.objectives.behavior import ActorLoss, CriticLoss, LambdaTarget
from prelar_trl.objectives.common import total_loss
from prelar_trl.objectives.latent_action import LatentActionLoss
from prelar_trl.objectives.video_bonus import VideoBonus
from prelar_trl.objectives.world_model import RSSMWorldModelLoss

__all__ = [
    "ActorLoss",
    "CriticLoss",
    "LambdaTarget",
    "LatentActionLoss",
    "VideoBonus",
    "RSSMWorldModelLoss",
    "functional",
    "total_loss",
]
