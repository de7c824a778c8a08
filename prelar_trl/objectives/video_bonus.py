"""APV's video-based intrinsic bonus."""

from __future__ import annotations

import torch
from tensordict.utils import NestedKey
from torch import Tensor, nn

from prelar_trl.collectives import ProcessGroup, gather, joint_mean
from prelar_trl.modules.checks import check_entry
from prelar_trl.objectives.common import check_range
from prelar_trl.objectives.functional import knn_distance, sliding_mean

__all__ = ["VideoBonus"]


class VideoBonus(nn.Module):
    """Novelty of short clips: distance to the nearest ones seen lately, in a random projection.

    Source: APV (Seo et al., ICML 2022), section 3.3. The batch itself enters the memory before
    distances are taken, so each point counts itself among its neighbors, as in the authors' code.
    A clip over the border of two episodes counts for nothing: its bonus is 0.
    Of processes that share a batch each remembers the whole of it: their memories are equal.

    Args:
        embed_dim: size of the embedding.
        k: number of neighbors. Default: 16.
        window: steps averaged into one clip embedding. Default: 5.
        projection_dim: size of the random projection (std 1 / projection_dim). Default: 128.
        memory_size: number of projections kept, newest first. Default: 4096.
        momentum: of the running mean magnitude that normalizes the bonus. Default: 0.99.
        embed_key: where a world model writes the embedding that it is meant for. Default: "embed".
    """

    process_group: ProcessGroup | None = None  # whose processes share the batch
    memory: Tensor  # [M, P]
    filled: Tensor  # [] int64
    magnitude: Tensor  # [] float64

    def __init__(
        self,
        embed_dim: int,
        *,
        k: int = 16,
        window: int = 5,
        projection_dim: int = 128,
        memory_size: int = 4096,
        momentum: float = 0.99,
        embed_key: NestedKey = "embed",
    ) -> None:
        super().__init__()
        check_range(1, k=k, window=window, projection_dim=projection_dim, memory_size=memory_size)
        check_range(0, 1, momentum=momentum)
        self.k, self.window, self.momentum, self.embed_key = k, window, momentum, embed_key
        projection = torch.randn(embed_dim, projection_dim) / projection_dim
        self.projection = nn.Parameter(projection, requires_grad=False)
        self.register_buffer("memory", torch.zeros(memory_size, projection_dim))
        self.register_buffer("filled", torch.zeros((), dtype=torch.long))
        self.register_buffer("magnitude", torch.ones((), dtype=torch.float64))

    @torch.no_grad()
    def forward(self, embed: Tensor, is_first: Tensor | None = None) -> Tensor:
        """Embeddings ``[B, T, E]`` -> normalized bonus ``[B, T-window+1]``.

        In training mode the batch enters the memory and moves the magnitude. Episodes begin where
        ``is_first`` ``[B, T, 1]`` says so. Default: nowhere.
        """
        check_entry("embed", embed, "float", ("B", "T", len(self.projection)), self.projection)
        if embed.shape[1] < self.window:
            raise ValueError(
                f"embed {list(embed.shape)}: sequences of {embed.shape[1]} steps are shorter than "
                f"the window of {self.window}"
            )
        # Projected first, which is the same; in float64, which autocast leaves alone.
        steps = embed.double() @ self.projection.double()
        clips = sliding_mean(steps, self.window).to(self.projection.dtype)  # [B, T-window+1, P]
        points = clips.flatten(0, 1)  # [N, P]
        whole = torch.ones_like(points[:, 0], dtype=torch.bool)
        if is_first is not None:
            whole = self.within_episodes(is_first).flatten()
        if self.training:
            self._remember(gather(points, self.process_group), gather(whole, self.process_group))
        valid = torch.arange(len(self.memory), device=points.device) < self.filled
        bonus = knn_distance(points, self.memory, valid, self.k) * whole
        if self.training:
            total = joint_mean(bonus.abs().mean(), self.process_group)
            share = joint_mean(whole.to(bonus.dtype).mean(), self.process_group)
            magnitude = torch.where(share > 0, total / share, self.magnitude)
            magnitude = magnitude.to(self.magnitude.dtype)
            # A view: torch.compile drops in-place changes of float64 scalars (torch 2.13).
            self.magnitude.view(1).lerp_(magnitude, 1 - self.momentum)
        return (bonus / (self.magnitude.to(bonus.dtype) + 1e-8)).unflatten(0, clips.shape[:2])

    def within_episodes(self, is_first: Tensor) -> Tensor:
        """Which clips lie within one episode: ``[B, T, 1]`` -> bool ``[B, T-window+1]``."""
        episode = is_first.squeeze(-1).cumsum(1)
        return episode[:, self.window - 1 :] == episode[:, : is_first.shape[1] - self.window + 1]

    def _remember(self, points: Tensor, whole: Tensor) -> None:
        """Put the ``whole`` ones of the points ``[N, P]`` before those of earlier."""
        newest = points[torch.argsort(~whole, stable=True)]
        place = torch.arange(len(self.memory), device=points.device)
        count = whole.sum()
        new = newest[place.clamp_max(len(newest) - 1)]
        old = self.memory[(place - count).clamp_min(0)]
        self.memory.copy_(torch.where((place < count).unsqueeze(-1), new, old))
        self.filled.copy_((self.filled + count).clamp_max(len(self.memory)))
