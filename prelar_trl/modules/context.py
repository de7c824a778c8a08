"""ContextWM: a context encoder and a decoder that attends to it.

One frame per sequence is drawn as the *context*; its feature maps reach the decoder by
cross-attention, so that the latent state need not carry the appearance of the scene.
Source: ContextWM (Wu et al., NeurIPS 2023), section 3.2.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prelar_trl.modules.augmentation import Augmentation, augment
from prelar_trl.modules.convnets import (
    IMAGE_SIZE,
    DecoderLayers,
    Norm,
    ResNetEncoder,
    make_block,
    make_norm,
    make_skip,
)
from prelar_trl.utils import check_choice

__all__ = ["ContextDecoder", "ContextEncoder"]

ATTENTION_BELOW = 32  # resolutions that attend to the context


class ContextEncoder(nn.Module):
    """Feature maps of one random frame per sequence.

    Args:
        depth, stages, layers, norm: of the ResNet, see :class:`ResNetEncoder`.
        in_channels, image_size: of the frames, see :class:`ResNetEncoder`.
        augmentation: of the context frame: ``none``, ``shift`` (by up to 8 pixels), ``shift4``,
            ``flip`` (half of them, horizontally), ``scale`` (random resized crop), ``erasing`` (a
            random rectangle in half of them). Default: ``none``.
    """

    def __init__(
        self,
        depth: int = 48,
        stages: int = 3,
        layers: int = 2,
        norm: Norm = "batch",
        augmentation: Augmentation = "none",
        in_channels: int = 3,
        image_size: int = IMAGE_SIZE,
    ) -> None:
        super().__init__()
        self.net = ResNetEncoder(in_channels, depth, stages, layers, norm, image_size)
        check_choice("augmentation", augmentation, get_args(Augmentation))
        self.augmentation: Augmentation = augmentation

    def forward(self, images: Tensor) -> list[Tensor]:
        """``[B, T, 3, 64, 64]`` -> maps ``[B, C, 32, 32], [B, 2C, 16, 16], [B, 4C, 8, 8]``."""
        index = draw_frames(images.shape[0], images.shape[1], images.device)
        frame = images[torch.arange(images.shape[0], device=images.device), index]
        return self.net.feature_maps(augment(frame, self.augmentation))[:-1]


class ContextLayer(nn.Module):
    """A residual layer that first attends from its positions to those of the context map.

    ``z = relu(x + norm(attention(x, context)))``, then ``relu(skip(x) + block(z))``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        norm: Norm,
        size: int,
        mask: float = 0.75,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.skip = make_skip(in_channels, out_channels, norm, size)
        self.block = make_block(in_channels, out_channels, norm, size)
        self.keep = int(size**2 * (1 - mask))
        self.query_position = nn.Parameter(torch.zeros(size**2, in_channels))
        self.key_position = nn.Parameter(torch.zeros(size**2, in_channels))
        self.attention = nn.MultiheadAttention(in_channels, 4, dropout=dropout, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.attention_norm = nn.Sequential(*make_norm(norm, in_channels, size))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Maps ``x`` ``[B*T, C, H, W]``, context ``[B, C, H, W]`` of the same resolution."""
        z = F.relu(x + self.attention_norm(self.attend(x, context)))
        return F.relu(self.skip(x) + self.block(z))

    def attend(self, x: Tensor, context: Tensor) -> Tensor:
        """From each position of ``x`` to those of the context that are not hidden from it."""
        steps = x.shape[0] // context.shape[0]
        keys = context.flatten(2).transpose(1, 2) + self.key_position  # [B, HW, C]
        # Sequence b's context goes with sequence b's frames; each frame sees its own positions.
        keys = keys.repeat_interleave(steps, 0)  # [B*T, HW, C]
        if self.keep < keys.shape[1]:
            index = draw_positions(keys.shape[0], keys.shape[1], keys.device)[:, : self.keep, None]
            keys = keys.gather(1, index.expand(-1, -1, keys.shape[2]))  # [B*T, keep, C]
        queries = x.flatten(2).transpose(1, 2) + self.query_position
        attended, _ = self.attention(queries, keys, keys, need_weights=False)
        return self.dropout(attended).transpose(1, 2).reshape(x.shape)


class ContextDecoder(DecoderLayers):
    """The ResNet decoder whose even layers at 8x8 and 16x16 attend to the context maps.

    Args:
        mask: share of the context positions hidden from each frame. Default: 0.75.
        dropout: inside and after the attention. Default: 0.1.
        in_features, depth, stages, layers, norm, image_size, out_channels: see
            :class:`DecoderLayers`.
    """

    def __init__(
        self,
        in_features: int,
        depth: int = 48,
        stages: int = 3,
        layers: int = 2,
        norm: Norm = "batch",
        mask: float = 0.75,
        dropout: float = 0.1,
        image_size: int = IMAGE_SIZE,
        out_channels: int = 3,
    ) -> None:
        self.mask, self.attention_dropout = mask, dropout
        super().__init__(in_features, depth, stages, layers, norm, image_size, out_channels)

    def make_layer(
        self, index: int, in_channels: int, out_channels: int, norm: Norm, size: int
    ) -> nn.Module:
        if index % 2 or size >= ATTENTION_BELOW:
            return super().make_layer(index, in_channels, out_channels, norm, size)
        return ContextLayer(
            in_channels, out_channels, norm, size, self.mask, self.attention_dropout
        )

    def forward(self, feat: Tensor, context: list[Tensor]) -> Tensor:
        """Features ``[B*T, F]``, batch major, and maps ``[B, ...]`` -> ``[B*T, 3, H, W]``."""
        x = self.linear_in(feat).unflatten(-1, self.first_map)  # [B*T, C, 4, 4]
        stages = cast(Iterable[nn.Sequential], self.stages)
        for stage, context_map in zip(stages, reversed(context), strict=True):
            x = F.interpolate(x, scale_factor=2.0)
            for layer in stage:
                x = layer(x, context_map) if isinstance(layer, ContextLayer) else layer(x)
        return self.to_images(x)


def draw_frames(batch: int, steps: int, device: torch.device) -> Tensor:
    """Index of the context frame of each sequence, ``[B]``."""
    return torch.randint(steps, (batch,), device=device)


def draw_positions(rows: int, positions: int, device: torch.device) -> Tensor:
    """A random order of the positions for each row, ``[rows, positions]``."""
    return torch.rand(rows, positions, device=device).argsort(1)
