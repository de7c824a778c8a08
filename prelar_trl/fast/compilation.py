"""Updates without the host's part: recorded on a GPU, or put through ``torch.compile``."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Literal, TypeVar, get_args

import torch
from tensordict import TensorDict

from prelar_trl.fast.cuda_graphs import record_update
from prelar_trl.objectives import total_loss
from prelar_trl.updates import Update
from prelar_trl.utils import check_choice, one_line

__all__ = ["CompileMode", "compile_update"]

log = logging.getLogger(__name__)
CompileMode = Literal["auto", "on", "off"]
U = TypeVar("U", bound=Update)


def compile_update(update: U, mode: CompileMode = "auto") -> U:
    """Compute an update's losses and their gradient with fewer launches, in place.

    Random draws are those of eager updates.

    Args:
        update: its module must be on its device.
        mode: ``auto`` records a CUDA graph of the eager update, in seconds, and changes nothing on
            other devices, see :func:`record_update`; ``on`` is ``torch.compile``, one graph
            forward and one backward of static shapes, on CUDA with CUDA graphs, whose first calls
            take minutes; ``off`` changes nothing. Default: ``auto``.

    Returns:
        The same update.

    Raises (by the update):
        RuntimeError: ``on``, and compiling failed.
    """
    check_choice("compile", mode, get_args(CompileMode))
    cuda = next(update.module.parameters()).is_cuda
    if mode == "auto" and cuda:
        return record_update(update)
    if mode != "on":
        return update
    log.info("compiling %s: its first calls take minutes", type(update).__name__)
    # The second option is what mode="reduce-overhead" means; torch takes no mode beside options.
    options: dict[str, str | int | bool | Callable[..., Any]] = {
        "fallback_random": True,
        "triton.cudagraphs": cuda,
    }
    compiled = torch.compile(update.losses, fullgraph=True, dynamic=False, options=options)

    def forward_backward(*inputs: Any) -> TensorDict:
        try:
            if cuda:
                torch.compiler.cudagraph_mark_step_begin()
            losses = compiled(*inputs)
            total_loss(losses).backward()
            return losses.detach().clone()  # the next replay of a CUDA graph overwrites its outputs
        except Exception as error:
            failure = f"{type(error).__name__}: {one_line(error)[:200]}"
            raise RuntimeError(f"compile=on failed ({failure}); use compile=off") from error

    update.forward_backward = forward_backward
    return update
