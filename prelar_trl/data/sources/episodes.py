"""Folders of ``.npz`` episodes: RLBench as APV released it, and DreamerV2's replays.

Keys of a file of L steps: ``image`` uint8 ``[L + 1, H, W, 3]``, ``action``, ``reward``,
``is_first``, ``is_last``, ``is_terminal``, each with L + 1 rows; the action led to the image.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO

import numpy as np

from prelar_trl.data.sources.base import (
    Clip,
    ClipError,
    Frame,
    FrameOptions,
    Item,
    Source,
    text,
    with_distinct_names,
)
from prelar_trl.data.sources.pictures import PICTURE_DECODER, array_clip
from prelar_trl.data.store import ACTIONS, ClipStore
from prelar_trl.utils import atomic_write

_STAMP = "20000101T000000"  # exported files carry no date, so that they can be compared


class EpisodeFolder(Source):
    """The ``.npz`` files of a folder, ordered by name; see `Source`.

    RLBench's actions are left out officially.
    """

    kind = "episodes"
    decoder = f"NumPy, {PICTURE_DECODER}"

    def __init__(self, root: str | Path, options: FrameOptions, *, actions: bool = False) -> None:
        super().__init__(root, options, actions)
        for file in sorted(self.root.iterdir()):
            if file.suffix.lower() != ".npz" and not file.is_dir():
                reason = f"{file.suffix} files" if file.suffix else "files without suffix"
                self.left_out[reason].append(text(file.name))
        files = npz_files(self.root)
        self._items = with_distinct_names([Item(text(file.name), file) for file in files])

    def load(self, item: Item) -> Clip:
        """See `Source.load`."""
        return Clip(self._frames(item.path))

    def _frames(self, path: Path) -> Iterator[Frame]:
        image = _Array.find(path, "image")
        action = _Array.find(path, "action") if self.actions else None
        if image.dtype != np.uint8 or len(image.shape) != 4 or image.shape[-1] != 3:
            raise ClipError(f"image must be uint8 [T, H, W, 3], is {image.dtype} {[*image.shape]}")
        frames = array_clip(image.rows(), self.options).frames
        if action is None:
            yield from frames
            return
        if len(action.shape) != 2 or action.shape[0] != image.shape[0]:
            raise ClipError(f"action must be finite [T, A], is {list(action.shape)}")
        for frame, row in zip(frames, action.rows(), strict=False):
            if not np.isfinite(row).all():
                raise ClipError("action must be finite [T, A], holds NaN or infinity")
            yield frame | {ACTIONS: row.astype(np.float32)}


@dataclass(frozen=True)
class _Array:
    """An array in an ``.npz`` file, read row by row."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool

    @classmethod
    def find(cls, path: Path, key: str) -> _Array:
        """Reads the header; ClipError for no such array, or one larger than the file can hold."""
        name = f"{key}.npy"
        with _readable(), zipfile.ZipFile(path) as file:
            if name not in file.namelist():
                raise ClipError(f"no {key!r} in the file")
            with file.open(name) as member:
                shape, fortran, dtype = _header(member)
            if prod(shape) * dtype.itemsize > file.getinfo(name).file_size:
                raise ClipError(f"damaged: {key!r} is announced larger than it is")
        return cls(path, name, shape, dtype, fortran)

    def rows(self) -> Iterator[np.ndarray]:
        """The rows, one in memory at a time."""
        size = prod(self.shape[1:]) * self.dtype.itemsize
        with _readable(), zipfile.ZipFile(self.path) as file, file.open(self.name) as member:
            if self.fortran:  # rows do not lie together
                yield from np.lib.format.read_array(member, allow_pickle=False)
                return
            _header(member)
            for _ in range(self.shape[0]):
                yield np.frombuffer(member.read(size), self.dtype).reshape(self.shape[1:])


def _header(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(member)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(member)
    return np.lib.format.read_array_header_2_0(member)


@contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except (ClipError, MemoryError, PermissionError):
        raise
    except Exception:  # ZIP, deflate and NumPy fail on damage in many ways
        raise ClipError("not readable as .npz") from None


def npz_files(root: Path) -> list[Path]:
    """The ``.npz`` files of a folder, ordered by name."""
    return sorted(p for p in root.iterdir() if p.suffix.lower() == ".npz" and p.name[0] != ".")


def export_episodes(store: ClipStore, folder: str | Path) -> int:
    """Writes every clip of a store as an ``.npz`` episode that DreamerV2's replay reads.

    The store's actions are written if it has them, else zeros ``[T, 1]``; rewards are zero.
    Files that exist are left alone, each file appears whole or not at all. Returns the number of
    files written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = 0
    for clip in range(len(store)):
        pixels = store.read(clip)
        steps = len(pixels)
        file = folder / f"{_STAMP}-{clip:08d}-{steps - 1}.npz"
        if file.exists():
            continue
        time, known = np.arange(steps), ACTIONS in store.streams
        with atomic_write(file) as part, part.open("wb") as handle:
            np.savez_compressed(
                handle,
                image=pixels.transpose(0, 2, 3, 1),
                action=store.read(clip, ACTIONS) if known else np.zeros((steps, 1), np.float32),
                reward=np.zeros(steps, np.float32),
                is_first=time == 0,
                is_last=time == steps - 1,
                is_terminal=np.zeros(steps, bool),
            )
        written += 1
    return written
