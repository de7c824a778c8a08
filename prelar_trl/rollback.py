"""Going back to what buffers were."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["Rollback"]


class Rollback:
    """Buffers as they are now, to go back to; with few operators for many small ones.

    Args:
        buffers: on one device.
    """

    def __init__(self, buffers: Iterable[Tensor]) -> None:
        self.groups: dict[torch.dtype, list[Tensor]] = {}
        for buffer in buffers:
            self.groups.setdefault(buffer.dtype, []).append(buffer)
        self.before = {dtype: _joined(group) for dtype, group in self.groups.items()}

    def undo_if(self, condition: Tensor) -> None:
        """Go back where ``condition``, bool []; nobody waits for its value."""
        for dtype, group in self.groups.items():
            kept = torch.where(condition, self.before[dtype], _joined(group))
            parts = kept.split([buffer.numel() for buffer in group])
            for buffer, part in zip(group, parts, strict=True):
                buffer.copy_(part.view_as(buffer))


def _joined(group: list[Tensor]) -> Tensor:
    return torch.cat([buffer.flatten() for buffer in group])  # a copy, of one too
