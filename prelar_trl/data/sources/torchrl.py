"""Folders that TorchRL writes: its data sets, dumped replay buffers, memory-mapped TensorDicts.

::

    meta.json             dtype and shape of each entry, the batch shape [N] or [E, T]
    pixels.memmap, action.memmap, ...
    next/meta.json, next/pixels.memmap, next/done.memmap, ...

A buffer's lies in ``storage/``, with the number of rows that are filled in
``storage_metadata.json``, which does not say which dimension is time: only buffers of steps ``[N]``
are read. The arrays are read as they are: nothing in the folder is unpickled.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prelar_trl.data.sources.base import Clip, FrameOptions, Item, Source, leading_actions
from prelar_trl.data.sources.pictures import PICTURE_DECODER, array_clip
from prelar_trl.data.store import ACTIONS
from prelar_trl.utils import read_json

EPISODES = ("episode", "traj_ids", "collector/traj_ids")  # numbers of the episode of each row
DONE = ("next/done", "done")
BUFFER = "storage_metadata.json"  # beside the arrays of a dumped buffer


def is_tensordict(root: Path) -> bool:
    """Whether a folder holds a memory-mapped TensorDict or a dumped replay buffer."""
    try:
        return "tensordict" in read_json(_td_folder(root) / "meta.json").get("_type", "")
    except (OSError, ValueError):
        return False


@dataclass(frozen=True)
class Entry:
    """One leaf of a memory-mapped TensorDict."""

    path: Path
    shape: tuple[int, ...]
    dtype: str

    def open(self) -> np.ndarray:
        """The whole array, not yet read; ValueError if the file has another size."""
        size = self.path.stat().st_size
        needed = math.prod(self.shape) * np.dtype(self.dtype).itemsize
        if size != needed:
            raise ValueError(f"{str(self.path)!r} is damaged: {size} bytes, {needed} are declared")
        return np.memmap(self.path, self.dtype, "r", shape=self.shape)


class TensorDictFolder(Source):
    """One picture of a TensorDict of steps; an episode is a clip.

    Episodes are the second dimension of a batch ``[E, T]`` (without what ``mask`` leaves out), else
    rows of one ``episode`` or ``traj_ids``, and end after each ``("next", "done")``. Where there is
    a next picture, an episode's last frame is that of its last step.

    Args:
        root, options: see `Source`.
        camera: the entry to show, such as ``observation/image``, or the last part of its name.
            Default: the only one. Pictures are uint8 ``[3, H, W]``, ``[H, W, 3]``, one channel, or
            ``[H, W]``.

    Raises:
        FileNotFoundError: no TensorDict is there.
        ValueError: no such picture, several and none chosen, actions together with a stride, or
            without ``action``; a dumped buffer of another batch shape than ``[N]``.
    """

    kind = "torchrl"
    decoder = PICTURE_DECODER

    def __init__(
        self,
        root: str | Path,
        options: FrameOptions,
        *,
        camera: str | None = None,
        actions: bool = False,
    ) -> None:
        super().__init__(root, options, actions)
        folder = _td_folder(self.root)
        if not (folder / "meta.json").is_file():
            raise FileNotFoundError(f"{str(folder / 'meta.json')!r} is missing: no TensorDict")
        meta = read_json(folder / "meta.json")
        if not _is_shape(meta.get("shape")):
            raise ValueError(f"{str(folder / 'meta.json')!r} is damaged: shape={meta.get('shape')}")
        self.batch = tuple(meta["shape"])
        self.entries = dict(_find(folder, ""))
        where = f"source {str(root)!r}"
        if len(self.batch) not in (1, 2):
            raise ValueError(f"{where} has batch shape {self.batch}, not [N] or [E, T]")
        if len(self.batch) == 2 and (folder / BUFFER).is_file():
            raise ValueError(
                f"{where} is a replay buffer of batch shape {self.batch}, not [N]: write its "
                "episodes [E, T] by buffer[:].memmap(folder)"
            )
        pictures = [
            name
            for name, entry in self.entries.items()
            if not name.startswith("next/") and _is_picture(entry, len(self.batch))
        ]
        self.camera = self.choose_camera(pictures, camera)
        if actions and "action" not in self.entries:
            raise ValueError(f"{where} has no entry 'action'")
        self._episodes = {f"{n:06d}": rows for n, rows in enumerate(self._cut(folder))}
        path = self.entries[self.camera].path
        self._items = [Item(name, path) for name in self._episodes]

    def load(self, item: Item) -> Clip:
        """See `Source.load`."""
        rows = self._episodes[item.name]
        clip = array_clip(self._pictures(rows), self.options)
        if self.actions:
            actions = leading_actions(self._flat("action")[rows])
            pairs = zip(clip.frames, actions, strict=False)
            clip.frames = (frame | {ACTIONS: action} for frame, action in pairs)
        return clip

    def _pictures(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        array = self._flat(self.camera)
        for row in rows:
            yield _as_rgb(array[row])
        if f"next/{self.camera}" in self.entries:
            yield _as_rgb(self._flat(f"next/{self.camera}")[rows[-1]])

    def _flat(self, name: str) -> np.ndarray:
        """An entry with one batch dimension."""
        array = self.entries[name].open()
        return array.reshape(-1, *array.shape[len(self.batch) :])

    def _cut(self, folder: Path) -> Iterator[np.ndarray]:
        """The rows of each episode, in the flat batch."""
        rows = np.arange(math.prod(self.batch))
        first = rows % self.batch[-1] == 0  # rows that are the first of an episode
        if len(self.batch) == 1:
            rows = _filled(folder, len(rows))
            first = first[: len(rows)]
        elif "mask" in self.entries:
            kept = self._flat("mask").reshape(-1).astype(bool)
            rows, first = rows[kept], first[kept]
        for name in EPISODES:
            if name in self.entries:
                number = self._flat(name).reshape(-1)[rows]
                first[1:] |= number[1:] != number[:-1]
                break
        for name in DONE:
            if name in self.entries:
                done = self._flat(name).reshape(-1)[rows].astype(bool)
                first[1:] |= done[:-1]
                break
        yield from np.split(rows, np.flatnonzero(first[1:]) + 1) if len(rows) else []


def _filled(folder: Path, count: int) -> np.ndarray:
    """The rows of a buffer that hold something, the oldest first."""
    storage = read_json(folder / BUFFER, missing_ok=True)
    if not storage:
        return np.arange(count)
    if storage["len"] < count:
        return np.arange(storage["len"])
    writer = read_json(folder.parent / "writer" / "metadata.json", missing_ok=True)
    return np.roll(np.arange(count), -writer.get("cursor", 0))


def _td_folder(root: Path) -> Path:
    storage = root / "storage"
    return storage if (storage / "meta.json").is_file() else root


def _find(folder: Path, prefix: str) -> Iterator[tuple[str, Entry]]:
    """The leaves below a folder, by their names with slashes."""
    for key, about in read_json(folder / "meta.json").items():
        if not isinstance(about, dict):
            continue
        if about.get("type") == "TensorDict" and (folder / key / "meta.json").is_file():
            yield from _find(folder / key, f"{prefix}{key}/")
        elif _is_shape(about.get("shape")) and "dtype" in about and not about.get("is_nested"):
            dtype = str(about["dtype"]).removeprefix("torch.")
            if dtype in np.sctypeDict and not np.dtype(dtype).hasobject:  # they are addresses
                entry = Entry(folder / f"{key}.memmap", tuple(about["shape"]), dtype)
                yield f"{prefix}{key}", entry


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and all(type(x) is int and x >= 0 for x in value)


def _is_picture(entry: Entry, batch_dims: int) -> bool:
    shape = entry.shape[batch_dims:]
    if entry.dtype != "uint8" or len(shape) not in (2, 3):
        return False
    channels = len(shape) == 2 or shape[0] in (1, 3) or shape[-1] in (1, 3)
    return channels and min(sorted(shape)[-2:]) >= 8


def _as_rgb(picture: np.ndarray) -> np.ndarray:
    """``[3, H, W]``, ``[H, W, 3]``, one channel, or ``[H, W]`` -> ``[H, W, 3]``."""
    if picture.ndim == 2:
        picture = picture[..., None]
    elif picture.shape[-1] not in (1, 3):
        picture = picture.transpose(1, 2, 0)
    return np.ascontiguousarray(np.broadcast_to(picture, (*picture.shape[:2], 3)))
