"""Plain CNNs of non-overlapping kernels, for machines without a GPU.

On a CPU the time of a small CNN goes into its largest maps, where a few channels leave the vector
unit idle. Kernels of 4x4 with stride 4 make every layer one dense matrix product: 64 -> 16 -> 4
pixels and back, at about a quarter of the time of DreamerV2's CNN. Other sizes are padded to the
next multiple of 16, see :mod:`prelar_trl.modules.convnets`.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from prelar_trl.modules.convnets import IMAGE_SIZE, crop_images, pad_images, round_up

__all__ = ["PatchDecoder", "PatchEncoder"]

PATCH = 4


class PatchEncoder(nn.Module):
    """Two convolutions 4x4 of stride 4, ELU; for 64x64 ``embed_dim = 64 * depth``.

    Args:
        in_channels: image channels.
        depth: channels of the first map; the second has four times as many.
        image_size: S. Default: 64.
    """

    def __init__(self, in_channels: int = 3, depth: int = 16, image_size: int = IMAGE_SIZE) -> None:
        super().__init__()
        self.padded_size = round_up(image_size, PATCH**2)
        self.convs = nn.ModuleList(
            nn.Conv2d(c_in, c_out, PATCH, stride=PATCH)
            for c_in, c_out in ((in_channels, depth), (depth, 4 * depth))
        )
        self.embed_dim = 4 * depth * (self.padded_size // PATCH**2) ** 2

    def forward(self, x: Tensor) -> Tensor:
        x = pad_images(x, self.padded_size)
        for conv in self.convs:
            x = F.elu(conv(x))
        return x.flatten(1)


class PatchDecoder(nn.Module):
    """The way back: features ``[N, F]`` -> image means ``[N, C, S, S]``.

    A linear layer makes the 4x4 map; each further one turns a pixel into a patch of 4x4, as a
    transposed convolution of stride 4 does.

    Args:
        in_features: size F of the feature vector.
        depth: channels of the 16x16 map.
        image_size: S. Default: 64.
        out_channels: of the image. Default: 3.
    """

    def __init__(
        self,
        in_features: int,
        depth: int = 16,
        image_size: int = IMAGE_SIZE,
        out_channels: int = 3,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.grid = round_up(image_size, PATCH**2) // PATCH**2  # pixels of the smallest map
        self.linear_in = nn.Linear(in_features, 4 * depth * self.grid**2)
        self.patches = nn.ModuleList(
            nn.Linear(c_in, c_out * PATCH**2)
            for c_in, c_out in ((4 * depth, depth), (depth, out_channels))
        )

    def forward(self, feat: Tensor) -> Tensor:
        x = self.linear_in(feat).unflatten(-1, (self.grid, self.grid, -1))
        for layer in self.patches:
            x = spread_patches(layer(F.elu(x)))
        return crop_images(x.permute(0, 3, 1, 2), self.image_size)


def spread_patches(x: Tensor) -> Tensor:
    """Pixels that hold patches, ``[N, h, w, 16 C]`` -> those as pixels, ``[N, 4h, 4w, C]``."""
    rows = x.unflatten(-1, (PATCH, -1)).transpose(2, 3)  # [N, h, 4, w, 4 C]
    count, height, _, width, _ = rows.shape
    return rows.reshape(count, PATCH * height, PATCH * width, -1)
