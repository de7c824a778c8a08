"""Closed sets of names, and shapes, that networks, losses, environments and settings share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = [
    "Augmentation",
    "Backend",
    "ClipRewards",
    "ConsistencyMode",
    "FrameInput",
    "Inputs",
    "Norm",
    "RenderQuality",
]

Augmentation = Literal["none", "shift", "shift4", "flip", "scale", "erasing"]
Backend = Literal["csv", "tensorboard", "wandb"]
ClipRewards = Literal["identity", "sign", "tanh"]
ConsistencyMode = Literal["soft", "sign", "soft_rank", "gated"]
FrameInput = Literal["concat", "diff", "catdiff", "flow"]
Norm = Literal["batch", "layer", "group", "none"]
RenderQuality = Literal["fast", "full"]


@dataclass(frozen=True)
class Inputs:
    """What a world model sees at a step.

    Args:
        size: height and width of a picture.
        views: number V of pictures, one behind the other along the channels of ``pixels``.
        vector: size of ``vector``; 0: there is none.
    """

    size: int = 64
    views: int = 1
    vector: int = 0
