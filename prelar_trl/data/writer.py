"""Writes clip stores so that a kill at any moment loses nothing that was finished."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from prelar_trl.data.arrays import Array, checked_actions, checked_frames
from prelar_trl.data.store import (
    ACTIONS,
    CLIPS,
    FORMAT,
    SKIPPED,
    VERSION,
    StoreError,
    Stream,
    read_meta,
    sha256,
    shard_file,
    streams_of,
    whole_clip,
)

logger = logging.getLogger(__name__)


class ClipWriter:
    """Appends clips to a store; opening an unfinished or finished store continues it.

    A clip is data first, then one line in the shard's journal. On opening, the open shard is cut
    back to the last clip whose line is whole and whose CRC-32 agrees, so that a store that was
    interrupted any number of times ends up byte for byte equal to one that was not.

    Args:
        path: the folder; made if it is missing.
        source: what the clips are and which command makes them; part of the metadata.
        height, width: pixels of a frame.
        decoder, resize: how the frames were made; part of the metadata.
        shard_bytes: pixel bytes after which a new shard begins. Default 256 MiB.
        info: further settings (JSON) that must be the same when the store is continued.

    Raises:
        StoreError: the folder holds a store with other settings, or one that another process
            is writing.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        source: str,
        height: int = 64,
        width: int = 64,
        decoder: str = "none",
        resize: str = "none",
        shard_bytes: int = 256 * 2**20,
        info: dict[str, Any] | None = None,
    ) -> None:
        self.path = Path(path)
        self.settings: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "source": source,
            "decoder": decoder,
            "resize": resize,
            "height": height,
            "width": width,
            "shard_bytes": shard_bytes,
            "info": json.loads(json.dumps(info or {})),
        }
        self.streams: dict[str, Stream] = {}
        self.done: set[str] = set()
        self.num_clips = 0
        self.num_skipped = 0
        self._seals: list[dict[str, Any]] = []
        self._files: dict[str, BinaryIO] = {}
        self._clips = 0  # of the open shard
        self._frames = 0  # of the open shard
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = self._take_lock()
        self._dirty = False  # does the folder say that the store is unfinished?
        try:
            if (self.path / "store.json").exists():
                self._resume()
            elif any(p.name != "store.json.tmp" for p in self.path.iterdir()):
                raise StoreError(
                    f"{str(path)!r} is not empty and holds no clip store: name another folder"
                )
            else:
                with self._saving():
                    self._mark_unfinished()
        except BaseException:
            self.abort()
            raise

    def add(
        self,
        frames: Array,
        actions: Array | None = None,
        *,
        name: str | None = None,
        label: str | int | None = None,
        split: str | None = None,
        info: dict[str, Any] | None = None,
        **images: Array,
    ) -> None:
        """Appends one clip.

        Args:
            frames: uint8 ``[T, 3, H, W]``, T >= 1.
            actions: float32 ``[T, A]``, row t the action that led to frame t (row 0 zero). Kept
                apart from the frames, for probes only. Given for every clip or for none.
            name: unique; default is the clip's number.
            label: class, task or the like.
            split: e.g. ``train`` or ``heldout``.
            info: anything else worth keeping about the clip (JSON).
            images: further image streams, uint8 ``[T, 3, H, W]``, e.g. ``flow=``.

        Raises:
            ValueError: wrong shape, dtype, NaN, or a name that is already there.
            OSError: no space is left; what was added before is safe.
        """
        name = f"{self.num_clips:06d}" if name is None else name
        if name in self.done:
            raise ValueError(f"clip name {name!r} is already in the store")
        size = (self.settings["height"], self.settings["width"])
        arrays = {"pixels": checked_frames("frames", frames, size)}
        arrays |= {key: checked_frames(key, value, size) for key, value in images.items()}
        if actions is not None:
            arrays[ACTIONS] = checked_actions(actions)
        length = len(arrays["pixels"])
        for key, array in arrays.items():
            if len(array) != length:
                raise ValueError(f"clip {name!r}: {key} has {len(array)} rows for {length} frames")
        self._declare(arrays, name)
        data = {key: array.tobytes() for key, array in arrays.items()}
        record = {
            "name": name,
            "frames": length,
            "label": label,
            "split": split,
            "info": info,
            "crc32": {key: zlib.crc32(value) for key, value in data.items()},
        }
        line = json.dumps(record, ensure_ascii=False, sort_keys=True) + "\n"
        with self._saving():
            self._make_room(length)
            self._append(data, line.encode("utf-8"))
        self._clips += 1
        self._frames += length
        self.num_clips += 1
        self.done.add(name)

    def skip(self, name: str, reason: str) -> None:
        """Notes a clip that could not be used, so that resuming does not try it again."""
        line = json.dumps({"name": name, "reason": reason}, ensure_ascii=False, sort_keys=True)
        with self._saving(), (self.path / SKIPPED).open("ab") as file:
            self._mark_unfinished()
            file.write(line.encode("utf-8") + b"\n")
        self.num_skipped += 1
        self.done.add(name)

    def close(self) -> None:
        """Finishes the store: seals the last shard and marks the store as complete.

        Raises:
            ValueError: the store has no clip.
        """
        if self._lock < 0:
            return
        if not self.num_clips:
            self.abort()
            raise ValueError(f"nothing was added to clip store {str(self.path)!r}")
        if self._dirty:
            with self._saving():
                if self._clips:
                    self._seal()
                self._write_meta(complete=True)
        self.abort()

    def abort(self) -> None:
        """Lets go of the store, unfinished; opening it again continues."""
        for file in self._files.values():
            file.close()
        self._files.clear()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> ClipWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def _declare(self, arrays: dict[str, np.ndarray], name: str) -> None:
        """The first clip decides which streams the store has."""
        streams = {k: Stream(k, str(a.dtype), a.shape[1:]) for k, a in sorted(arrays.items())}
        if not self.streams:
            self.streams = streams
            self._dirty = False  # the folder does not know the streams yet
        if streams != self.streams:
            have, got = (
                ", ".join(f"{s.name} {list(s.shape)}" for s in x.values())
                for x in (self.streams, streams)
            )
            raise ValueError(f"clip {name!r} has the streams {got}; the store has {have}")

    def _make_room(self, length: int) -> None:
        """Begins a new shard if the open one is full."""
        self._mark_unfinished()
        if self._clips and self._frames_bytes(self._frames + length) > self.settings["shard_bytes"]:
            self._seal()
            self._write_meta(complete=False)

    def _mark_unfinished(self) -> None:
        if not self._dirty:
            self._write_meta(complete=False)
            self._dirty = True

    def _open_files(self) -> None:
        for key in (CLIPS, *self.streams):
            file = shard_file(self.path, key, len(self._seals))
            file.parent.mkdir(exist_ok=True)
            self._files[key] = file.open("ab", buffering=0)

    def _frames_bytes(self, frames: int) -> int:
        return frames * self.streams["pixels"].frame_bytes

    def _append(self, data: dict[str, bytes], line: bytes) -> None:
        try:
            if not self._files:
                self._open_files()
            for key, value in (*data.items(), (CLIPS, line)):
                view = memoryview(value)
                while view:
                    view = view[self._files[key].write(view) :]
        except BaseException:
            self._cut()
            raise

    @contextmanager
    def _saving(self) -> Iterator[None]:
        """Lets go of the store when it cannot be written, and says it plainly for a full disk."""
        try:
            yield
        except OSError as error:
            self.abort()
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise OSError(
                error.errno,
                f"no space left for clip store {str(self.path)!r}: {self.num_clips} clips are "
                "safe; free some space and run the same command again, it continues",
            ) from None

    def _cut(self) -> None:
        """Cuts the open shard back to its last whole clip."""
        shard = len(self._seals)
        for key, stream in self.streams.items():
            file = shard_file(self.path, key, shard)
            if file.exists():
                os.truncate(file, self._frames * stream.frame_bytes)
        journal = shard_file(self.path, CLIPS, shard)
        if journal.exists():
            lines = journal.read_bytes().split(b"\n")[: self._clips]
            os.truncate(journal, sum(len(line) + 1 for line in lines))

    def _seal(self) -> None:
        shard = len(self._seals)
        for file in self._files.values():
            os.fsync(file.fileno())
            file.close()
        self._files.clear()
        self._seals.append(
            {
                "clips": self._clips,
                "frames": self._frames,
                "sha256": {
                    key: sha256(shard_file(self.path, key, shard)) for key in (CLIPS, *self.streams)
                },
            }
        )
        self._clips = self._frames = 0

    def _write_meta(self, *, complete: bool) -> None:
        meta = self.settings | {
            "complete": complete,
            "clips": sum(s["clips"] for s in self._seals),
            "frames": sum(s["frames"] for s in self._seals),
            "skipped": self.num_skipped if complete else None,
            "streams": {
                s.name: {"dtype": s.dtype, "shape": list(s.shape)} for s in self.streams.values()
            },
            "shards": self._seals,
        }
        text = json.dumps(meta, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
        temporary = self.path / "store.json.tmp"
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path / "store.json")

    def _take_lock(self) -> int:
        handle = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(handle)
            raise StoreError(
                f"another process is writing clip store {str(self.path)!r}: wait for it or stop it"
            ) from None
        return handle

    def _resume(self) -> None:
        meta = read_meta(self.path)
        begun = bool(meta["streams"]) or (self.path / SKIPPED).exists()
        have, want = _flat(meta), _flat(self.settings)
        for key in sorted(want | have if begun else ()):
            if key.split(".")[0] in self.settings and have.get(key) != want.get(key):
                raise StoreError(
                    f"clip store {str(self.path)!r} was begun with {key}={have.get(key)!r}, not "
                    f"{want.get(key)!r}: use the same settings, or another folder"
                )
        self.streams = streams_of(meta)
        self._dirty = not meta["complete"]
        self._seals = meta["shards"]
        if meta["complete"]:  # the last shard may take further clips
            self._seals = self._seals[:-1]
        for shard in range(len(self._seals)):
            for line in shard_file(self.path, CLIPS, shard).read_bytes().split(b"\n")[:-1]:
                self.done.add(json.loads(line)["name"])
        self.num_clips = len(self.done)
        if begun:
            self._recover_open_shard()
            self._recover_skipped()
        else:
            self._write_meta(complete=False)  # the settings may be others
        logger.info("continuing clip store %s after %d clips", self.path, self.num_clips)

    def _recover_open_shard(self) -> None:
        """Counts the whole clips of the open shard and cuts off the rest."""
        shard = len(self._seals)
        journal = shard_file(self.path, CLIPS, shard)
        if journal.exists():
            handles = {k: shard_file(self.path, k, shard).open("rb") for k in self.streams}
            for line in journal.read_bytes().split(b"\n")[:-1]:
                record = whole_clip(line, handles, self.streams)
                if record is None:
                    break
                self._clips += 1
                self._frames += record["frames"]
                self.done.add(record["name"])
            for handle in handles.values():
                handle.close()
        self._cut()
        self.num_clips += self._clips

    def _recover_skipped(self) -> None:
        file = self.path / SKIPPED
        if not file.exists():
            return
        data = file.read_bytes()
        os.truncate(file, data.rfind(b"\n") + 1)
        for line in data.split(b"\n")[:-1]:
            self.done.add(json.loads(line)["name"])
            self.num_skipped += 1


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
