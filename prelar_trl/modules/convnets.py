"""Image encoders and decoders: ResNets (APV, PreLAR) and DreamerV2's plain CNN.

Encoders map images ``[N, C, 64, 64]`` in [-0.5, 0.5] to embeddings ``[N, E]``; decoders map
features ``[N, F]`` to image means ``[N, 3, 64, 64]``. Activations are channels-last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, channels_last, nn

from prelar_trl.modules.linear import Linear, linear
from prelar_trl.modules.recompute import BatchNorm2d, keep_convolutions
from prelar_trl.types import Norm

__all__ = ["IMAGE_SIZE", "CNNDecoder", "CNNEncoder", "ResNetDecoder", "ResNetEncoder"]

IMAGE_SIZE = 64
PART = 50  # frames


def make_norm(norm: Norm, channels: int, size: int) -> list[nn.Module]:
    """Normalisation of ``[N, channels, size, size]`` maps: a list of no or one module."""
    match norm:
        case "batch":
            return [BatchNorm2d(channels)]
        case "layer":
            return [nn.LayerNorm([channels, size, size])]
        case "group":
            return [nn.GroupNorm(math.gcd(8, channels), channels)]
        case "none":
            return []
    raise ValueError(f"norm={norm!r} is unknown; choose batch, layer, group or none")


def by_parts(network: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``network(x)``, on the CPU :data:`PART` frames at a time.

    The gradients of the largest maps then exist for one part at a time only. Not for networks with
    batch norm, which couples the frames.
    """
    if len(x) <= PART or not x.is_cpu or torch.compiler.is_compiling():
        return network(x)
    return torch.cat([network(part) for part in x.split(PART)])


class ResidualLayer(nn.Module):
    """``relu(skip(x) + [conv3x3 -> norm -> relu -> conv3x3 -> norm](x))``.

    ``skip`` is the identity, or conv1x1 and norm where the number of channels changes. With
    ``upsample`` x is first made twice as large (nearest).
    """

    def __init__(
        self, in_channels: int, out_channels: int, norm: Norm, size: int, upsample: bool = False
    ) -> None:
        super().__init__()
        self.upsample = upsample
        self.in_place = norm != "none"  # a convolution's output stays as it is
        self.skip = nn.Sequential()
        if in_channels != out_channels:
            self.skip = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, bias=False),
                *make_norm(norm, out_channels, size),
            )
        first = UpsampledConv2d if upsample else nn.Conv2d
        last_norm = make_norm(norm, out_channels, size)
        self.block = nn.Sequential(
            first(in_channels, out_channels, 3, padding=1, bias=False),
            *make_norm(norm, out_channels, size),
            nn.ReLU(inplace=self.in_place),
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
            *last_norm,
        )
        self.before_norm = len(self.block) - len(last_norm)  # modules before its last norm

    def forward(self, x: Tensor) -> Tensor:
        skip = self.shortcut(x)
        return self.join(self.convolve(x), skip)

    def by_branches(self, x: Tensor) -> Tensor:
        """The same; the backward pass computes one branch again at a time, their sum not at all."""
        # The skip first: its gradient, as large as x, comes last and is not kept meanwhile.
        skip = keep_convolutions(self.shortcut, x)
        return self.join(keep_convolutions(self.convolve, x), skip)

    def shortcut(self, x: Tensor) -> Tensor:
        """What :meth:`join` adds: ``x`` as it is, not up-sampled, where there is no convolution."""
        if not self.skip:
            return x
        return self.skip(F.interpolate(x, scale_factor=2.0) if self.upsample else x)

    def convolve(self, x: Tensor) -> Tensor:
        """The block through its last convolution, without the norm after it."""
        return self.block[: self.before_norm](x)

    def join(self, y: Tensor, skip: Tensor) -> Tensor:
        """``relu(norm(y) + skip)`` of what the branches gave, in place where that is allowed."""
        y = self.block[self.before_norm :](y)
        if self.upsample and not self.skip:
            skip = F.interpolate(skip, scale_factor=2.0)
        return (y.add_(skip) if self.in_place else y + skip).relu_()


