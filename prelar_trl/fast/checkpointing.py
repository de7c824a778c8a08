"""Less memory: the backward pass computes again what is cheap."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from prelar_trl.fast.private import functorch_is_active, selective_checkpointing

__all__ = ["CheckpointedBatchNorm2d", "checkpoint_convs", "is_recomputing"]

PRODUCTS_KEPT = 200  # a convolution with more of them for each output is not computed twice

_recomputing: ContextVar[bool] = ContextVar("recomputing", default=False)


def checkpoint_convs(function: Callable[..., Any], *inputs: Tensor) -> Any:
    """``function(*inputs)``, of which only the convolutions' outputs are kept for the gradient.

    Norms, activations, sums, poolings and the smallest convolutions (of images, 1x1, to the largest
    up-sampled map) are computed again during the backward pass. For the networks of this package
    that saves half of the memory and costs a few percent of the time. Nothing changes where no
    gradient is wanted, or where a compiler or functorch traces. The result can be differentiated
    once (no ``retain_graph``), while the weights are as they were.

    Args:
        function: of tensors; deterministic, with batch norms of this module only, and without
            in-place changes of a convolution's output.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or functorch_is_active():
        return function(*inputs)
    selective = selective_checkpointing()
    if selective is None:
        return function(*inputs)

    def uncached(*inputs: Tensor) -> Any:
        # Weights that autocast has cast before would be missing when they are cast again.
        before = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        try:
            return function(*inputs)
        finally:
            torch.set_autocast_cache_enabled(before)

    def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
        first, again = selective(_is_costly)
        return first, RecomputeContext(again)

    return checkpoint(
        uncached,
        *inputs,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=contexts,
        # It would leave the output of a last convolution in store until the graph is freed.
        early_stop=False,
    )


class CheckpointedBatchNorm2d(nn.BatchNorm2d):
    """Batch norm that counts a batch once, although :func:`checkpoint_convs` computes it twice."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and is_recomputing():
            # Momentum 0 leaves the running statistics as they are.
            running = self.running_mean, self.running_var
            return F.batch_norm(x, *running, self.weight, self.bias, True, 0.0, self.eps)
        return super().forward(x)


def is_recomputing() -> bool:
    """Whether :func:`checkpoint_convs` computes for the second time now."""
    # The compiler, which cannot trace a ContextVar, never finds it set.
    return not torch.compiler.is_compiling() and _recomputing.get()


class RecomputeContext:
    """The context of the second computation, which batch norms can tell from the first."""

    def __init__(self, context: AbstractContextManager) -> None:
        self.context = context

    def __enter__(self) -> None:
        self.token = _recomputing.set(True)
        self.context.__enter__()

    def __exit__(self, *error: Any) -> bool | None:
        _recomputing.reset(self.token)
        return self.context.__exit__(*error)


def _is_costly(operation: Any, *args: Any, **kwargs: Any) -> bool:
    return operation is torch.ops.aten.convolution.default and _products(*args) > PRODUCTS_KEPT


def _products(
    x: Any,
    weight: Tensor,
    bias: Any,
    stride: list[int],
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> float:
    """Products for each output of a convolution, of a transposed one on average."""
    if transposed:
        return weight[:, 0].numel() / groups / math.prod(stride)
    return weight[0].numel()
