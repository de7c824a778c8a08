"""torch's private and prototype interfaces, all that this package uses, and what to do without.

``tests/fast/test_private.py`` says which of them a new torch lacks, or has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "functorch_is_active",
    "fused_adam_skips",
    "layer_norm_ops",
    "onednn_linear",
    "selective_checkpointing",
    "unsafe_view",
]


def functorch_is_active() -> bool:
    """Whether ``vmap``, ``grad`` or the like of :mod:`torch.func` transforms what is called now.

    Without torch's answer: True, so that nothing is taken that they have no rule for.
    """
    active = getattr(torch._C, "_are_functorch_transforms_active", None)
    return True if active is None else active()


@cache
def onednn_linear() -> Callable[[Tensor, Tensor, Tensor | None], Tensor] | None:
    """``x W^T + b`` by oneDNN, of dense float32 CPU tensors, x ``[N, in]``; None without oneDNN."""
    try:
        op = torch.ops.mkldnn._linear_pointwise.default

        def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return op(x, weight, bias, "none", [], "")

        one = torch.ones((), dtype=torch.float32, device="cpu")  # whatever the defaults are
        x, weight, bias = (one.expand(shape).clone() for shape in ((2, 3), (4, 3), (4,)))
        right = bool((product(x, weight, bias) == 4).all())
    except (AttributeError, RuntimeError, TypeError):
        return None
    return product if right and torch.backends.mkldnn.is_available() else None


@cache
def fused_adam_skips(kind: str) -> bool:
    """Whether a fused Adam on devices of this kind leaves all as it is where ``found_inf`` is 1.

    That attribute of the optimizer, float32 [], is how a GradScaler tells the kernel.
    """
    weight = torch.ones(1, device=kind, requires_grad=True)
    weight.grad = torch.ones_like(weight)
    adam = torch.optim.Adam([weight], fused=True)
    try:
        for skip in (True, False):
            vars(adam)["found_inf"] = torch.tensor(float(skip), device=kind)
            adam.step()
            if (weight.item() == 1) != skip:
                return False
    except (AttributeError, RuntimeError, TypeError):
        return False
    return True


def unsafe_view(x: Tensor, shape: Sequence[int]) -> Tensor:
    """``x.view(shape)``, no view in autograd's eyes, so that activations may work in place.

    Without torch's function: a copy.
    """
    view = getattr(torch.ops.aten, "_unsafe_view", None)
    return x.view(shape).clone() if view is None else view(x, shape)


@cache
def layer_norm_ops() -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    """``native_layer_norm`` and its backward; None without one of them."""
    try:
        aten = torch.ops.aten
        return aten.native_layer_norm.default, aten.native_layer_norm_backward.default
    except AttributeError:
        return None


@cache
def selective_checkpointing() -> (
    Callable[..., tuple[AbstractContextManager, AbstractContextManager]] | None
):
    """Contexts of a checkpoint that keeps the operations a policy names; None without them.

    The result is called with ``keep(*arguments) -> bool`` of an operation and its arguments.
    """
    try:
        from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
    except ImportError:
        return None

    def contexts(
        keep: Callable[..., bool],
    ) -> tuple[AbstractContextManager, AbstractContextManager]:
        def policy(_: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
            kept = keep(operation, *args, **kwargs)
            return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

        return create_selective_checkpoint_contexts(policy)

    return contexts