class UpsampledConv2d(nn.Conv2d):
    """A 3x3 convolution of its input up-sampled 2x (nearest).

    Equal neighbours share the sum of their weights. So a transposed 4x4 convolution of the input as
    it is gives the same, with 16 products a pixel of the input instead of 36.
    """

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.weight.transpose(0, 1).flip(2, 3)
        kernel = F.pad(kernel, (0, 1)) + F.pad(kernel, (1, 0))
        kernel = F.pad(kernel, (0, 0, 0, 1)) + F.pad(kernel, (0, 0, 1, 0))
        return F.conv_transpose2d(x, kernel, stride=2, padding=1)


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
            out_channels = depth * 2**stage
            self.stages.append(
                nn.Sequential(
                    ResidualLayer(channels, out_channels, norm, size),
                    *(
                        ResidualLayer(out_channels, out_channels, norm, size)
                        for _ in range(layers - 1)
                    ),
                )
            )
            channels, size = out_channels, size // 2
        self.embed_dim = channels * size**2

    def feature_maps(self, x: Tensor) -> list[Tensor]:
        """The map of every stage before its pooling, largest first, and the pooled last one."""
        x = x.contiguous(memory_format=channels_last)
        maps = []
        for index in range(len(self.stages)):
            stage_map, x = keep_convolutions(partial(self.run_stage, index), x)
            maps.append(stage_map)
        return [*maps, x]

    def run_stage(self, index: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Stage number ``index``, the first with the layer before it: its map, and that pooled."""
        stage_map = self.stages[index](F.elu(self.conv_in(x)) if index == 0 else x)
        return stage_map, F.avg_pool2d(stage_map, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.feature_maps(x)[-1].flatten(1)  # [N, C*H*W], channels first as in the paper


class ResNetDecoder(nn.Module):
    """Linear to 4x4, then stages of nearest 2x up-sampling and residual layers, then 32 -> 64.

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
        self.linear_in = Linear(in_features, channels * size**2)
        self.stages = nn.ModuleList()
        for _ in range(stages):
            size *= 2
            self.stages.append(
                nn.Sequential(
                    *(
                        self.make_layer(
                            channels, channels // 2 if i == layers - 1 else channels, norm, size, i
                        )
                        for i in range(layers)
                    )
                )
            )
            channels //= 2
        self.conv_out = nn.ConvTranspose2d(channels, 3, 3, stride=2, padding=1, output_padding=1)

    def make_layer(
        self, in_channels: int, out_channels: int, norm: Norm, size: int, index: int
    ) -> nn.Module:
        """The residual layer number ``index`` of the stage of resolution ``size``."""
        return ResidualLayer(in_channels, out_channels, norm, size, upsample=index == 0)

    def forward(self, feat: Tensor) -> Tensor:
        x = self.linear_in(feat).unflatten(-1, self.first_map)
        x = x.contiguous(memory_format=channels_last)
        *stages, largest = self.stages
        for stage in stages:
            x = keep_convolutions(stage, x)
        for layer in largest:
            x = layer.by_branches(x)
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
        return by_parts(self.run_convs, x.contiguous(memory_format=channels_last))

    def run_convs(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = F.elu(conv(x), inplace=True)
        return x.flatten(1)


class CNNDecoder(nn.Module):
    """DreamerV2's decoder: linear to ``32 * depth`` channels, transposed convolutions, stride 2."""

    def __init__(self, in_features: int, depth: int = 48, kernels: Sequence[int] = (5, 5, 6, 6)):
        super().__init__()
        last = len(kernels) - 1
        channels = [32 * depth, *(depth * 2 ** (last - 1 - i) for i in range(last)), 3]
        self.linear_in = Linear(in_features, channels[0])
        self.convs = nn.ModuleList(
            nn.ConvTranspose2d(c_in, c_out, kernel, stride=2)
            for c_in, c_out, kernel in zip(channels, channels[1:], kernels, strict=False)
        )

    def forward(self, feat: Tensor) -> Tensor:
        first = self.convs[0]
        # On one pixel a transposed convolution is a matrix product.
        x = linear(self.linear_in(feat), first.weight.flatten(1).t())  # [N, C*k*k]
        x = x.unflatten(-1, first.weight[0].flatten(1).shape).mT.contiguous() + first.bias
        x = x.unflatten(1, first.kernel_size).permute(0, 3, 1, 2)  # [N, C, k, k], channels-last
        return by_parts(self.run_convs, x)

    def run_convs(self, x: Tensor) -> Tensor:
        """The convolutions after the first."""
        for index, conv in enumerate(self.convs[1:]):
            x = conv(F.elu(x, inplace=index > 0))  # a part of the first map is a view
        return x
