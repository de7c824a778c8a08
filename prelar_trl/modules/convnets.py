"""Image encoders and decoders: ResNets (APV, PreLAR) and DreamerV2's plain CNN.

Encoders map images ``[N, C, S, S]`` in [-0.5, 0.5] to embeddings ``[N, E]``; decoders map features
``[N, F]`` to image means ``[N, C, S, S]``. The published size S is 64; every layer but the smallest
map is the same for another size. Where halving does not go evenly, images are padded to the next
size at which it does (with 0, gray), and the decoder's are cropped: at three stages 84 to 96.

======================  ======  ======  ======  ======
image size S            64      84      96      128
======================  ======  ======  ======  ======
ResNet, smallest map    4x4     6x6     6x6     8x8
CNN, encoder's last     2x2     3x3     4x4     6x6
CNN, decoder's first    1x1     3x3     3x3     5x5
patches, smallest map   4x4     6x6     6x6     8x8
======================  ======  ======  ======  ======
"""

from __future__ import annotations

import math
from typing import get_args

import torch.nn.functional as F
from torch import Tensor, nn

from prelar_trl.types import Norm
from prelar_trl.utils import check_choice

__all__ = ["IMAGE_SIZE", "CNNDecoder", "CNNEncoder", "ResNetDecoder", "ResNetEncoder"]

IMAGE_SIZE = 64
CNN_DOWN, CNN_UP = (4, 4, 4, 4), (5, 5, 6, 6)  # DreamerV2's kernels, all of stride 2


def round_up(size: int, multiple: int) -> int:
    """The smallest multiple that is not below ``size``."""
    return -(-size // multiple) * multiple


def pad_images(x: Tensor, size: int) -> Tensor:
    """``[N, C, S, S]`` -> ``[N, C, size, size]``, with zeros around."""
    missing = size - x.shape[-1]
    before, after = missing // 2, missing - missing // 2
    return F.pad(x, (before, after, before, after)) if missing else x


def crop_images(x: Tensor, size: int) -> Tensor:
    """The middle ``size`` pixels of ``[N, C, S, S]``, where `pad_images` has put them."""
    start = (x.shape[-1] - size) // 2
    return x[..., start : start + size, start : start + size] if x.shape[-1] != size else x


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
        image_size: S. Default: 64.
    """

    def __init__(
        self,
        in_channels: int = 3,
        depth: int = 48,
        stages: int = 3,
        layers: int = 2,
        norm: Norm = "batch",
        image_size: int = IMAGE_SIZE,
    ) -> None:
        super().__init__()
        self.padded_size = round_up(image_size, 2 ** (stages + 1))
        self.conv_in = nn.Conv2d(in_channels, depth, 3, stride=2, padding=1)
        self.stages = nn.ModuleList()
        channels, size = depth, self.padded_size // 2
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
        x = F.elu(self.conv_in(pad_images(x, self.padded_size)))
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
        depth: channels of the encoder's first stage; the first map has ``depth * 2**(stages-1)``.
        stages, layers, norm, image_size: as in :class:`ResNetEncoder`.
        out_channels: of the image. Default: 3.
    """

    def __init__(
        self,
        in_features: int,
        depth: int = 48,
        stages: int = 3,
        layers: int = 2,
        norm: Norm = "batch",
        image_size: int = IMAGE_SIZE,
        out_channels: int = 3,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        halvings = 2 ** (stages + 1)
        channels, size = depth * 2 ** (stages - 1), round_up(image_size, halvings) // halvings
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
        self.conv_out = nn.ConvTranspose2d(
            channels, out_channels, 3, stride=2, padding=1, output_padding=1
        )

    def to_images(self, x: Tensor) -> Tensor:
        """The largest map -> images ``[N, C, S, S]``."""
        return crop_images(self.conv_out(x), self.image_size)

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
        return self.to_images(x)


class CNNEncoder(nn.Module):
    """DreamerV2's encoder: four 4x4 convolutions of stride 2, ELU.

    For 64x64 ``embed_dim = 32 * depth``.
    """

    def __init__(
        self,
        in_channels: int = 3,
        depth: int = 48,
        image_size: int = IMAGE_SIZE,
    ) -> None:
        super().__init__()
        channels = [in_channels, *(depth * 2**i for i in range(len(CNN_DOWN)))]
        self.convs = nn.ModuleList(
            nn.Conv2d(c_in, c_out, kernel, stride=2)
            for c_in, c_out, kernel in zip(channels, channels[1:], CNN_DOWN, strict=False)
        )
        size = image_size
        for kernel in CNN_DOWN:
            size = (size - kernel) // 2 + 1
        self.embed_dim = channels[-1] * size**2

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = F.elu(conv(x))
        return x.flatten(1)


class CNNDecoder(nn.Module):
    """DreamerV2's decoder: linear to ``32 * depth`` channels, transposed convolutions, stride 2.

    From one pixel they make 64x64. Larger images begin with the smallest map that suffices, which
    has ``8 * depth`` channels, those of the encoder's last map.
    """

    def __init__(
        self,
        in_features: int,
        depth: int = 48,
        image_size: int = IMAGE_SIZE,
        out_channels: int = 3,
    ) -> None:
        super().__init__()
        self.image_size, size = image_size, 1
        while decoded_size(size) < image_size:
            size += 1
        last = len(CNN_UP) - 1
        first = 32 * depth if size == 1 else 8 * depth
        channels = [first, *(depth * 2 ** (last - 1 - i) for i in range(last)), out_channels]
        self.first_map = (first, size, size)
        self.linear_in = nn.Linear(in_features, first * size**2)
        self.convs = nn.ModuleList(
            nn.ConvTranspose2d(c_in, c_out, kernel, stride=2)
            for c_in, c_out, kernel in zip(channels, channels[1:], CNN_UP, strict=False)
        )

    def forward(self, feat: Tensor) -> Tensor:
        x = self.linear_in(feat).unflatten(-1, self.first_map)  # [N, C, 1, 1] for 64x64
        first, *others = self.convs
        x = first(x)
        for conv in others:
            x = conv(F.elu(x))
        return crop_images(x, self.image_size)


def decoded_size(size: int) -> int:
    """Side of what the decoder's transposed convolutions make of a map."""
    for kernel in CNN_UP:
        size = 2 * (size - 1) + kernel
    return size
