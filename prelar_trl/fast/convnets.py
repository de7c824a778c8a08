"""The image networks with less memory and fewer products. Activations are channels-last.

Each class computes what its base class does. Stages are checkpointed, ReLUs and sums work in
place, a convolution of an up-sampled map takes the small map, and the plain CNNs take some frames
at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, channels_last, nn

from prelar_trl.fast.checkpointing import checkpoint_convs
from prelar_trl.fast.linear import linear
from prelar_trl.modules.context import ContextDecoder, ContextLayer
from prelar_trl.modules.convnets import (
    CNNDecoder,
    CNNEncoder,
    ResidualLayer,
    ResNetDecoder,
    ResNetEncoder,
    crop_images,
    pad_images,
)
from prelar_trl.modules.patchnets import PatchEncoder

__all__ = [
    "FastCNNDecoder",
    "FastCNNEncoder",
    "FastContextDecoder",
    "FastContextLayer",
    "FastPatchEncoder",
    "FastResNetDecoder",
    "FastResNetEncoder",
    "FastResidualLayer",
    "chunked",
    "upsampled_conv2d",
]

CHUNK = 50  # frames
Run = Callable[..., Any]  # of a function and its inputs, such as checkpoint_convs


def upsampled_conv2d(x: Tensor, weight: Tensor) -> Tensor:
    """A 3x3 convolution, padding 1, of ``x`` up-sampled 2x (nearest).

    Equal neighbors share the sum of their weights. So a transposed 4x4 convolution of ``x`` as it
    is gives the same, with 16 products a pixel of ``x`` instead of 36.
    """
    kernel = weight.transpose(0, 1).flip(2, 3)
    kernel = F.pad(kernel, (0, 1)) + F.pad(kernel, (1, 0))
    kernel = F.pad(kernel, (0, 0, 0, 1)) + F.pad(kernel, (0, 0, 1, 0))
    return F.conv_transpose2d(x, kernel, stride=2, padding=1)


def chunked(network: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``network(x)``, on the CPU :data:`CHUNK` frames at a time.

    The gradients of the largest maps then exist for one chunk at a time only. Not for networks with
    batch norm, which couples the frames.
    """
    if len(x) <= CHUNK or not x.is_cpu or torch.compiler.is_compiling():
        return network(x)
    return torch.cat([network(chunk) for chunk in x.split(CHUNK)])


def call(function: Callable[..., Any], *inputs: Tensor) -> Any:
    """``function(*inputs)``: :func:`checkpoint_convs` without checkpoints."""
    return function(*inputs)


def _shortcut(skip: nn.Sequential, x: Tensor, upsample: bool) -> Tensor:
    """What :func:`_join` adds: ``x`` as it is, not up-sampled, where there is no convolution."""
    if not skip:
        return x
    return skip(F.interpolate(x, scale_factor=2.0) if upsample else x)


def _convolve(block: nn.Sequential, x: Tensor, upsample: bool) -> Tensor:
    """A residual block through its last convolution, without the norm after it."""
    conv, *others = block
    has_norm = _has_norm(block)
    x = upsampled_conv2d(x, cast(nn.Conv2d, conv).weight) if upsample else conv(x)
    for layer in others[:-1] if has_norm else others:
        # Without norm the input is a convolution's output, which stays as it is.
        x = x.relu_() if has_norm and isinstance(layer, nn.ReLU) else layer(x)
    return x


def _join(block: nn.Sequential, y: Tensor, skip: Tensor, upsample: bool) -> Tensor:
    """``relu(norm(y) + skip)`` of what the branches gave, in place where that is allowed."""
    if upsample:
        skip = F.interpolate(skip, scale_factor=2.0)
    return block[-1](y).add_(skip).relu_() if _has_norm(block) else (y + skip).relu_()


def _has_norm(block: nn.Sequential) -> bool:
    return not isinstance(block[-1], nn.Conv2d)


class FastResidualLayer(ResidualLayer):
    """In place where that is allowed, and up-sampling itself."""

    def forward(self, x: Tensor, upsample: bool = False) -> Tensor:
        """The layer's output; with ``upsample`` for ``x`` made twice as large (nearest)."""
        skip = _shortcut(self.skip, x, upsample)
        y = _convolve(self.block, x, upsample)
        return _join(self.block, y, skip, upsample and not self.skip)

    def checkpointed(self, x: Tensor, upsample: bool, run: Run = checkpoint_convs) -> Tensor:
        """The same; the backward pass computes one branch again at a time, their sum not at all."""
        # The skip first: its gradient, as large as x, comes last and is not kept meanwhile.
        skip = run(partial(_shortcut, self.skip, upsample=upsample), x)
        y = run(partial(_convolve, self.block, upsample=upsample), x)
        return _join(self.block, y, skip, upsample and not self.skip)


