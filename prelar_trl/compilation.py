"""Losses and their gradients through torch.compile, or eager where that is off or fails."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from prelar_trl.objectives import total_loss

__all__ = ["CompileMode", "ForwardBackward"]

CompileMode = Literal["auto", "on", "off"]
COMPILED_DEVICES = ("cuda",)  # of auto: on the CPU compiling takes minutes
EAGER_CALLS = 2  # of auto, before it compiles: the faster one gives the time to beat
TRIALS = 5  # a CUDA graph is warmed up by the first call, recorded in the second, then replayed


class ForwardBackward:
    """Computes losses and adds the gradient of their sum to the parameters' ``grad``.

    Compiled it is one graph forward and one backward of static shapes, on CUDA with CUDA graphs,
    and makes the random draws of the eager one.

    Args:
        losses: function that returns a TensorDict with ``loss_*`` entries.
        module: has all parameters and buffers that ``losses`` uses.
        compile: ``auto`` compiles on CUDA after two eager calls, and goes on eagerly with a warning
            where one of the first five compiled calls fails (gradients must be None then) or none
            of them is faster than the eager ones; ``on`` compiles on every device, and raises;
            ``off`` is eager. Default: ``off``.
    """

    def __init__(
        self,
        losses: Callable[..., TensorDict],
        module: nn.Module,
        compile: CompileMode = "off",
    ) -> None:
        if compile not in get_args(CompileMode):
            raise ValueError(f"compile={compile!r} is unknown; choose auto, on or off")
        self.losses, self.module, self.mode = losses, module, compile
        self.compiled: Callable[..., TensorDict] | None = None
        self.eager_calls, self.trials = EAGER_CALLS, TRIALS
        self.eager_seconds = self.compiled_seconds = math.inf  # the fastest call's

    def __call__(self, *inputs: Any) -> TensorDict:
        """The detached losses of these inputs."""
        device = next(self.module.parameters()).device
        if self.mode == "off" or (self.mode == "auto" and device.type not in COMPILED_DEVICES):
            return self._eager(*inputs)
        if self.mode == "auto" and self.eager_calls:
            losses, seconds = _timed(device, self._eager, *inputs)
            self.eager_seconds = min(self.eager_seconds, seconds)
            self.eager_calls -= 1
            return losses
        if self.compiled is None:
            # The second option is what mode="reduce-overhead" means; torch takes no mode beside
            # options.
            options = {"fallback_random": True, "triton.cudagraphs": device.type == "cuda"}
            self.compiled = torch.compile(
                self.losses, fullgraph=True, dynamic=False, options=options
            )
        if not self.trials:
            return self._graphs(*inputs)
        before, failure = self._state(device), ""
        try:
            losses, seconds = _timed(device, self._graphs, *inputs)
        except Exception as error:
            failure = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            if self.mode == "on":
                raise RuntimeError(f"compile=on failed ({failure}); use compile=off") from error
        if failure:  # only here the failed call's tensors are free
            self._restore(before)
            losses = self._eager(*inputs)  # an error of the inputs comes again, and is raised
            self._give_up(f"failed ({failure})")
            return losses
        self.trials -= 1
        self.compiled_seconds = min(self.compiled_seconds, seconds)
        if self.mode == "auto" and not self.trials and self.compiled_seconds > self.eager_seconds:
            compiled, eager = 1e3 * self.compiled_seconds, 1e3 * self.eager_seconds
            self._give_up(f"is no gain ({compiled:.0f} ms, eager {eager:.0f} ms)")
        return losses

    def _give_up(self, reason: str) -> None:
        warnings.warn(f"compile=auto {reason}; goes on as compile=off", stacklevel=3)
        self.mode, self.compiled = "off", None

    def _eager(self, *inputs: Any) -> TensorDict:
        losses = self.losses(*inputs)
        total_loss(losses).backward()
        return losses.detach()

    def _graphs(self, *inputs: Any) -> TensorDict:
        if next(self.module.parameters()).is_cuda:
            torch.compiler.cudagraph_mark_step_begin()
        losses = self.compiled(*inputs)
        total_loss(losses).backward()
        return losses.detach().clone()  # the next replay of a CUDA graph overwrites its outputs

    def _state(self, device: torch.device) -> tuple[list[Tensor], Tensor, Tensor | None]:
        """What a call changes, but for gradients: buffers and random generators."""
        buffers = [x.clone() for x in self.module.buffers()]
        cuda_rng = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return buffers, torch.get_rng_state(), cuda_rng

    def _restore(self, state: tuple[list[Tensor], Tensor, Tensor | None]) -> None:
        buffers, rng, cuda_rng = state
        for buffer, value in zip(self.module.buffers(), buffers, strict=True):
            buffer.copy_(value)
        torch.set_rng_state(rng)
        if cuda_rng is not None:
            torch.cuda.set_rng_state(cuda_rng, next(self.module.parameters()).device)
        for parameter in self.module.parameters():
            parameter.grad = None  # as each update leaves them


def _timed(
    device: torch.device, function: Callable[..., TensorDict], *inputs: Any
) -> tuple[TensorDict, float]:
    """What the function returns, and its seconds, those of the GPU included."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda _: None
    wait(device)
    start = time.perf_counter()
    result = function(*inputs)
    wait(device)
    return result, time.perf_counter() - start
