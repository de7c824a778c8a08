"""Several processes that train one model on one joint batch, by DistributedDataParallel.

Not only gradients are averaged: what couples the rows of a batch sees those of all processes, see
`prelar_trl.collectives`. So W processes with n rows each compute what one computes with W*n rows,
to float rounding and for the same random draws.
"""

from __future__ import annotations

import gc
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DistributedDataParallel

from prelar_trl.collectives import ProcessGroup, gather, joint_mean
from prelar_trl.fast.checkpointing import CheckpointedBatchNorm2d, is_recomputing
from prelar_trl.objectives import total_loss
from prelar_trl.updates import Update

__all__ = ["SyncBatchNorm2d", "distribute", "process_group"]

U = TypeVar("U", bound=Update)


@contextmanager
def process_group(backend: str, **options: Any) -> Iterator[None]:
    """Membership in a process group, ``torch.distributed.group.WORLD``, while this lasts.

    Then gloo's threads are gone, too. ``destroy_process_group`` alone lets them live for as long as
    anything refers to the group, such as an update that is shared by `distribute`; one that drops a
    tensor while the interpreter ends aborts the process, with SIGABRT, after all is done. So what
    is made inside must not be kept outside. Of an exception that leaves, the frames are cleared: a
    debugger finds no local variables in them.

    Args:
        backend: such as ``"gloo"``.
        options: of ``torch.distributed.init_process_group``.
    """
    outside = sys.exception()  # being handled by who asks for the group
    dist.init_process_group(backend, **options)
    try:
        yield
    except BaseException as error:
        clear_frames(error, outside)
        raise
    finally:
        gc.collect()  # DistributedDataParallel and the update refer to each other
        dist.destroy_process_group()


def clear_frames(error: BaseException | None, outside: BaseException | None) -> None:
    """Drop the local variables of the functions that an exception, and what led to it, has left.

    Up to an exception from ``outside``, whose frames are somebody else's.
    """
    while error is not None and error is not outside:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def distribute(update: U, group: ProcessGroup | None, *, overlap: bool = True) -> U:
    """Let an update train on the joint batch of a group's processes, in place.

    Weights and buffers become those of the group's first process; batch norms become
    :class:`SyncBatchNorm2d`; gradients are averaged; the losses that the update returns are those
    of the joint batch. All processes then have the same weights and buffers after each update, and
    must call it equally often.

    Args:
        update: its module must be on its device, and accelerated before.
        group: None changes nothing.
        overlap: average gradients while the backward pass still runs, by DistributedDataParallel;
            otherwise after it. False for an update of parameters that another one trains too: they
            can have one DistributedDataParallel only. Default: True.

    Returns:
        The same update.
    """
    if group is None:
        return update
    # Not the module alone: an update's other losses share its networks.
    modules = [x for x in (update, *vars(update).values()) if isinstance(x, nn.Module)]
    for part in {part for module in modules for part in module.modules()}:
        if type(part) in (nn.BatchNorm2d, CheckpointedBatchNorm2d):
            part.__class__ = SyncBatchNorm2d
        if hasattr(part, "process_group"):
            vars(part)["process_group"] = group
    update.process_group = group
    for module in modules:
        for x in module.state_dict(keep_vars=True).values():
            dist.broadcast(x.detach(), group=group, group_src=0)
    if not overlap:
        forward_backward_here = update.forward_backward

        def forward_backward_then_average(*inputs: Any) -> TensorDict:
            losses = forward_backward_here(*inputs)
            for parameter in trained_parameters(update):
                if parameter.grad is not None:
                    parameter.grad = joint_mean(parameter.grad, group)
            return joint_losses(losses, group)

        update.forward_backward = forward_backward_then_average
        return update

    # The graph is the same in every update: what gets no gradient in one never does.
    parallel = DistributedDataParallel(
        _Losses(update),
        process_group=group,
        gradient_as_bucket_view=True,
        static_graph=True,
    )

    def forward_backward(*inputs: Any) -> TensorDict:
        loss, losses = parallel(*inputs)
        loss.backward()
        return joint_losses(losses, group)

    update.forward_backward = forward_backward
    return update


class _Losses(nn.Module):
    """An update's losses as the module that DistributedDataParallel needs.

    Its parameters are those that the update trains; a loss has others beside, a frozen projection
    for one, and an agent those of the other update.
    """

    def __init__(self, update: Update) -> None:
        super().__init__()
        self.trained = nn.ParameterList(trained_parameters(update))
        self.losses = update.losses

    def forward(self, *inputs: Any) -> tuple[Tensor, TensorDict]:
        losses = self.losses(*inputs)
        return total_loss(losses), losses.detach()


def trained_parameters(update: Update) -> list[nn.Parameter]:
    """The parameters of an update's optimizers."""
    groups = [group for o in update.optimizers.values() for group in o.param_groups]
    return [parameter for group in groups for parameter in group["params"]]


def joint_losses(losses: TensorDict, group: ProcessGroup) -> TensorDict:
    """The losses with every scalar averaged over the processes."""
    names = [name for name, x in losses.items() if isinstance(x, Tensor) and not x.dim()]
    values = joint_mean(torch.stack([losses[name].double() for name in names]), group)
    pairs = zip(names, values.unbind(0), strict=True)
    return losses.update({name: x.to(losses[name].dtype) for name, x in pairs})


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over the rows of all processes, on any device.

    torch's own is for GPUs only. This one takes one exchange of two numbers a channel in each
    direction, as that does, and torch's batch-norm kernels.
    """

    process_group: ProcessGroup | None = None
    running_mean: Tensor  # [C]
    running_var: Tensor  # [C]
    num_batches_tracked: Tensor
    momentum: float

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.process_group is None:
            return super().forward(x)
        y, mean, var = _JointBatchNorm.apply(
            x, self.weight, self.bias, self.eps, self.process_group
        )
        if not is_recomputing():
            count = x.numel() // x.shape[1] * self.process_group.size()
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(var * (count / max(1, count - 1)), self.momentum)
        return y


class _JointBatchNorm(torch.autograd.Function):
    """Normalizes by the joint mean and variance, and returns them."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, group: ProcessGroup
    ) -> tuple[Tensor, Tensor, Tensor]:
        variance, mean = torch.var_mean(x.to(weight.dtype), (0, 2, 3), correction=0)
        means, variances = gather(torch.stack([mean, variance])[None], group).unbind(1)  # [W, C]
        mean = means.mean(0)
        variance = (variances + (means - mean).square()).mean(0)  # Chan et al., equal counts
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.eps, ctx.group = eps, group
        y = F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps)
        ctx.mark_non_differentiable(mean, variance)
        return y, mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, variance = ctx.saved_tensors
        # As if mean and variance were constants; they are not:
        to_x, to_weight, to_bias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, mean, variance, None, None, False, ctx.eps, [True, True, True]
        )
        sums = torch.stack([to_weight, to_bias])  # of grad * normalized x, and of grad
        dist.all_reduce(sums, group=ctx.group)
        rstd = (variance + ctx.eps).rsqrt()
        count = x.numel() // x.shape[1] * ctx.group.size()
        slope, offset = -weight * rstd / count * sums
        slope = slope * rstd
        offset = offset - slope * mean
        slope, offset = (c.to(x.dtype)[:, None, None] for c in (slope, offset))
        return to_x.addcmul_(x, slope).add_(offset), to_weight, to_bias, None, None