class FastContextLayer(ContextLayer):
    """Attention, then a :class:`FastResidualLayer`."""

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        z = F.relu(x + self.attention_norm(self.attend(x, context)))
        skip = _shortcut(self.skip, x, False)
        return _join(self.block, _convolve(self.block, z, False), skip, False)


class FastResNetEncoder(ResNetEncoder):
    """Checkpointed stage by stage."""

    checkpoint = True

    def feature_maps(self, x: Tensor) -> list[Tensor]:
        run = checkpoint_convs if self.checkpoint else call
        x = pad_images(x, self.padded_size).contiguous(memory_format=channels_last)
        maps = []
        for index in range(len(self.stages)):
            stage_map, x = run(partial(self.run_stage, index), x)
            maps.append(stage_map)
        return [*maps, x]

    def run_stage(self, index: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Stage number ``index``, the first with the layer before it: its map, and that pooled."""
        stage_map = self.stages[index](F.elu(self.conv_in(x)) if index == 0 else x)
        return stage_map, F.avg_pool2d(stage_map, 2)


class FastResNetDecoder(ResNetDecoder):
    """Checkpointed stage by stage, the largest one branch by branch."""

    checkpoint = True

    def forward(self, feat: Tensor) -> Tensor:
        run = checkpoint_convs if self.checkpoint else call
        x = self.linear_in(feat).unflatten(-1, self.first_map)  # [N, C, 4, 4]
        x = x.contiguous(memory_format=channels_last)
        *stages, largest = cast(Iterable[nn.Sequential], self.stages)
        for stage in stages:
            x = run(partial(_upsampled_stage, stage), x)
        for index, layer in enumerate(cast(Iterable[Any], largest)):
            x = layer.checkpointed(x, index == 0, run)
        return self.to_images(x)


def _upsampled_stage(stage: nn.Sequential, x: Tensor) -> Tensor:
    for index, layer in enumerate(stage):
        x = layer(x, upsample=index == 0)
    return x


class FastContextDecoder(ContextDecoder):
    """Its layers in place where that is allowed."""

    def forward(self, feat: Tensor, context: list[Tensor]) -> Tensor:
        x = self.linear_in(feat).unflatten(-1, self.first_map)  # [B*T, C, 4, 4]
        x = x.contiguous(memory_format=channels_last)
        for stage, context_map in zip(
            cast(Iterable[nn.Sequential], self.stages), reversed(context), strict=True
        ):
            for index, layer in enumerate(stage):
                if not isinstance(layer, ContextLayer):
                    x = layer(x, upsample=index == 0)
                    continue
                x = F.interpolate(x, scale_factor=2.0) if index == 0 else x
                x = layer(x, context_map)
        return self.to_images(x)


class FastCNNEncoder(CNNEncoder):
    """Some frames at a time."""

    def forward(self, x: Tensor) -> Tensor:
        return chunked(partial(_encode, self.convs), x)


class FastPatchEncoder(PatchEncoder):
    """Channels-last, its activations in place."""

    def forward(self, x: Tensor) -> Tensor:
        return _encode(self.convs, pad_images(x, self.padded_size))


def _encode(convs: nn.ModuleList, x: Tensor) -> Tensor:
    """Convolutions with ELU, and all of their last map: ``[N, E]``."""
    x = x.contiguous(memory_format=channels_last)
    for conv in convs:
        x = F.elu(conv(x), inplace=True)
    return x.flatten(1)


class FastCNNDecoder(CNNDecoder):
    """Some frames at a time, the first layer as a matrix product."""

    def forward(self, feat: Tensor) -> Tensor:
        first = cast(nn.ConvTranspose2d, self.convs[0])
        if self.first_map[1] > 1:
            x = self.linear_in(feat).unflatten(-1, self.first_map)
            x = first(x.contiguous(memory_format=channels_last))
            return chunked(self.run_convs, x)
        # On one pixel a transposed convolution is a matrix product.
        x = linear(self.linear_in(feat), first.weight.flatten(1).t())  # [N, C*k*k]
        x = x.unflatten(-1, first.weight[0].flatten(1).shape).mT.contiguous()
        x = x + cast(Tensor, first.bias)
        x = x.unflatten(1, first.kernel_size).permute(0, 3, 1, 2)  # [N, C, k, k], channels-last
        return chunked(self.run_convs, x)

    def run_convs(self, x: Tensor) -> Tensor:
        """The convolutions after the first."""
        for index, conv in enumerate(self.convs[1:]):
            x = conv(F.elu(x, inplace=index > 0))  # a chunk of the first map is a view
        return crop_images(x, self.image_size)
