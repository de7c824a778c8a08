"""`VideoClips`: windows of T frames out of clip stores, as TensorDicts."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from prelar_trl.data.store import ACTIONS, ClipStore
from prelar_trl.data.windows import Law, Windows, WindowSampler

Split = Literal["all", "train", "heldout"]
Paths = str | Path | Sequence[str | Path] | Mapping[str | Path, float]


class VideoClips:
    """Samples windows of consecutive frames from one or several clip stores.

    A batch holds no actions, but for those of a few clips if ``labels`` asks for them; all of them
    are kept for probes, see `sample_with_actions`.

    Args:
        path: a store; or a list of stores, as if they were one; or a mapping ``store: weight``, a
            mixture in which each store is drawn in proportion to its weight.
        clip_len: frames T of a window. Shorter clips are left out, see `num_too_short`.
        batch_size: windows B of a batch.
        seed: seed of the draws.
        device: where the batch goes; for CUDA through pinned memory, without blocking.
        split: ``train`` and ``heldout`` divide by clip: by the split that the store records if it
            records one, else the ``heldout`` share of clips with the smallest hash of their name.
        heldout: share of the clips held out, at least one clip.
        law: how windows are drawn, see `prelar_trl.data.windows`.
        streams: image streams of a batch, e.g. ``("pixels", "flow")``.
        labels: of so many clips (a share below 1, or a number) a batch also tells the true actions.
            Which ones depends on ``seed`` and their names. The first rows of a batch, as large a
            share of it but at least one, are drawn from them. Default: 0, none.
        prefetch: batches that a thread prepares ahead. They count as not drawn for `state_dict`.
        rank, world_size: this process's disjoint share of one stream of windows.

    Raises:
        FileNotFoundError, StoreError: a store is missing, unfinished, damaged or foreign.
        ValueError: no clip is long enough, an unknown stream or split, stores of unlike sizes,
            labels of stores without actions or of more clips than there are.
    """

    def __init__(
        self,
        path: Paths,
        clip_len: int = 25,
        batch_size: int = 16,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        split: Split = "all",
        heldout: float = 0.1,
        law: Law = "episodes",
        streams: Sequence[str] = ("pixels",),
        labels: float = 0,
        prefetch: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.stores, weights = _open(path)
        self.clip_len, self.batch_size = clip_len, batch_size
        self.device = torch.device(device)
        self.streams = tuple(streams)
        self._check_streams()
        self._select(split, heldout)
        sampler = dict(law=law, rank=rank, world_size=world_size)
        self.sampler = WindowSampler(clip_len, seed=seed, **sampler)
        self._probe_sampler = WindowSampler(clip_len, seed=seed + 1, **sampler)
        for each in (self.sampler, self._probe_sampler):
            each.set_episodes(self._lengths, groups=self._store, group_weights=weights)
        if not self.sampler.num_eligible:
            raise ValueError(
                f"clip_len={clip_len}, but the longest of the {len(self._lengths)} clips in "
                f"{self._where()} has {int(self._lengths.max())} frames: lower clip_len, or add "
                "longer clips"
            )
        self._label_sampler: WindowSampler | None = None
        if labels:
            self._choose_labeled(labels, seed, sampler)
        self._prefetch = prefetch
        self._executor = ThreadPoolExecutor(1, "clips") if prefetch else None
        self._pending: deque[tuple[dict[str, Any], Future[TensorDict]]] = deque()

    @property
    def num_clips(self) -> int:
        """Clips of the split that are long enough."""
        return self.sampler.num_eligible

    @property
    def num_too_short(self) -> int:
        """Clips of the split that are shorter than ``clip_len``."""
        return len(self._lengths) - self.num_clips

    @property
    def num_frames(self) -> int:
        """Frames of the clips that are long enough."""
        return int(self._lengths[self._lengths >= self.clip_len].sum())

    @property
    def action_dim(self) -> int:
        """Size A of the stored actions.

        Raises:
            ValueError: a store has no actions.
        """
        self._need_actions("")
        return self.stores[0].streams[ACTIONS].shape[0]

    def sample(self) -> TensorDict:
        """Draws a batch.

        Returns:
            TensorDict ``[B, T]``: ``pixels`` uint8 ``[B, T, 3, H, W]``, further ``streams`` alike,
            and ``is_first`` bool ``[B, T, 1]``, True at t = 0 only. With ``labels`` also ``action``
            float32 ``[B, T, A]`` (that led to the frame) and ``labeled`` bool ``[B, T, 1]``: where
            the action is known; elsewhere it is zero.
        """
        if self._executor is None:
            return self._to_device(self._read(self._draw(), self.streams))
        while len(self._pending) <= self._prefetch:
            state = self._sampler_state()
            windows = self._draw()
            future = self._executor.submit(self._read, windows, self.streams)
            self._pending.append((state, future))
        _, future = self._pending.popleft()
        return self._to_device(future.result())

    def sample_with_actions(self) -> TensorDict:
        """Draws a batch for a probe: as `sample`, and ``action`` float32 ``[B, T, A]``.

        Row t holds the action that led to frame t. The draws have a generator of their own, so that
        probing does not change what `sample` gives.

        Raises:
            ValueError: a store has no actions.
        """
        self._need_actions(" to probe")
        windows = self._probe_sampler.draw(self.batch_size)
        batch = self._read(windows, (*self.streams, ACTIONS))
        return self._to_device(batch.rename_key_(ACTIONS, "action"))

    def __iter__(self) -> VideoClips:
        return self

    def __next__(self) -> TensorDict:
        return self.sample()

    def state_dict(self) -> dict[str, Any]:
        """The state from which the next `sample` follows."""
        return {
            **(self._pending[0][0] if self._pending else self._sampler_state()),
            "probe": self._probe_sampler.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken, over the same stores and settings."""
        self._pending.clear()
        self.sampler.load_state_dict(state_dict["sampler"])
        self._probe_sampler.load_state_dict(state_dict["probe"])
        if self._label_sampler is not None:
            self._label_sampler.load_state_dict(state_dict["labels"])

    def _sampler_state(self) -> dict[str, Any]:
        state = {"sampler": self.sampler.state_dict()}
        if self._label_sampler is not None:
            state["labels"] = self._label_sampler.state_dict()
        return state

    def _choose_labeled(self, labels: float, seed: int, options: dict[str, Any]) -> None:
        """The clips whose actions are told, and the sampler of the rows that hold them."""
        self._need_actions(" for labels")
        eligible = (self._lengths >= self.clip_len).nonzero().flatten().tolist()
        count = round(labels * len(eligible)) if labels < 1 else int(labels)
        if labels < 0 or count > len(eligible):
            raise ValueError(f"labels={labels}: there are {len(eligible)} clips to label")
        if labels > 1 and labels != count:
            raise ValueError(f"labels={labels} is neither a share below 1 nor a number of clips")
        names = [self.stores[self._store[i]].names[self._clip[i]] for i in eligible]
        keys = [hashlib.sha256(f"{seed}/{name}".encode()).digest() for name in names]
        order = sorted(range(len(eligible)), key=keys.__getitem__)
        chosen = torch.tensor([eligible[i] for i in order[: max(1, count)]])
        self._labeled = torch.zeros(len(self._lengths), dtype=torch.bool)
        self._labeled[chosen] = True
        share = len(chosen) / len(eligible)
        self._label_rows = max(1, round(share * self.batch_size))
        self._label_sampler = WindowSampler(self.clip_len, seed=seed + 2, **options)
        self._label_sampler.set_episodes(torch.where(self._labeled, self._lengths, 0))

    def _need_actions(self, purpose: str) -> None:
        for store in self.stores:
            if ACTIONS not in store.streams:
                raise ValueError(f"clip store {str(store.path)!r} holds no actions{purpose}")
        sizes = sorted({store.streams[ACTIONS].shape[0] for store in self.stores})
        if len(sizes) > 1:
            raise ValueError(f"the stores {self._where()} hold actions of unlike sizes: {sizes}")

    def _draw(self) -> Windows:
        if self._label_sampler is None:
            return self.sampler.draw(self.batch_size)
        rows = self._label_rows
        labeled = self._label_sampler.draw(rows)
        if rows == self.batch_size:
            return labeled
        others = self.sampler.draw(self.batch_size - rows)
        return Windows(
            torch.cat([labeled.episode, others.episode]),
            torch.cat([labeled.start, others.start]),
            torch.cat([labeled.frames, others.frames]),
            torch.cat([labeled.offset, others.offset + rows * self.clip_len]),
        )

    def _where(self) -> str:
        return ", ".join(repr(str(store.path)) for store in self.stores)

    def _check_streams(self) -> None:
        shapes = {store.size for store in self.stores}
        if len(shapes) > 1:
            sizes = ", ".join(f"{h}x{w}" for h, w in sorted(shapes))
            raise ValueError(f"the stores {self._where()} have frames of unlike sizes: {sizes}")
        for store in self.stores:
            images = [s.name for s in store.streams.values() if s.is_image]
            for name in self.streams:
                if name not in images:
                    raise ValueError(
                        f"clip store {str(store.path)!r} has no image stream {name!r}: "
                        f"it has {', '.join(images)}"
                    )

    def _select(self, split: Split, heldout: float) -> None:
        clips: list[np.ndarray] = [_clips_of(store, split, heldout) for store in self.stores]
        self._clip = torch.from_numpy(np.concatenate(clips))
        self._store = torch.cat([torch.full((len(c),), i) for i, c in enumerate(clips)])
        lengths = [store.frames[c] for store, c in zip(self.stores, clips, strict=True)]
        self._lengths = torch.from_numpy(np.concatenate(lengths))
        if not len(self._lengths):
            raise ValueError(f"split={split!r} of {self._where()} holds no clip")

    def _read(self, windows: Windows, streams: Sequence[str]) -> TensorDict:
        rows, steps = self.batch_size, self.clip_len
        own = (self._store[windows.episode], self._clip[windows.episode])
        pieces = (*own, windows.start, windows.frames, windows.offset)
        places = torch.stack(pieces, -1)
        batch = {name: self._read_stream(name, places.tolist()) for name in streams}
        is_first = torch.zeros(rows * steps, 1, dtype=torch.bool)
        is_first[windows.offset] = True
        batch["is_first"] = is_first
        if self._label_sampler is not None and ACTIONS not in streams:
            known = self._labeled[windows.episode]
            batch["action"] = self._read_stream(ACTIONS, places[known].tolist())
            frames = known.repeat_interleave(windows.frames)
            batch["labeled"] = frames.unsqueeze(-1)
        split = {name: x.unflatten(0, (rows, steps)) for name, x in batch.items()}  # [B, T, ...]
        return TensorDict(split, batch_size=[rows, steps])

    def _read_stream(self, name: str, places: list[list[int]]) -> Tensor:
        """One stream of the windows at ``places`` (store, clip, start, frames, offset)."""
        spec = self.stores[0].streams[name]
        out = torch.zeros(
            self.batch_size * self.clip_len,
            *spec.shape,
            dtype=getattr(torch, spec.dtype),
            pin_memory=self.device.type == "cuda",
        )
        array = out.numpy()
        for store, clip, start, frames, _ in places:
            self.stores[store].announce(clip, name, start, frames)
        for store, clip, start, frames, offset in places:
            array[offset : offset + frames] = self.stores[store].read(clip, name, start, frames)
        return out  # [B*T, ...]

    def _to_device(self, batch: TensorDict) -> TensorDict:
        return batch if self.device.type == "cpu" else batch.to(self.device, non_blocking=True)


