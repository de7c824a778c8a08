"""One batch over several processes.

Each process of a group holds as many rows as every other, in the order of the ranks::

    rank      0            1                     W-1
    row       0 .. n-1     n .. 2n-1    ...      (W-1)n .. Wn-1

Modules whose rows see each other (batch statistics, permutations, rankings, memories) have an
attribute ``process_group``, None for a process on its own, and ask this module for the other rows.
`prelar_trl.distributed.distribute` sets it.

Gradients: the loss of the joint batch is the mean of the processes' losses. What comes back through
:func:`gather` is the gradient of their *sum*, so that the mean over the processes of the weights'
gradients, as DistributedDataParallel takes it, is the gradient of the joint loss.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

__all__ = ["ProcessGroup", "from_first", "gather", "joint_mean", "own_rows"]


def gather(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """The rows of all processes: ``[n, ...]`` -> ``[W*n, ...]``; without a group ``x`` itself."""
    return x if group is None else _Gather.apply(x, group)


def own_rows(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """This process's rows of what all have, ``[W*n, ...]`` -> ``[n, ...]``; undoes `gather`."""
    return x if group is None else x.chunk(group.size())[group.rank()]


def joint_mean(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """The mean over the processes, element by element."""
    return x if group is None else gather(x.unsqueeze(0), group).mean(0)


def from_first(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """The first process's ``x``, such as a random draw on which all must agree. No gradient."""
    if group is None:
        return x
    x = x.detach().clone(memory_format=torch.contiguous_format)
    dist.broadcast(x, group=group, group_src=0)
    return x


class _Gather(torch.autograd.Function):
    # Of torch.distributed's documented functions only: its differentiable ones change by release.
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        parts = [
            torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(group.size())
        ]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return own_rows(grad, ctx.group), None
