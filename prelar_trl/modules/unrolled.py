"""Linear layers inside a time loop, with the gradient of their weights taken once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

__all__ = ["UnrolledLinear"]


class _WeightAfterwards(torch.autograd.Function):
    """The bias of every step; its gradient gives that of the weight, once the loop is done."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor, inputs: list[Tensor]) -> Tensor:
        ctx.inputs = inputs
        return bias.view_as(bias)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, Tensor, None]:
        weight = None
        if ctx.needs_input_grad[0]:
            x = torch.stack(ctx.inputs).flatten(0, 1)  # [T*B, in]
            weight = grad.flatten(0, 1).t() @ x
        return weight, grad, None


class UnrolledLinear:
    """``x_t W^T + b_t`` for t = 0, 1, ..., T-1, called once a step.

    Autograd would add up T products for the gradient of ``W``, each of which reads and writes a
    matrix of the size of ``W`` for the few rows of one step. Here it is one product over all steps.
    It works because the gradient of ``b_t`` is that of the output of step t.

    Args:
        weight: ``[out, in]``.
        bias: of each step, ``[T, B, out]``.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        kind = weight.device.type
        if kind != "meta" and torch.is_autocast_enabled(kind):  # meta has no autocast
            dtype = torch.get_autocast_dtype(kind)
            weight, bias = weight.to(dtype), bias.to(dtype)
        self.inputs: list[Tensor] = []
        if torch.compiler.is_compiling():  # the compiler cannot trace a list that fills later
            self.weight, self.biases = weight.t(), iter(bias.unbind(0))
            return
        self.weight = weight.detach().t()
        self.biases = iter(_WeightAfterwards.apply(weight, bias, self.inputs).unbind(0))

    def __call__(self, x: Tensor) -> Tensor:
        """``[B, in]`` -> ``[B, out]`` of the next step."""
        x = x.to(self.weight.dtype)
        self.inputs.append(x.detach())
        return torch.addmm(next(self.biases), x, self.weight)
