"""Whole episodes in a clip store: `EpisodeWriter` makes them of steps, `EpisodeStorage` keeps them.

L steps in TorchRL's layout give L + 1 frames in DreamerV2's, each stored once: see
:func:`prelar_trl.data.to_frames`.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from tensordict import LazyStackedTensorDict, TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Writer

from prelar_trl.data.layout import check_frames, to_frames
from prelar_trl.data.storage import FrameStorage
from prelar_trl.data.store import MappedShards, read_meta
from prelar_trl.data.writer import ClipWriter
from prelar_trl.tensor_files import read_tensors

logger = logging.getLogger(__name__)
_KEYS = ("pixels", "action", ("next", "pixels"), ("next", "reward"), ("next", "done"))
_FLOATS = {"action": "[A]", ("next", "reward"): "[1]", "vector": "[V]", ("next", "vector"): "[V]"}
_FLAGS = (("next", "done"), ("next", "terminated"), "is_first")
_TRAJECTORY = ("collector", "traj_ids")
_MASK = ("collector", "mask")
_STREAMS = {
    "pixels": "pixels",
    "action": "actions",
    "reward": "rewards",
    "terminated": "terminated",
    "vector": "vectors",  # only where the environment gives it
}
_SHARDS = 8  # at least so many, so that deleting the oldest keeps the disk near the capacity
_SHARD_BYTES = 2**28


class EpisodeStorage(FrameStorage):
    """A ring of ``capacity`` frames in a clip store, an episode a clip.

    The oldest shards are deleted. ``num_written`` episodes were ever appended.

    Raises:
        ValueError: the folder holds something else, or a replay of another capacity.
    """

    def __init__(self, path: Path, capacity: int, *, pin_memory: bool = False) -> None:
        super().__init__(capacity, pin_memory=pin_memory)
        self.path = path
        self._held: list[int] = []  # first episodes of states, see `hold`
        self._open()

    def _open(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        self._store: ClipWriter | None = None
        if (self.path / "store.json").exists():
            meta = read_meta(self.path)
            self._open_store(meta["height"], meta["width"], meta["shard_bytes"])
        elif any(self.path.iterdir()):
            raise ValueError(
                f"{str(self.path)!r} is not empty and holds no replay: name another folder"
            )
        clips = self._store.clips if self._store else []
        self.num_written = int(clips[-1].name) + 1 if clips else 0
        self._sync_clips()

    def _open_store(self, height: int, width: int, shard_bytes: int) -> ClipWriter:
        self._store = ClipWriter(
            self.path,
            source="replay",
            height=height,
            width=width,
            shard_bytes=shard_bytes,
            info={"capacity": self.max_size},
            keep_damaged=True,
        )
        for name in sorted(self._store.damaged):
            logger.warning("episode %s of %s is damaged and left out", name, self.path)
        return self._store

    def _sync_clips(self) -> None:
        store = self._store
        clips = store.clips if store else []
        where = np.array([(0, c.shard, c.row) for c in clips], np.int64).reshape(-1, 3)
        frames = np.array([c.frames for c in clips], np.int64)
        start = 0
        shards: Sequence[MappedShards] = ()
        if store is not None and clips:
            start = store.num_evicted_frames
            shards = self._shards or [MappedShards(self.path, store.streams)]
            self.streams = {k: x for k, x in _STREAMS.items() if x in store.streams}
        first = self.num_written - len(clips)
        self.set_clips(shards, frames, where, start=start, first=first)

    def episodes(self) -> dict[str, Any]:
        """The whole clips; those that were found damaged have no frames."""
        episodes = super().episodes()
        if self._store is not None and self._store.damaged:
            kept = [clip.name not in self._store.damaged for clip in self._store.clips[self.whole]]
            episodes["lengths"] = episodes["lengths"] * torch.tensor(kept)
        return episodes

    def _reopen(self) -> None:
        """Go on with a store that was closed, or that an error has let go of."""
        if self._store is not None and self._store.released:
            self._open()

    def append(self, frames: TensorDict) -> Tensor:
        """Writes one episode ``[L + 1]``, as `to_frames` gives it; returns its indices int64.

        Raises:
            ValueError: it is longer than the capacity, or its shapes differ.
            OSError: no space is left; what was appended before is safe.
        """
        if len(frames) > self.max_size:
            raise ValueError(f"an episode of {len(frames)} frames exceeds capacity={self.max_size}")
        arrays = {
            name: cast(Tensor, frames[key]).contiguous().numpy()
            for key, name in _STREAMS.items()
            if key in frames.keys()
        }
        self._reopen()
        store = self._store
        if store is None:
            frame = arrays["pixels"][0]
            shard_bytes = min(_SHARD_BYTES, self.max_size * frame.size // _SHARDS)
            store = self._open_store(frame.shape[1], frame.shape[2], shard_bytes)
        store.add_streams(arrays, name=f"{self.num_written:06d}")
        self.num_written += 1
        self._sync_clips()
        kept = self._end - self.max_size  # places below are overwritten
        before = int(np.searchsorted(self._start + self._frames, kept, side="right"))
        if self._held:
            before = min(before, max(0, min(self._held) - self._first))
        if store.evict(before):
            self._shards = ()  # a deleted file keeps its space while it is mapped
            self._sync_clips()
        return torch.arange(self._end - len(frames), self._end) % self.max_size

    def episode(self, number: int) -> TensorDict:
        """All frames of one whole clip, 0 the oldest."""
        start = int(self._start[self.whole][number])
        frames = int(self._frames[self.whole][number])
        return self.get(torch.arange(start, start + frames) % self.max_size)

    def frame_shapes(self) -> dict[str, list[int]]:
        """Shape of one frame of each key; empty before the first episode."""
        streams = self._store.streams if self._store else {}
        return {k: list(streams[name].shape) for k, name in _STREAMS.items() if name in streams}

    def close(self) -> None:
        """Finishes the clip store, so that others can read it; opening it again continues."""
        if self._store is not None:
            self._store.close() if self._store.num_clips else self._store.release()

    def state_dict(self) -> dict[str, Any]:
        """How many episodes were written; these are on the disk then."""
        if self._store is not None:
            self._store.sync()
        first = self._first + self.whole.start
        return {"end": self.num_written, "first": first, "held": [*self._held]}

    def hold(self, state_dict: dict[str, Any], count: int) -> None:
        """Deletes nothing that this state or the ``count - 1`` that were held before it know."""
        self._held = [*self._held, state_dict["first"]][-count:]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `EpisodeReplay.load_state_dict`."""
        end = state_dict["end"]
        if end > self.num_written:
            ends = (
                f"the replay in {str(self.path)!r} ends at episode {self.num_written}, the "
                f"checkpoint at {end}"
            )
            if not self.num_written:
                raise ValueError(f"{ends}: it is another folder, or files of it are missing")
            logger.warning("%s: the last ones are lost", ends)
        self._reopen()
        if self._store is not None and end < self.num_written:
            clips = self._store.clips
            self._store.truncate(sum(int(clip.name) < end for clip in clips))
            self.num_written, self._shards = end, ()
            self._sync_clips()
        if (gone := self._first - state_dict["first"]) > 0:
            deleted = "%d episodes that the state knew are deleted from the replay in %s"
            logger.warning(deleted, gone, self.path)
        self._held = [*state_dict["held"], state_dict["first"]]

    def dumps(self, path: str | Path) -> None:
        """Copies the clip store to the folder ``path``; what was there is deleted."""
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(self.path, path)

    def loads(self, path: str | Path) -> None:
        """Takes what `dumps` wrote; ValueError if that has another capacity."""
        path = Path(path)
        if any(path.iterdir()):
            capacity = read_meta(path)["info"].get("capacity")
            if capacity != self.max_size:
                raise ValueError(f"{str(path)!r} has capacity={capacity}, not {self.max_size}")
        if self._store is not None:
            self._store.release()
        shutil.rmtree(self.path)
        shutil.copytree(path, self.path)
        self._shards = ()
        self._open()


