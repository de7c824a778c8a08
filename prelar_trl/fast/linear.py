"""Linear layers: through oneDNN on the CPU, and with one weight gradient for a whole time loop.

torch sends float32 matrix products on the CPU to MKL, which on AMD processors leaves half of the
vector unit idle. oneDNN, which ships with torch too, is 1.4 times as fast there, and twice for the
few rows of a step of the recurrence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from prelar_trl.fast.private import functorch_is_active, onednn_linear, unsafe_view

__all__ = [
    "OneDNNLinear",
    "TimeBatchedLinear",
    "cached_autocast_weights",
    "cast_to_autocast",
    "linear",
]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b``: ``[..., in]`` -> ``[..., out]``, for a weight ``[out, in]``.

    The same as :func:`torch.nn.functional.linear`, on the CPU in float32 in oneDNN's kernels. There
    it cannot be differentiated twice.
    """
    fits = x.shape[-1] == weight.shape[1] > 0 and (bias is None or len(bias) == len(weight))
    if fits and _onednn_serves(x, weight, bias):
        return _OneDNNProduct.apply(x, weight, bias)
    return F.linear(x, weight, bias)


class OneDNNLinear(nn.Linear):
    """:class:`torch.nn.Linear` by :func:`linear`."""

    cast: tuple[Tensor, Tensor | None] | None = None  # weight, bias: see cached_autocast_weights

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.cast or (self.weight, self.bias)
        return linear(x, weight, bias)


def cast_to_autocast(x: Tensor) -> Tensor:
    """``x`` in the type that autocast gives to matrix products: one cast for several of them."""
    kind = x.device.type
    if x.dtype == torch.float64:  # autocast leaves it
        return x
    if kind != "meta" and torch.is_autocast_enabled(kind):
        return x.to(torch.get_autocast_dtype(kind))
    return x


@contextmanager
def cached_autocast_weights(*modules: nn.Module | None) -> Iterator[None]:
    """Inside, frozen linear layers of the modules do not cast their weights at every call.

    Autocast remembers what it has cast of trained weights only. The weights must stay as they are,
    and autocast too.
    """
    layers = [
        layer
        for module in modules
        if module is not None
        for layer in module.modules()
        if isinstance(layer, OneDNNLinear) and not layer.weight.requires_grad
    ]
    try:
        for layer in layers:
            bias = None if layer.bias is None else cast_to_autocast(layer.bias)
            layer.cast = cast_to_autocast(layer.weight), bias
        yield
    finally:
        for layer in layers:
            layer.cast = None


def _onednn_serves(*tensors: Tensor | None) -> bool:
    return (
        not torch.compiler.is_compiling()
        and onednn_linear() is not None
        and all(x is None or (x.is_cpu and x.dtype == torch.float32) for x in tensors)
        and not torch.is_autocast_enabled("cpu")
        and not functorch_is_active()  # vmap knows no rule for it
    )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    # The weight must be dense, see _dense: a slice takes oneDNN's slow way, element by element.
    product = cast(Callable[..., Tensor], onednn_linear())
    if x.dim() == 2:
        return product(x.contiguous(), weight, bias)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    return unsafe_view(product(rows, weight, bias), [*x.shape[:-1], weight.shape[0]])


class _OneDNNProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return _product(x, _dense(weight), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        to_x, to_weight, to_bias = ctx.needs_input_grad
        rows = grad.flatten(0, -2) if grad.dim() > 1 else grad.unsqueeze(0)
        return (
            _product(grad, _dense(weight).t()) if to_x else None,
            _weight_gradient(rows, x.reshape(-1, x.shape[-1]), weight) if to_weight else None,
            rows.sum(0) if to_bias else None,
        )


def _dense(weight: Tensor) -> Tensor:
    """The weight without gaps, by rows or by columns: a slice is copied."""
    by_rows = weight.is_contiguous()
    return weight if by_rows or weight.t().is_contiguous() else weight.contiguous()


def _weight_gradient(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """``grad^T x`` in the layout of the weight, so that it becomes its ``grad`` as it is."""
    by_columns = weight.t().is_contiguous() and not weight.is_contiguous()
    return (x.t() @ grad).t() if by_columns else grad.t() @ x


class _DeferredWeightGrad(torch.autograd.Function):
    """The bias of every step; its gradient gives that of the weight, once the loop is done."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor, inputs: list[Tensor]) -> Tensor:
        ctx.inputs = inputs
        return bias.view_as(bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None]:
        weight = None
        if ctx.needs_input_grad[0]:
            x = torch.stack(ctx.inputs).flatten(0, 1)  # [T*B, in]
            weight = grad.flatten(0, 1).t() @ x
        return weight, grad, None


class _StepProduct(torch.autograd.Function):
    """``x W^T + b`` without gradient of ``W``: one step of :class:`TimeBatchedLinear`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return _product(x, weight).add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
        (weight,) = ctx.saved_tensors
        return _product(grad, weight.t()), None, grad


class TimeBatchedLinear:
    """``x_t W^T + b_t`` for t = 0, 1, ..., T-1, called once a step.

    Autograd would add up T products for the gradient of ``W``, each of which reads and writes a
    matrix of the size of ``W`` for the few rows of one step. Here it is one product over all steps.
    It works because the gradient of ``b_t`` is that of the output of step t.

    Args:
        weight: ``[out, in]``.
        bias: of each step, ``[T, B, out]``.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        weight, bias = cast_to_autocast(weight), cast_to_autocast(bias)
        self.inputs: list[Tensor] = []
        if torch.compiler.is_compiling():  # the compiler cannot trace a list that fills later
            self.weight, self.biases, self.onednn = weight, iter(bias.unbind(0)), False
            return
        self.weight = weight.detach().contiguous()
        self.biases = iter(_DeferredWeightGrad.apply(weight, bias, self.inputs).unbind(0))
        self.onednn = _onednn_serves(self.weight, bias)

    def __call__(self, x: Tensor) -> Tensor:
        """``[B, in]`` -> ``[B, out]`` of the next step."""
        x = x.to(self.weight.dtype)
        self.inputs.append(x.detach())
        if self.onednn:
            return _StepProduct.apply(x, self.weight, next(self.biases))
        return torch.addmm(next(self.biases), x, self.weight.t())
