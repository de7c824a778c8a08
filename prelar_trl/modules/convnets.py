"""Image encoders and decoders: ResNets (APV, PreLAR) and DreamerV2's plain CNN.

Encoders map images ``[N, C, 64, 64]`` in [-0.5, 0.5] to embeddings ``[N, E]``; decoders map
features ``[N, F]`` to image means ``[N, 3, 64, 64]``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import get_args

import torch.nn.functional as F
from torch import Tensor, nn

from prelar_trl.types import Norm
from prelar_trl.utils import check_choice

__all__ = ["IMAGE_SIZE", "CNNDecoder", "CNNEncoder", "ResNetDecoder", "ResNetEncoder"]

IMAGE_SIZE = 64


def make_norm(norm: Norm, channels: int, size: int) -> list[nn.Module]:
    """Normalization of ``[N, channels, size, size]`` maps: a list of no or one module."""
    check_choice("norm", norm, get_args(Norm))
    match norm:
        case "batch":
            return [nn.BatchNorm2d(channels)]
        case "layer":
            return [nn.LayerNorm([channels, size, size])]
        case "group":
            return [nn.GroupNorm(math.gcd(8, channels), channels)]
        case "none":
            return []


def make_skip(in_channels: int, out_channels: int, norm: Norm, size: int) -> nn.Sequential:
    """Identity, or conv1x1 -> norm where the number of channels changes."""
    if in_channels == out_channels:
        return nn.Sequential()
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, bias=False), *make_norm(norm, out_channels, size)
    )


def make_block(in_channels: int, out_channels: int, norm: Norm, size: int) -> nn.Sequential:
    """conv3x3 -> norm -> ReLU -> conv3x3 -> norm."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        *make_norm(norm, out_channels, size),
        nn.ReLU(),
        nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
        *make_norm(norm, out_channels, size),
    )


class ResidualLayer(nn.Module):
    """``relu(skip(x) + [conv3x3 -> norm -> relu -> conv3x3 -> norm](x))``.

    ``skip`` is the identity, or conv1x1 and norm where the number of channels changes.
    """

    def __init__(self, in_channels: int, out_channels: int, norm: Norm, size: int) -> None:
        super().__init__()
        self.skip = make_skip(in_channels, out_channels, norm, size)
        self.block = make_block(in_channels, out_channels, norm, size)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.skip(x) + self.block(x))


class ResNetEncoder(nn.Module):
    """Strided convolution to 32x32, then ``stages`` of residual layers and 2x2 average pooling.

    Args:
        in_channels: image channels.
        depth: channels of the first stage, doubled at each following one. Default: 48.
        stages: number of stages. Default: 3.
        layers: residual layers a stage. Default: 2.
        norm: ``batch | layer | group | none``. Default: ``batch``.
    """

    def __init__(
        self,
        in_channels: int = 3,
        depth: int = 48,
        stages: int = 3,
        layers: int = 2,
        norm: Norm = "batch",
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, depth, 3, stride=2, padding=1)
        self.stages = nn.ModuleList()
        channels, size = depth, IMAGE_SIZE // 2
        for stage in range(stages):
            widths = [channels] + [depth * 2**stage] * layers  # the first layer changes them
            self.stages.append(
                nn.Sequential(
                    *(ResidualLayer(widths[i], widths[i + 1], norm, size) for i in range(layers))
                )
            )
            channels, size = widths[-1], size // 2
        self.embed_dim = channels * size**2

    def feature_maps(self, x: Tensor) -> list[Tensor]:
        """The map of every stage before its pooling, largest first, and the pooled last one."""
        x = F.elu(self.conv_in(x))
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
            x = F.avg_pool2d(x, 2)
        return [*maps, x]

    def forward(self, x: Tensor) -> Tensor:
        return self.feature_maps(x)[-1].flatten(1)  # [N, C*H*W], channels first as in the paper


class DecoderLayers(nn.Module):
    """The layers of a ResNet decoder: linear to 4x4, residual stages at 8, 16, 32, 32 -> 64.

    Args:
        in_features: size of the feature vector.
        depth: channels of the last encoder-side stage; the first map has ``depth * 2**(stages-1)``.
        stages, layers, norm: as in :class:`ResNetEncoder`.
    """

    def __init__(
        self,
        in_features: int,
        depth: int = 48,
        stages: int = 3,
        layers: int = 2,
        norm: Norm = "batch",
    ) -> None:
        super().__init__()
        channels, size = depth * 2 ** (stages - 1), IMAGE_SIZE // 2 ** (stages + 1)
        self.first_map = (channels, size, size)
        self.linear_in = nn.Linear(in_features, channels * size**2)
        self.stages = nn.ModuleList()
        for _ in range(stages):
            size *= 2
            widths = [channels] * layers + [channels // 2]  # the last layer changes them
            self.stages.append(
                nn.Sequential(
                    *(
                        self.make_layer(i, widths[i], widths[i + 1], norm, size)
                        for i in range(layers)
                    )
                )
            )
            channels //= 2
        self.conv_out = nn.ConvTranspose2d(channels, 3, 3, stride=2, padding=1, output_padding=1)

    def make_layer(
        self, index: int, in_channels: int, out_channels: int, norm: Norm, size: int
    ) -> nn.Module:
        """The layer number ``index`` of the stage of resolution ``size``."""
        return ResidualLayer(in_channels, out_channels, norm, size)


class ResNetDecoder(DecoderLayers):
    """Linear to 4x4, then stages of nearest 2x up-sampling and residual layers, then 32 -> 64."""

    def forward(self, feat: Tensor) -> Tensor:
        x = self.linear_in(feat).unflatten(-1, self.first_map)  # [N, C, 4, 4]
        for stage in self.stages:
            x = stage(F.interpolate(x, scale_factor=2.0))
        return self.conv_out(x)


class CNNEncoder(nn.Module):
    """DreamerV2's encoder: four 4x4 convolutions of stride 2, ELU; ``embed_dim = 32 * depth``."""

    def __init__(self, in_channels: int = 3, depth: int = 48, kernels: Sequence[int] = (4,) * 4):
        super().__init__()
        channels = [in_channels, *(depth * 2**i for i in range(len(kernels)))]
        self.convs = nn.ModuleList(
            nn.Conv2d(c_in, c_out, kernel, stride=2)
            for c_in, c_out, kernel in zip(channels, channels[1:], kernels, strict=False)
        )
        size = IMAGE_SIZE
        for kernel in kernels:
            size = (size - kernel) // 2 + 1
        self.embed_dim = channels[-1] * size**2

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = F.elu(conv(x))
        return x.flatten(1)


class CNNDecoder(nn.Module):
    """DreamerV2's decoder: linear to ``32 * depth`` channels, transposed convolutions, stride 2."""

    def __init__(self, in_features: int, depth: int = 48, kernels: Sequence[int] = (5, 5, 6, 6)):
        super().__init__()
        last = len(kernels) - 1
        channels = [32 * depth, *(depth * 2 ** (last - 1 - i) for i in range(last)), 3]
        self.linear_in = nn.Linear(in_features, channels[0])
        self.convs = nn.ModuleList(
            nn.ConvTranspose2d(c_in, c_out, kernel, stride=2)
            for c_in, c_out, kernel in zip(channels, channels[1:], kernels, strict=False)
        )

    def forward(self, feat: Tensor) -> Tensor:
        x = self.linear_in(feat)[..., None, None]  # [N, C, 1, 1]
        first, *others = self.convs
        x = first(x)
        for conv in others:
            x = conv(F.elu(x))
        return x
