"""Updates as CUDA graphs: a GPU runs all of one without being told each operation."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from prelar_trl.objectives import total_loss
from prelar_trl.updates import Update
from prelar_trl.utils import one_line

__all__ = ["record_update"]

EAGER = 3  # updates before the recorded one, in which cuDNN chooses its algorithms

log = logging.getLogger(__name__)
U = TypeVar("U", bound=Update)


def record_update(update: U) -> U:
    """Compute an update's losses and their gradient by one CUDA graph, in place.

    The first three updates are eager, the fourth is recorded, which takes about a second. It and
    every later one are then one launch of the same kernels, with the random draws of eager ones.
    A batch of another form than the recorded one is computed eagerly. So is everything, after one
    warning, if recording fails, as it does where the update asks for a value of a tensor.

    What the update reads beside its inputs must be tensors that change in place.

    Args:
        update: its module must be on CUDA.

    Returns:
        The same update.
    """
    update.forward_backward = RecordedUpdate(update)
    return update


class RecordedUpdate:
    """What stands in for an update's ``forward_backward``.

    Args:
        update: before it is replaced.
    """

    def __init__(self, update: Update) -> None:
        self.update, self.eager = update, update.forward_backward
        self.parameters = list(update.module.parameters())
        self.calls = 0
        self.recording: Recording | None = None

    def __call__(self, *inputs: Any) -> TensorDict:
        self.calls += 1
        if self.calls <= EAGER:
            return self.eager(*inputs)
        failure = None
        if self.recording is None:
            try:
                with undone_if_it_fails():
                    self.recording = Recording(self.update, self.parameters, inputs)
            except Exception as error:
                failure = f"{type(error).__name__}: {one_line(error)[:200]}"
        if self.recording is None:  # only here the failed call's tensors are free
            return self.give_up(failure, *inputs)
        if form(inputs) != self.recording.form:
            return self.eager(*inputs)
        losses, gradients = self.recording.replay(inputs)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        return losses

    def give_up(self, failure: str | None, *inputs: Any) -> TensorDict:
        for parameter in self.parameters:
            parameter.grad = None  # as each update leaves them
        losses = self.eager(*inputs)  # an error of the inputs comes again, and is raised
        warnings.warn(f"compile=auto failed ({failure}); goes on as compile=off", stacklevel=4)
        self.update.forward_backward = self.eager
        torch.cuda.empty_cache()
        return losses


class Recording:
    """The graph of an update with the tensors that it reads and writes.

    Args:
        update: what to record.
        parameters: whose gradients are wanted; they have none.
        inputs: a batch for the update.
    """

    def __init__(
        self, update: Update, parameters: Sequence[Tensor], inputs: tuple[Any, ...]
    ) -> None:
        log.info("recording %s", type(update).__name__)
        self.form = form(inputs)
        self.inputs = [x.clone() if isinstance(x, TensorDictBase) else x for x in inputs]
        self.graph = torch.cuda.CUDAGraph()
        # Threads that load the next batches may allocate meanwhile.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            losses = update.losses(*self.inputs)
            total_loss(losses).backward()
        self.losses = losses.detach()
        self.gradients = [parameter.grad for parameter in parameters]

    def replay(self, inputs: tuple[Any, ...]) -> tuple[TensorDict, list[Tensor | None]]:
        """Losses, and the parameters' gradients, which the next replay overwrites."""
        for own, new in zip(self.inputs, inputs, strict=True):
            if isinstance(own, TensorDictBase):
                own.update_(new)
        self.graph.replay()
        return self.losses.clone(), self.gradients


def form(inputs: tuple[Any, ...]) -> list[Any]:
    """What a recording fixes: keys, shapes and types of batches, and all other values."""

    def entries(batch: TensorDictBase) -> dict[Any, Any]:
        return {key: (x.shape, x.dtype, x.device) for key, x in batch.items(True, True)}

    return [entries(x) if isinstance(x, TensorDictBase) else x for x in inputs]


@contextmanager
def undone_if_it_fails() -> Iterator[None]:
    """A recording that fails leaves its stream the current one, and its generators recording."""
    if not torch.cuda.is_initialized():
        yield
        return
    stream, generators = torch.cuda.current_stream(), torch.cuda.default_generators
    states = [generator.clone_state() for generator in generators]
    try:
        yield
    except BaseException:
        torch.cuda.set_stream(stream)
        for generator, state in zip(generators, states, strict=True):
            generator.graphsafe_set_state(state)
        raise
