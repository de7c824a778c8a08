"""`VideoClips`: windows of T frames out of clip stores, as TensorDicts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor
from torchrl.data import ImmutableDatasetWriter, ReplayBuffer
from torchrl.data.replay_buffers.samplers import Sampler

from prelar_trl.data.storage import FrameStorage, Prefetcher
from prelar_trl.data.store import ACTIONS, ClipStore
from prelar_trl.data.windows import FixedShareSampler, Strategy, WindowSampler
from prelar_trl.utils import check_choice, check_integers

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
        strategy: how windows are drawn, see `prelar_trl.data.windows`.
        streams: image streams of a batch, e.g. ``("pixels", "flow")``.
        labels: of so many clips (a share below 1, or a number) a batch also tells the true actions.
            Which ones depends on ``seed`` and on the names of the clips that can be drawn. The
            first rows of a batch, as large a share of it but at least one, are drawn from them, the
            others from all clips: of a mixture each part by the weights of its stores; with
            ``strategy="epoch"`` each part has epochs of its own. Default: 0, none.
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
        strategy: Strategy = "episodes",
        streams: Sequence[str] = ("pixels",),
        labels: float = 0,
        prefetch: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        check_integers(clip_len=clip_len, batch_size=batch_size)
        self.stores, self._weights = _open(path)
        self.clip_len, self.batch_size = clip_len, batch_size
        self.device = torch.device(device)
        self.streams = tuple(streams)
        self._check_streams()
        self.storage = self._select(split, heldout)
        make_sampler = partial(
            WindowSampler, clip_len, strategy=strategy, rank=rank, world_size=world_size
        )
        self.sampler = make_sampler(seed=seed)
        self._probe_sampler = make_sampler(seed=seed + 1)
        self.sampler.sync(self.storage)
        if not self.sampler.num_eligible:
            raise ValueError(
                f"clip_len={clip_len}, but the longest of the {len(self._lengths)} clips in "
                f"{self._where()} has {int(self._lengths.max())} frames: lower clip_len, or add "
                "longer clips"
            )
        self._labeled = torch.zeros(0, dtype=torch.bool)
        sampler: Sampler = self.sampler
        if labels:
            self._labeled = self._choose_labeled(labels, seed)
            self.storage.streams["action"] = ACTIONS
            rows = max(1, round(float(self._labeled.sum()) / self.num_clips * batch_size))
            labeled = make_sampler(seed=seed + 2)
            lengths = torch.where(self._labeled, self._lengths, 0)
            labeled.set_episodes(**{**self.storage.episodes(), "lengths": lengths})
            sampler = FixedShareSampler(labeled, self.sampler, rows)
        self.buffer = ReplayBuffer(
            storage=self.storage,
            sampler=sampler,
            writer=ImmutableDatasetWriter(),
            collate_fn=lambda frames: frames,
            batch_size=batch_size * clip_len,
        )
        self._prefetcher = Prefetcher(self.buffer, clip_len, prefetch)

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
    def fingerprint(self) -> str:
        """Digest of the stores' contents and weights, wherever they lie; 64 hexadecimal digits."""
        shards = [store.meta["shards"] for store in self.stores]  # with the SHA-256 of each file
        weights = None if self._weights is None else self._weights.tolist()
        return _digest(json.dumps([shards, weights], sort_keys=True)).hex()

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
        batch = self._prefetcher.next()
        episode = batch.pop("episode")
        if "action" in self.storage.streams:
            batch["labeled"] = self._labeled[episode]
            batch["action"] = batch["action"] * batch["labeled"]
        return batch.to(self.device, non_blocking=True)

    def sample_with_actions(self) -> TensorDict:
        """Draws a batch for a probe: as `sample`, and ``action`` float32 ``[B, T, A]``.

        Row t holds the action that led to frame t. The draws have a generator of their own, so that
        probing does not change what `sample` gives.

        Raises:
            ValueError: a store has no actions.
        """
        self._need_actions(" to probe")
        index, _ = self._probe_sampler.sample(self.storage, self.batch_size * self.clip_len)
        batch = self.storage.read(index.numpy(), self.storage.streams | {"action": ACTIONS})
        batch = batch.exclude("episode").reshape(self.batch_size, self.clip_len)
        batch["is_first"][:, 0] = True
        return batch.to(self.device, non_blocking=True)

    def __iter__(self) -> VideoClips:
        return self

    def __next__(self) -> TensorDict:
        return self.sample()

    def state_dict(self) -> dict[str, Any]:
        """The state from which the next `sample` follows."""
        state = self._prefetcher.state_dict()
        if not isinstance(self.buffer.sampler, FixedShareSampler):
            state = {"sampler": state}
        probe = self._probe_sampler.state_dict()
        return {**state, "probe": probe, "fingerprint": self.fingerprint}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken, over the same stores and settings.

        Raises:
            ValueError: the stores hold other clips than then.
        """
        before = state_dict.get("fingerprint", self.fingerprint)  # older states have none
        if before != self.fingerprint:
            raise ValueError(
                f"the clips in {self._where()} are others than when this run was stopped "
                f"(fingerprint {self.fingerprint[:12]}, not {before[:12]}): bring the store back "
                "as it was, or start a new run"
            )
        labeled = isinstance(self.buffer.sampler, FixedShareSampler)
        self._prefetcher.load_state_dict(state_dict if labeled else state_dict["sampler"])
        self._probe_sampler.load_state_dict(state_dict["probe"])

    def _choose_labeled(self, labels: float, seed: int) -> Tensor:
        """The clips whose actions are told, bool ``[E]``."""
        self._need_actions(" for labels")
        eligible = (self._lengths >= self.clip_len).nonzero().flatten().tolist()
        if not 0 <= labels < float("inf"):
            raise ValueError(f"labels={labels} must be a share below 1 or a number of clips")
        count = round(labels * len(eligible)) if labels < 1 else int(labels)
        if count > len(eligible):
            raise ValueError(f"labels={labels}: there are {len(eligible)} clips to label")
        if labels > 1 and labels != count:
            raise ValueError(f"labels={labels} is neither a share below 1 nor a number of clips")
        order = sorted(eligible, key=lambda clip: _digest(f"{seed}/{self._names[clip]}"))
        labeled = torch.zeros(len(self._lengths), dtype=torch.bool)
        labeled[order[: max(1, count)]] = True
        return labeled

    def _need_actions(self, purpose: str) -> None:
        for store in self.stores:
            if ACTIONS not in store.streams:
                raise ValueError(f"clip store {str(store.path)!r} holds no actions{purpose}")
        sizes = sorted({store.streams[ACTIONS].shape[0] for store in self.stores})
        if len(sizes) > 1:
            raise ValueError(f"the stores {self._where()} hold actions of unlike sizes: {sizes}")

    def _where(self) -> str:
        return ", ".join(repr(str(store.path)) for store in self.stores)

    def _check_streams(self) -> None:
        shapes = {store.size for store in self.stores}
        if len(shapes) > 1:
            sizes = ", ".join(f"{h}x{w}" for h, w in sorted(shapes))
            raise ValueError(f"the stores {self._where()} have frames of unlike sizes: {sizes}")
        if not self.streams:
            raise ValueError("streams=() must name image streams, such as pixels")
        for store in self.stores:
            uint8 = [s for s in store.streams.values() if s.dtype == "uint8"]
            images = [s.name for s in uint8 if len(s.shape) == 3]
            for name in self.streams:
                if name not in images:
                    raise ValueError(
                        f"clip store {str(store.path)!r} has no image stream {name!r}: "
                        f"it has {', '.join(images)}"
                    )

    def _select(self, split: Split, heldout: float) -> FrameStorage:
        """The frames of the clips of the split, one behind the other."""
        clips = [_clips_of(store, split, heldout) for store in self.stores]
        pairs = list(zip(self.stores, clips, strict=True))
        self._names = [store.names[clip] for store, own in pairs for clip in own]
        if not self._names:
            raise ValueError(f"split={split!r} of {self._where()} holds no clip")
        frames = np.concatenate([store.frames[own] for store, own in pairs])
        where = [
            np.column_stack([np.full(len(own), number), store.shard[own], store.row[own]])
            for number, (store, own) in enumerate(pairs)
        ]
        storage = FrameStorage(int(frames.sum()), pin_memory=self.device.type == "cuda")
        storage.streams = {name: name for name in self.streams}
        shards = [store.shards for store in self.stores]
        storage.set_clips(shards, frames, np.concatenate(where), weights=self._weights)
        self._lengths = torch.from_numpy(frames)
        return storage


def _open(path: Paths) -> tuple[list[ClipStore], Tensor | None]:
    if isinstance(path, Mapping):
        weights = torch.tensor([float(w) for w in path.values()], dtype=torch.float64)
        if not len(path) or not bool(((weights > 0) & weights.isfinite()).all()):
            raise ValueError(f"the weights of a mixture must be positive, got {dict(path)}")
        return [ClipStore(p) for p in path], weights
    paths = [path] if isinstance(path, str | Path) else list(path)
    if not paths:
        raise ValueError("no clip store was named")
    return [ClipStore(p) for p in paths], None


def _clips_of(store: ClipStore, split: Split, heldout: float) -> np.ndarray:
    """Indices of the clips of one split, int64, ascending."""
    check_choice("split", split, get_args(Split))
    every = np.arange(len(store))
    if split == "all":
        return every
    if any(s is not None for s in store.splits):
        return every[[s == split for s in store.splits]]
    if not 0 < heldout < 1:
        raise ValueError(f"heldout={heldout} must lie between 0 and 1")
    if len(store) < 2:
        only = f"clip store {str(store.path)!r} has one clip only"
        raise ValueError(f"{only}: nothing can be held out, use split=all")
    order = sorted(range(len(store)), key=lambda clip: _digest(store.names[clip]))
    count = min(max(1, round(heldout * len(store))), len(store) - 1)
    return every[np.isin(every, order[:count]) == (split == "heldout")]


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8")).digest()
