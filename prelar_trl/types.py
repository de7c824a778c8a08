"""Closed sets of names that networks, losses, environments and settings have in common."""

from __future__ import annotations

from typing import Literal

__all__ = ["Augmentation", "Backend", "ConsistencyMode", "FrameInput", "Norm", "RenderQuality"]

Augmentation = Literal["none", "shift", "shift4", "flip", "scale", "erasing"]
Backend = Literal["csv", "tensorboard", "wandb"]
ConsistencyMode = Literal["soft", "sign", "soft_rank", "gated"]
FrameInput = Literal["concat", "diff", "catdiff", "flow"]
Norm = Literal["batch", "layer", "group", "none"]
RenderQuality = Literal["fast", "full"]
