"""``torch.compile`` for the updates."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any, Literal, TypeVar, get_args

import torch
from tensordict import TensorDict

from prelar_trl.objectives import total_loss
from prelar_trl.updates import Update
from prelar_trl.utils import check_choice, one_line

__all__ = ["CompileMode", "compile_update"]

log = logging.getLogger(__name__)
CompileMode = Literal["auto", "on", "off"]
U = TypeVar("U", bound=Update)


def compile_update(update: U, mode: CompileMode = "auto") -> U:
    """Compute an update's losses and their gradient by ``torch.compile``, in place.

    They become one graph forward and one backward of static shapes, on CUDA with CUDA graphs, which
    make the random draws of the eager ones. The first updates take minutes longer.

    Args:
        update: its module must be on its device.
        mode: ``on`` compiles; ``auto`` does on CUDA only, and where that fails it warns, computes
            the batch again eagerly (batch norms then count it twice) and goes on so; ``off``
            changes nothing. Default: ``auto``.

    Returns:
        The same update.

    Raises (by the update):
        RuntimeError: ``on``, and compiling failed.
    """
    check_choice("compile", mode, get_args(CompileMode))
    cuda = next(update.module.parameters()).is_cuda
    if mode == "off" or (mode == "auto" and not cuda):
        return update
    log.info("compiling %s: its first calls take minutes", type(update).__name__)
    # The second option is what mode="reduce-overhead" means; torch takes no mode beside options.
    options: dict[str, str | int | bool | Callable[..., Any]] = {
        "fallback_random": True,
        "triton.cudagraphs": cuda,
    }
    compiled: Callable[..., TensorDict] | None = torch.compile(
        update.losses, fullgraph=True, dynamic=False, options=options
    )
    eager = update.forward_backward

    def forward_backward(*inputs: Any) -> TensorDict:
        nonlocal compiled
        assert compiled is not None
        try:
            if cuda:
                torch.compiler.cudagraph_mark_step_begin()
            losses = compiled(*inputs)
            total_loss(losses).backward()
            return losses.detach().clone()  # the next replay of a CUDA graph overwrites its outputs
        except Exception as error:
            failure = f"{type(error).__name__}: {one_line(error)[:200]}"
            if mode == "on":
                raise RuntimeError(f"compile=on failed ({failure}); use compile=off") from error
        # Only here the failed call's tensors are free.
        for parameter in update.module.parameters():
            parameter.grad = None  # as each update leaves them
        losses = eager(*inputs)  # an error of the inputs comes again, and is raised
        warnings.warn(f"compile=auto failed ({failure}); goes on as compile=off", stacklevel=3)
        update.forward_backward, compiled = eager, None
        if cuda:  # the graphs' memory goes back for what follows
            torch.cuda.empty_cache()
        return losses

    update.forward_backward = forward_backward
    return update