def _open(path: Paths) -> tuple[list[ClipStore], Tensor | None]:
    if isinstance(path, Mapping):
        weights = torch.tensor([float(w) for w in path.values()], dtype=torch.float64)
        if not len(path) or not bool((weights > 0).all()):
            raise ValueError(f"the weights of a mixture must be positive, got {dict(path)}")
        return [ClipStore(p) for p in path], weights
    paths = [path] if isinstance(path, str | Path) else list(path)
    if not paths:
        raise ValueError("no clip store was named")
    return [ClipStore(p) for p in paths], None


def _clips_of(store: ClipStore, split: Split, heldout: float) -> np.ndarray:
    """Indices of the clips of one split, int64, ascending."""
    if split not in ("all", "train", "heldout"):
        raise ValueError(f"split={split!r} is unknown: choose all, train or heldout")
    every = np.arange(len(store))
    if split == "all":
        return every
    if any(s is not None for s in store.splits):
        return every[[s == split for s in store.splits]]
    if not 0 < heldout < 1:
        raise ValueError(f"heldout={heldout} must lie between 0 and 1")
    if len(store) < 2:
        raise ValueError(
            f"clip store {str(store.path)!r} has one clip only: nothing can be held out, use "
            "split=all"
        )
    keys = [hashlib.sha256(name.encode("utf-8")).digest() for name in store.names]
    order = sorted(range(len(store)), key=keys.__getitem__)
    count = min(max(1, round(heldout * len(store))), len(store) - 1)
    held = np.zeros(len(store), dtype=bool)
    held[order[:count]] = True
    return every[held] if split == "heldout" else every[~held]