class EpisodeWriter(Writer):
    """Cuts TorchRL's steps into episodes and appends each to an `EpisodeStorage` when it ends."""

    _storage: EpisodeStorage

    def __init__(self) -> None:
        super().__init__()
        self.pending: dict[Hashable, list[TensorDict]] = {}

    def add(self, data: TensorDictBase) -> Tensor:
        return self.extend(data.reshape(1, 1))

    def extend(self, data: TensorDictBase) -> Tensor:
        """See `EpisodeReplay.extend`."""
        if not data.ndim:
            raise ValueError("extend needs a time dimension: use add for a single step")
        if isinstance(data, LazyStackedTensorDict):  # a collector's
            data = data.contiguous()
        if not data.numel():
            raise ValueError(f"data of batch {list(data.shape)} hold no step")
        data = data.reshape(-1, data.shape[-1])  # [N, T]
        self._check(data)
        written = [torch.zeros(0, dtype=torch.int64)]
        no = torch.zeros(data.shape, dtype=torch.bool)
        flags = (("next", "done"), "is_first", ("next", "dropped"))
        done, first, lost = (data.get(key, no).reshape(data.shape).cpu() for key in flags)
        workers = torch.arange(len(data)).unsqueeze(1).expand(data.shape)
        ids = data.get(_TRAJECTORY, workers).reshape(data.shape).cpu()
        has_ids = _TRAJECTORY in data.keys(include_nested=True)
        for worker in range(len(data)):
            for begin, end in _pieces(done[worker], first[worker], ids[worker]):
                number = int(ids[worker, begin])
                key = ("trajectory", number) if has_ids else number
                if bool(lost[worker, end - 1]):
                    self.pending.pop(key, None)
                    continue
                if bool(first[worker, begin]) and key in self.pending:
                    written.append(self._finish(key))
                rows = _rows(data[worker, begin:end], new=key not in self.pending)
                self.pending.setdefault(key, []).append(rows)
                if bool(done[worker, end - 1]):
                    written.append(self._finish(key))
        return torch.cat(written)

    def _finish(self, key: Hashable) -> Tensor:
        return self._storage.append(cast(TensorDict, TensorDict.cat(self.pending.pop(key))))

    def _check(self, data: TensorDictBase) -> None:
        keys = data.keys(include_nested=True, leaves_only=True)
        if _MASK in keys and not bool(data[_MASK].all()):
            raise ValueError("the data are padded: make the collector with split_trajs=False")
        if missing := [k for k in _KEYS if k not in keys]:
            raise ValueError(f"the data lack {', '.join(map(str, missing))}")
        for key in ("pixels", ("next", "pixels")):
            pixels = data[key]
            is_image = pixels.dtype == torch.uint8 and pixels.ndim == 5
            if not is_image or not pixels.numel() or pixels.shape[2] % 3:
                raise ValueError(
                    f"{key} must be uint8 [3, H, W] per step (or 3 channels a picture), got "
                    f"{pixels.dtype} {list(pixels.shape[2:])}"
                )
        for key in ("pixels", "vector"):
            now, after = (
                list(data[k].shape[2:]) if k in keys else None for k in (key, ("next", key))
            )
            if now != after:
                raise ValueError(f"{key} is {now} per step, but {after} in next")
        if _TRAJECTORY in keys and data[_TRAJECTORY].numel() != data.numel():
            shape = list(data[_TRAJECTORY].shape[2:])
            raise ValueError(f"{_TRAJECTORY} must be one number per step, got {shape}")
        for key in (*_FLOATS, *_FLAGS):
            if key not in keys:
                continue
            value, form = data[key], _FLOATS.get(key, "[1]")
            is_whole = value.numel() == data.numel() if form == "[1]" else value.numel() > 0
            if not is_whole or (key == "action" and value.ndim != 3):
                raise ValueError(f"{key} must be {form} per step, got {list(value.shape[2:])}")
            if not (value.is_floating_point() if key in _FLOATS else value.dtype == torch.bool):
                kind = "floating point" if key in _FLOATS else "bool"
                raise ValueError(f"{key} must be {kind}, got {value.dtype}")
            if not bool(value.isfinite().all()):
                worker, step = (~value.isfinite()).nonzero()[0, :2].tolist()
                raise ValueError(f"{key} is NaN or infinite at step {step} of environment {worker}")
        have = self._storage.frame_shapes() or self._pending_shapes()
        for key in ("pixels", "action", "vector"):
            got = list(data[key].shape[2:]) if key in keys else None
            if have and have.get(key) != got:
                raise ValueError(
                    f"{key} has shape {got} per step; the replay in {str(self._storage.path)!r} "
                    f"holds {have.get(key)}"
                )

    def _pending_shapes(self) -> dict[str, list[int]]:
        """As the storage's, of what is unfinished."""
        for rows, *_ in self.pending.values():
            return {str(key): list(value.shape[1:]) for key, value in rows.items()}
        return {}

    def _empty(self, empty_write_count: bool = True) -> None:
        self.pending.clear()

    def state_dict(self) -> dict[str, Any]:
        """The unfinished episodes."""
        return {"pending": {key: TensorDict.cat(rows) for key, rows in self.pending.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on with those; ValueError if one is no episode: nothing has changed then."""
        for rows in state_dict["pending"].values():
            check_frames(rows)
        self.pending = {key: [rows.clone()] for key, rows in state_dict["pending"].items()}

    def dumps(self, path: str | Path) -> None:
        """Writes the unfinished episodes to ``pending.pt`` in the folder ``path``."""
        Path(path).mkdir(parents=True, exist_ok=True)
        pending = {key: rows.to_dict() for key, rows in self.state_dict()["pending"].items()}
        torch.save(pending, Path(path, "pending.pt"))

    def loads(self, path: str | Path) -> None:
        """Reads what `dumps` wrote; ValueError if it is damaged or something else."""
        file = Path(path, "pending.pt")
        pending = read_tensors(file)
        try:
            rows = {key: TensorDict(x, [len(x["pixels"])]) for key, x in pending.items()}
            self.load_state_dict({"pending": rows})
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{file} holds no unfinished episodes ({error!r})") from error


def _pieces(done: Tensor, first: Tensor, number: Tensor) -> list[tuple[int, int]]:
    """Cuts ``[T]`` behind a ``done``, before a ``first`` and where another number begins."""
    begin = torch.ones_like(done)
    begin[1:] = done[:-1] | first[1:] | (number[1:] != number[:-1])
    begins = begin.nonzero().squeeze(-1).tolist()
    return list(zip(begins, [*begins[1:], len(done)], strict=True))


def _rows(steps: TensorDictBase, new: bool) -> TensorDict:
    """TorchRL's ``[L]`` steps as frames: ``[L + 1]`` if an episode begins, else ``[L]``."""
    frames = to_frames(steps).cpu()
    for key in ("action", "reward", "vector"):
        if key in frames.keys():
            frames[key] = frames[key].float()
    return frames if new else frames[1:].clone()
