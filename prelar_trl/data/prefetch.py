"""Batches drawn ahead of their use, in a thread."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, cast

from tensordict import TensorDict
from torchrl.data import ReplayBuffer

from prelar_trl.data.storage import FrameStorage
from prelar_trl.utils import check_integers


class Drawn(NamedTuple):
    """A batch, the sampler's state before it was drawn, and the storage's revision then."""

    state: dict[str, Any]
    revision: int
    batch: TensorDict


class Prefetcher:
    """Draws batches of windows from a buffer, ahead of their use; they are those of no prefetching.

    A batch that was drawn ahead counts as not drawn until it is used: `state_dict` is the state
    from which the next batch follows, and where the clips have changed meanwhile it is drawn anew.
    The buffer's lock keeps drawing apart from extending it.

    Args:
        buffer: of a `FrameStorage`; its sampler draws windows and is not used elsewhere.
        length: frames T of a row.
        ahead: batches drawn ahead by a thread. 0: none, and no thread.
    """

    def __init__(self, buffer: ReplayBuffer, length: int, ahead: int) -> None:
        check_integers(0, prefetch=ahead)
        self.buffer, self.length, self.ahead = buffer, length, ahead
        self.storage = cast(FrameStorage, buffer.storage)
        self._executor = ThreadPoolExecutor(1, "prefetch") if ahead else None
        self._drawn: deque[Future[Drawn]] = deque()

    def next(self) -> TensorDict:
        """The next batch ``[B, T]``, with ``is_first`` where a window begins."""
        if self._executor is None:
            return self._sample()
        if self._drawn and self._drawn[0].result().revision != self.storage.revision:
            self.discard()
        while len(self._drawn) <= self.ahead:
            self._drawn.append(self._executor.submit(self._draw))
        return self._drawn.popleft().result().batch

    def discard(self) -> None:
        """Gives back what was drawn ahead, as if it had not been; waits for the thread."""
        if self._drawn:
            first, *_ = [drawn.result() for drawn in self._drawn]
            self._drawn.clear()
            self.buffer.sampler.load_state_dict(first.state)

    def state_dict(self) -> dict[str, Any]:
        """The sampler's state from which the next batch follows."""
        if self._drawn:
            return self._drawn[0].result().state
        return self.buffer.sampler.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken."""
        self.discard()
        self.buffer.sampler.load_state_dict(state_dict)

    def _draw(self) -> Drawn:
        state, revision = self.buffer.sampler.state_dict(), self.storage.revision
        return Drawn(state, revision, self._sample())

    def _sample(self) -> TensorDict:
        batch, info = self.buffer.sample(return_info=True)
        if "is_first" in info:
            batch["is_first"] = info["is_first"]
        batch = batch.reshape(-1, self.length)
        batch["is_first"][:, 0] = True
        return batch
