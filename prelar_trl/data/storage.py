"""`FrameStorage`: clips of stores as a TorchRL storage of frames; `Prefetcher`: batches of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from tensordict import TensorDict
from torchrl.data import ReplayBuffer
from torchrl.data.replay_buffers.storages import Storage

from prelar_trl.data.store import MappedShards
from prelar_trl.utils import check_integers

Index = int | slice | torch.Tensor | np.ndarray | tuple[torch.Tensor]


class FrameStorage(Storage):
    """Frames of clips, one behind the other: index ``start of the clip + t`` is its frame t.

    `get` reads frames. Beside the streams it gives ``episode`` int64 ``[..., 1]``, the clip's
    number, and ``is_first`` bool ``[..., 1]``, True where a frame does not follow the one before
    it in the index. A slice, ``storage[:]``, gives ``episode`` alone: it is what TorchRL's slice
    samplers ask a storage for, and whole streams would not fit in memory.

    Args:
        max_size: indices are below it. Clips may lie beyond: their frames take the places of those
            that are ``max_size`` before them, as in a ring.
        pin_memory: read into pinned memory, for a GPU.

    Attributes:
        streams: key of the batch -> stream of the store.
        revision: how often the clips were declared anew.
    """

    def __init__(self, max_size: int, *, pin_memory: bool = False) -> None:
        super().__init__(max_size)
        self.pin_memory = pin_memory
        self.streams: dict[str, str] = {}
        self.revision = -1
        none = np.zeros(0, np.int64)
        self.set_clips((), none, none.reshape(0, 3))

    def set_clips(
        self,
        shards: Sequence[MappedShards],
        frames: np.ndarray,
        where: np.ndarray,
        *,
        start: int = 0,
        first: int = 0,
        weights: torch.Tensor | None = None,
    ) -> None:
        """Declares the clips.

        Args:
            shards: the files of each store.
            frames: int64 ``[E]``: length.
            where: int64 ``[E, 3]``: store, shard, first frame within the shard.
            start, first: place of the first clip's first frame, and number of that clip.
            weights: ``[stores]``: how often each store is drawn, in any unit; see `WindowSampler`.
        """
        self._shards, self._first, self._weights = shards, first, weights
        self._start, self._frames, self._where = start + frames.cumsum() - frames, frames, where
        self.revision += 1
        self._end = start + int(frames.sum())

    @property
    def whole(self) -> slice:
        """The clips of which no frame has been overwritten."""
        return slice(int(np.searchsorted(self._start, self._end - self.max_size)), None)

    def episodes(self) -> dict[str, Any]:
        """The whole clips, as `WindowSampler.set_episodes` takes them."""
        whole = self.whole
        return {
            "lengths": torch.from_numpy(self._frames[whole]),
            "starts": torch.from_numpy(self._start[whole]),
            "capacity": self.max_size,
            "groups": torch.from_numpy(self._where[whole, 0]),
            "group_weights": self._weights,
        }

    def get(self, index: Index) -> TensorDict:
        """See the class."""
        if isinstance(index, slice):
            flat = np.arange(len(self))[index]
            _, _, episode = self._locate(flat)
            return TensorDict({"episode": torch.from_numpy(episode)}, [len(flat)])
        index = np.asarray(index[0] if isinstance(index, tuple) else index)
        return self.read(index.reshape(-1), self.streams).reshape(index.shape)

    def read(self, index: np.ndarray, streams: Mapping[str, str]) -> TensorDict:
        """As `get`, for an index ``[N]``, with the given streams."""
        clip, frame, episode = self._locate(index)
        cuts = np.flatnonzero((np.diff(clip) != 0) | (np.diff(frame) != 1)) + 1
        begin = np.concatenate([[0], cuts])
        length = np.diff(begin, append=len(index))
        where = self._where[clip[begin]]
        where[:, 2] += frame[begin]
        runs = np.column_stack([where, length, begin])[clip[begin] >= 0].tolist()
        batch = {key: self._read_stream(name, runs, len(index)) for key, name in streams.items()}
        is_first = torch.zeros(len(index), 1, dtype=torch.bool)
        is_first[begin] = True
        batch |= {"is_first": is_first, "episode": torch.from_numpy(episode).unsqueeze(-1)}
        return TensorDict(batch, [len(index)])

    def _locate(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Clip (-1: none), frame within it, and ``episode`` of each index ``[N]``.

        A place without a clip is an ``episode`` of its own below 0, too short for any window.
        """
        place = index + self.max_size * ((self._end - 1 - index) // self.max_size)
        clip = np.searchsorted(self._start, place, side="right") - 1
        frame = place - self._start[clip]
        known = (clip >= 0) & (frame < self._frames[clip])
        return np.where(known, clip, -1), frame, np.where(known, clip + self._first, -1 - index)

    def _read_stream(self, name: str, runs: list[list[int]], size: int) -> torch.Tensor:
        """One stream of the runs (store, shard, row, frames, offset in the batch)."""
        spec = self._shards[0].streams[name]
        dtype = getattr(torch, spec.dtype)
        out = torch.zeros(size, *spec.shape, dtype=dtype, pin_memory=self.pin_memory)
        array = out.numpy()
        for store, shard, row, frames, _ in runs:
            self._shards[store].prefetch(name, shard, row, frames)
        for store, shard, row, frames, offset in runs:
            array[offset : offset + frames] = self._shards[store].read(name, shard, row, frames)
        return out  # [size, ...]

    def __len__(self) -> int:
        return min(self._end, self.max_size)

    def set(self, cursor: Any, data: Any, *, set_cursor: bool = True) -> None:
        raise RuntimeError("a FrameStorage is written through its store, not by index")

    def contains(self, item: int) -> bool:
        return 0 <= item < len(self) and int(self._locate(np.array([item]))[0][0]) >= 0

    def _empty(self) -> None:
        raise RuntimeError("a FrameStorage cannot be emptied: the store is on the disk")

    def state_dict(self) -> dict[str, Any]:
        return {}  # the store is on the disk

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...

    def dumps(self, path: str | Path) -> None: ...

    def loads(self, path: str | Path) -> None: ...


class Drawn(NamedTuple):
    """A batch or why there is none, the sampler's state before, and the storage's revision then."""

    state: dict[str, Any]
    revision: int
    batch: TensorDict | Exception


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
        batch = self._drawn[0].result().batch
        if isinstance(batch, Exception):
            self.discard()
            raise batch
        self._drawn.popleft()
        return batch

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
        try:
            return Drawn(state, revision, self._sample())
        except Exception as error:  # of the one who asks for the batch
            return Drawn(state, revision, error)

    def _sample(self) -> TensorDict:
        batch, info = self.buffer.sample(return_info=True)
        if "is_first" in info:
            batch["is_first"] = info["is_first"]
        batch = batch.reshape(-1, self.length)
        batch["is_first"][:, 0] = True
        return batch
