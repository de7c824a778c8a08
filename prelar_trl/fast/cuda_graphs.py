"""Updates as CUDA graphs: a GPU runs all of one without being told each operation."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import Any, TypeVar
from weakref import WeakSet

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from prelar_trl.objectives import total_loss
from prelar_trl.updates import Update
from prelar_trl.utils import one_line

__all__ = ["record_update"]

EAGER = 3  # updates before the recorded one, in which cuDNN chooses its algorithms
WAIT = "called a synchronizing CUDA operation"  # torch's warning

log = logging.getLogger(__name__)
U = TypeVar("U", bound=Update)


def record_update(update: U) -> U:
    """Compute an update's losses and their gradient by one CUDA graph, in place.

    The first three updates are eager, the fourth is recorded, which takes about a second. It and
    every later one are then one launch of the same kernels, with the random draws of eager ones.
    A batch of another form than the recorded one is computed eagerly. So is everything, after one
    warning, if the update asks for a value of a tensor or recording fails.

    What the update reads or changes beside its inputs must be tensors, and change in place: of
    numbers and attributes the graph knows what they were in the fourth update.

    Args:
        update: of one process; its module must be on CUDA.

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
        if self.recording is not None:
            return self.replay(inputs)
        self.calls += 1
        if self.calls < EAGER:
            return self.eager(*inputs)
        if self.calls == EAGER:
            return self.eager_and_watched(inputs)
        failure = self.record(inputs)
        # Only here a failed recording's tensors are free.
        return self.replay(inputs) if failure is None else self.give_up(failure, inputs)

    def eager_and_watched(self, inputs: tuple[Any, ...]) -> TensorDict:
        """The losses; nothing will be recorded if they wait for the GPU, which a graph cannot."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            before = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("warn")
            try:
                losses = self.eager(*inputs)
            finally:
                torch.cuda.set_sync_debug_mode(before)
        if any(WAIT in str(warning.message) for warning in caught):
            self.stop("it waits for the GPU")
        return losses

    def record(self, inputs: tuple[Any, ...]) -> str | None:
        """Record; returns why that failed."""
        try:
            self.recording = Recording(self.update, self.parameters, inputs)
        except Exception as error:
            return f"{type(error).__name__}: {one_line(error)[:200]}"
        return None

    def replay(self, inputs: tuple[Any, ...]) -> TensorDict:
        assert self.recording is not None
        if form(inputs) != self.recording.form:
            return self.eager(*inputs)
        losses = self.recording.replay(inputs)
        for parameter, gradient in zip(self.parameters, self.recording.gradients, strict=True):
            parameter.grad = gradient
        return losses

    def give_up(self, failure: str, inputs: tuple[Any, ...]) -> TensorDict:
        torch.cuda.empty_cache()
        for parameter in self.parameters:
            parameter.grad = None  # as each update leaves them
        losses = self.eager(*inputs)  # an error of the inputs comes again, and is raised
        self.stop(failure)
        return losses

    def stop(self, failure: str) -> None:
        warnings.warn(f"compile=auto failed ({failure}); goes on as compile=off", stacklevel=5)
        self.update.forward_backward = self.eager


class Recording:
    """The graph of an update with the tensors that it reads and writes.

    Args:
        update: what to record.
        parameters: whose gradients are wanted.
        inputs: a batch for the update.

    Attributes:
        gradients: of the last replay; the next one overwrites them.
    """

    alive: WeakSet[Recording] = WeakSet()

    def __init__(
        self, update: Update, parameters: Sequence[Tensor], inputs: tuple[Any, ...]
    ) -> None:
        log.info("recording %s", type(update).__name__)
        self.form, self.device = form(inputs), parameters[0].device
        self.inputs = [x.clone() if isinstance(x, TensorDictBase) else x for x in inputs]
        for parameter in parameters:
            parameter.grad = None
        # Of two updates in turn, each may use what the other's inner results took.
        other = next((x for x in Recording.alive if x.device == self.device), None)
        self.graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.device(self.device),
            torch.cuda.stream(torch.cuda.current_stream()),  # where a failure goes back to
        ):
            self.stream = torch.cuda.Stream() if other is None else other.stream
            with torch.cuda.graph(
                self.graph,
                pool=None if other is None else other.graph.pool(),
                stream=self.stream,
                capture_error_mode="thread_local",  # threads that load batches may allocate
            ):
                losses = update.losses(*self.inputs)
                total_loss(losses).backward()
        self.losses = losses.detach()
        self.gradients = [parameter.grad for parameter in parameters]
        Recording.alive.add(self)

    def replay(self, inputs: tuple[Any, ...]) -> TensorDict:
        """The losses of these inputs."""
        for own, new in zip(self.inputs, inputs, strict=True):
            if isinstance(own, TensorDictBase):
                own.update_(new)
        with torch.cuda.device(self.device):
            self.graph.replay()
        return self.losses.clone()  # the next replay writes over them


def form(inputs: tuple[Any, ...]) -> list[Any]:
    """What a recording fixes: keys, shapes and types of batches, and all other values."""

    def entries(batch: TensorDictBase) -> dict[Any, Any]:
        return {key: (x.shape, x.dtype, x.device) for key, x in batch.items(True, True)}

    return [entries(x) if isinstance(x, TensorDictBase) else x for x in inputs]
