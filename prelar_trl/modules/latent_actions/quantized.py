"""Quantized latent actions: finite scalar quantization (FSQ) and a learned codebook (VQ)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from prelar_trl.collectives import from_first, gather
from prelar_trl.modules.latent_actions.base import LatentActions, register_latent_actions

__all__ = ["FSQActions", "VQActions"]


def straight_through(value: Tensor, source: Tensor) -> Tensor:
    """``value`` forward, the gradient of ``source`` backward."""
    return source + (value - source).detach()


def perplexity(usage: Tensor) -> Tensor:
    """``exp(entropy)`` of the shares ``usage`` ``[M]``: how many codes are used, in effect."""
    shares = usage / usage.sum().clamp_min(1e-12)
    return torch.special.entr(shares).sum().exp()


@register_latent_actions("fsq")
class FSQActions(LatentActions):
    """Finite scalar quantization: each variable is rounded to one of a few levels.

    ``z = h tanh(raw + s) - o`` lies within the levels' range, ``action = round(z) / floor(L / 2)``
    in [-1, 1], with straight-through gradients (Mentzer et al., 2023, section 3.1 and appendix A).
    No codebook and no loss, but no promise either: where the network's output varies by less than a
    level, or lies beyond the outermost one, all become one code: ``code_perplexity`` is 1, and
    may stay so. Of frame differences (``frames=diff``) no run here did.

    Args:
        size: not used: the width U is the number of ``levels``.
        levels: levels L of each variable, at least 3 each. Default: 8, 5, 5 (200 actions).
    """

    counts: Tensor  # levels [U]

    def __init__(self, *, size: int = 0, levels: Sequence[int] = (8, 5, 5)) -> None:
        super().__init__(size=size)
        levels = tuple(levels)
        if not levels or min(levels) < 3:  # of two, only one would lie within reach of tanh
            raise ValueError(
                f"levels={list(levels)}: FSQ needs at least 3 levels for each variable"
            )
        self.levels = levels
        counts = torch.tensor(levels, dtype=torch.float32)  # to copy it anew would wait
        self.register_buffer("counts", counts, persistent=False)
        self.num_outputs = self.dim = len(levels)

    def forward(self, raw: Tensor, sample: bool = True) -> tuple[Tensor, None]:
        raw = raw.float() if raw.dtype != torch.float64 else raw
        half = (self.counts - 1) * (1 - 1e-3) / 2
        offset = torch.where(self.counts % 2 == 0, 0.5, 0.0)
        z = half * torch.tanh(raw + torch.atanh(offset / half)) - offset
        return straight_through(z.round(), z) / (self.counts / 2).floor(), None

    def metrics(self, action: Tensor, params: None) -> dict[str, Tensor]:
        """``code_perplexity``: in effect, how many of the actions a batch uses."""
        levels = [int(x) for x in self.levels]
        digits = (action.detach() * (self.counts / 2).floor()).round().long()
        index = torch.zeros_like(digits[..., 0])
        for digit, level in zip(digits.unbind(-1), levels, strict=True):
            index = index * level + digit + level // 2
        codes = 1
        for level in levels:
            codes *= level
        usage = torch.zeros(codes, device=action.device)
        index = gather(index.flatten(), self.process_group)
        usage.index_add_(0, index, torch.ones(index.numel(), device=action.device))
        return {"code_perplexity": perplexity(usage)}


@register_latent_actions("vq")
class VQActions(LatentActions):
    """The nearest vector of a learned codebook (van den Oord et al., 2017).

    The codebook is the moving average of what is assigned to it (ibid., appendix A.1); a code that
    is assigned less than ``restart_below`` of its fair share moves to a random input of the batch.
    The commitment loss ``mean |raw - sg(code)|^2`` keeps the network at its codes (ibid., equation
    3). Parameters are the network's output ``[..., U]``. In evaluation mode the codebook stands
    still.

    Args:
        size: width U of a code.
        codes: number of codes. Default: 32.
        decay: of the moving averages. Default: 0.99.
        restart_below: share of the uniform usage. Default: 0.1.
    """

    default_weights: ClassVar[dict[str, float]] = {"commitment": 0.25}
    codebook: Tensor  # [codes, U]
    sums: Tensor  # [codes, U]
    usage: Tensor  # [codes]

    def __init__(
        self, *, size: int, codes: int = 32, decay: float = 0.99, restart_below: float = 0.1
    ) -> None:
        super().__init__(size=size)
        if codes < 2:
            raise ValueError(f"codes={codes}: a codebook needs at least 2")
        if not 0 < decay < 1:
            raise ValueError(f"decay={decay} must lie between 0 and 1")
        self.num_outputs = self.dim = size
        self.decay, self.restart_below = decay, restart_below
        self.register_buffer("codebook", torch.randn(codes, size) / size**0.5)
        self.register_buffer("sums", self.codebook.clone())
        self.register_buffer("usage", torch.ones(codes))

    def forward(self, raw: Tensor, sample: bool = True) -> tuple[Tensor, Tensor]:
        raw = raw.to(self.codebook.dtype)
        index = torch.cdist(raw.detach().flatten(0, -2), self.codebook).argmin(-1)
        code = F.embedding(index, self.codebook).view_as(raw)
        if self.training:
            self._move_codebook(raw.detach().flatten(0, -2), index)
        return straight_through(code, raw), raw

    def extra_losses(self, action: Tensor, params: Tensor) -> dict[str, Tensor]:
        """``commitment``: mean squared distance of the network's output from its code."""
        return {"commitment": (params - action.detach()).square().sum(-1).mean()}

    def metrics(self, action: Tensor, params: Tensor) -> dict[str, Tensor]:
        """``code_perplexity`` and ``codes_used``, the share of codes in use, of late."""
        fair = self.usage.mean()
        used = (self.usage > self.restart_below * fair).float().mean()
        return {"code_perplexity": perplexity(self.usage), "codes_used": used}

    @torch.no_grad()
    def _move_codebook(self, raw: Tensor, index: Tensor) -> None:
        raw, index = gather(raw, self.process_group), gather(index, self.process_group)
        codes = torch.arange(len(self.codebook), device=index.device)
        assigned = (index.unsqueeze(-1) == codes).to(raw.dtype)  # [N, codes]
        self.usage.lerp_(assigned.sum(0), 1 - self.decay)
        with torch.autocast(raw.device.type, enabled=False):
            self.sums.lerp_(assigned.T @ raw, 1 - self.decay)
        fair = self.usage.mean()
        dead = (self.usage < self.restart_below * fair).unsqueeze(-1)
        drawn = torch.randint(len(raw), (len(self.codebook),), device=raw.device)
        fresh = raw[from_first(drawn, self.process_group)]
        self.sums.copy_(torch.where(dead, fresh * fair, self.sums))
        self.usage.copy_(torch.where(dead.squeeze(-1), fair, self.usage))
        self.codebook.copy_(self.sums / self.usage.clamp_min(1e-5).unsqueeze(-1))
