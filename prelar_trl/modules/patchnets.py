"""Plain CNNs of non-overlapping kernels, for machines without a GPU.

On a CPU the time of a small CNN goes into its largest maps, where a few channels leave the vector
unit idle. Kernels of 4x4 with stride 4 make every layer one dense matrix product: 64 -> 16 -> 4
pixels and back, at about a quarter of the time of DreamerV2's CNN.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from prelar_trl.modules.convnets import IMAGE_SIZE

__all__ = ["PatchDecoder", "PatchEncoder"]

PATCH = 4
GRID = IMAGE_SIZE // PATCH**2  # pixels of the smallest map


class PatchEncoder(nn.Module):
    """Two convolutions 4x4 of stride 4, ELU: ``[N, C, 64, 64]`` -> ``[N, 64 * depth]``.

    Args:
        in_channels: image channels.
        depth: channels of the first map; the second has four times as many.
    """

    def __init__(self, in_channels: int = 3, depth: int = 16) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(c_in, c_out, PATCH, stride=PATCH)
            for c_in, c_out in ((in_channels, depth), (depth, 4 * depth))
        )
        self.embed_dim = 4 * depth * GRID**2

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = F.elu(conv(x))
        return x.flatten(1)


class PatchDecoder(nn.Module):
    """The way back: features ``[N, F]`` -> image means ``[N, 3, 64, 64]``.

    A linear layer makes the 4x4 map; each further one turns a pixel into a patch of 4x4, as a
    transposed convolution of stride 4 does.

    Args:
        in_features: size F of the feature vector.
        depth: channels of the 16x16 map.
    """

    def __init__(self, in_features: int, depth: int = 16) -> None:
        super().__init__()
        self.linear_in = nn.Linear(in_features, 4 * depth * GRID**2)
        self.patches = nn.ModuleList(
            nn.Linear(c_in, c_out * PATCH**2) for c_in, c_out in ((4 * depth, depth), (depth, 3))
        )

    def forward(self, feat: Tensor) -> Tensor:
        x = self.linear_in(feat).unflatten(-1, (GRID, GRID, -1))
        for layer in self.patches:
            x = spread_patches(layer(F.elu(x)))
        return x.permute(0, 3, 1, 2)


def spread_patches(x: Tensor) -> Tensor:
    """Pixels that hold patches, ``[N, h, w, 16 C]`` -> those as pixels, ``[N, 4h, 4w, C]``."""
    rows = x.unflatten(-1, (PATCH, -1)).transpose(2, 3)  # [N, h, 4, w, 4 C]
    count, height, _, width, _ = rows.shape
    return rows.reshape(count, PATCH * height, PATCH * width, -1)
