"""Writes clip stores so that a kill at any moment loses nothing that was finished."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prelar_trl.data.shards import Buffer, Place, Shards, Spool
from prelar_trl.data.store import (
    ACTIONS,
    FORMAT,
    SKIPPED,
    SPOOL,
    VERSION,
    StoreError,
    Stream,
    read_meta,
    read_records,
)
from prelar_trl.utils import atomic_write, dotted, lock_folder

logger = logging.getLogger(__name__)
Array = np.ndarray | torch.Tensor


class ClipWriter:
    """Appends clips to a store; opening an unfinished or finished store continues it.

    A clip is data first, then one line in the shard's journal. On opening, the open shard is cut
    back to the last clip whose line is whole and whose CRC-32 agrees, so that a store that was
    interrupted any number of times ends up byte for byte equal to one that was not. A store without
    a clip can be begun again with other settings.

    Args:
        path: the folder; made if it is missing.
        source: what the clips are and which command makes them; part of the metadata.
        height, width: pixels of a frame.
        decoder, resize: how the frames were made; part of the metadata.
        shard_bytes: pixel bytes after which a new shard begins. Default 256 MiB.
        info: further settings (JSON) that must be the same when the store is continued.
        left_out: what the source holds and does not offer as clips, reason -> names; of it the
            metadata keep the number and an example.
        keep_damaged: what was damaged between whole clips stays and is named in ``damaged``; all
            data are read on opening. Default: it is cut off, with what follows, to be made again.

    Attributes:
        clips: where each clip lies.
        streams: what a clip consists of; empty before the first.
        damaged: names of the clips whose data do not agree with their checksums, as found on
            opening.
        done: names of the clips and of those that were skipped.
        reasons: why clips were skipped -> their names.

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
        left_out: Mapping[str, list[str]] | None = None,
        keep_damaged: bool = False,
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
        self.left_out = {
            reason: {"count": len(names), "example": names[0]}
            for reason, names in (left_out or {}).items()
        }
        self.done: set[str] = set()
        self.reasons: dict[str, list[str]] = {}
        self._shards = Shards(self.path)
        self.clips, self.streams = self._shards.clips, self._shards.streams
        self.damaged = self._shards.damaged
        self._dirty = False  # does the folder say that the store is unfinished?
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock = lock_folder(self.path)
        except BlockingIOError:
            raise StoreError(
                f"another process is writing clip store {str(self.path)!r}: wait for it or stop it"
            ) from None
        try:
            if (self.path / "store.json").exists():
                self._resume(keep_damaged)
            elif any(p.name != "store.part.json" for p in self.path.iterdir()):
                raise StoreError(
                    f"{str(path)!r} is not empty and holds no clip store: name another folder"
                )
            else:
                with self.saving():
                    self._mark_unfinished()
        except BaseException:
            self.release()
            raise

    @property
    def released(self) -> bool:
        """Nothing can be written any more: it was closed, or could not be written."""
        return self._lock < 0

    @property
    def num_clips(self) -> int:
        """Clips in the store."""
        return len(self.clips)

    @property
    def num_evicted_frames(self) -> int:
        """Frames that `evict` has deleted."""
        return self._shards.evicted["frames"]

    @property
    def num_skipped(self) -> int:
        """How many clips could not be used."""
        return sum(map(len, self.reasons.values()))

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
        size = (self.settings["height"], self.settings["width"])
        arrays = {"pixels": _images("frames", frames, size)}
        arrays |= {key: _images(key, value, size) for key, value in images.items()}
        if actions is not None:
            arrays[ACTIONS] = _actions(actions)
        name = f"{self.num_clips:06d}" if name is None else name
        self.add_streams(arrays, name=name, label=label, split=split, info=info)

    def add_streams(self, arrays: Mapping[str, np.ndarray], *, name: str, **about: Any) -> None:
        """Appends one clip of contiguous arrays ``[T, ...]``, a stream each. Otherwise as `add`."""
        length = len(arrays["pixels"])
        for key, array in arrays.items():
            if len(array) != length:
                raise ValueError(f"clip {name!r}: {key} has {len(array)} rows for {length} frames")
        streams = {k: Stream(k, str(a.dtype), a.shape[1:]) for k, a in sorted(arrays.items())}
        data = {key: [array.reshape(-1).view(np.uint8).data] for key, array in arrays.items()}
        self._append(streams, data, length, name, **about)

    def add_spool(self, spool: Spool, *, name: str, **about: Any) -> None:
        """Appends the clip of a spool in blocks, and deletes the spool. Otherwise as `add`."""
        data = {key: spool.blocks(key) for key in spool.streams}
        self._append(spool.streams, data, spool.frames, name, **about)
        spool.delete()

    def skip(self, name: str, reason: str) -> None:
        """Notes a clip that could not be used, so that resuming does not try it again."""
        line = json.dumps({"name": name, "reason": reason}, ensure_ascii=False, sort_keys=True)
        with self.saving(), (self.path / SKIPPED).open("ab") as file:
            self._mark_unfinished()
            file.write(line.encode("utf-8") + b"\n")
        self.reasons.setdefault(reason, []).append(name)
        self.done.add(name)

    def sync(self) -> None:
        """Waits until all clips are on the disk, so that they survive a loss of power."""
        self._shards.open.sync()

    def close(self) -> None:
        """Finishes the store: seals the last shard and marks the store as complete.

        Raises:
            ValueError: the store has no clip.
        """
        if self.released:
            return
        if not self.num_clips:
            self._discard()
            self.release()
            why = [f"{len(x)} x {reason}, e.g. {x[0]!r}" for reason, x in self.reasons.items()]
            nothing = f"nothing was added to clip store {str(self.path)!r}"
            raise ValueError(nothing + (f": {'; '.join(why)}" if why else ""))
        if self._dirty:
            with self.saving():
                self._shards.seal()
                self._write_meta(complete=True)
                self._dirty = False
        self.release()

    def release(self) -> None:
        """Lets go of the store, unfinished; opening it again continues."""
        self._shards.open.close()
        if not self.released:
            shutil.rmtree(self.path / SPOOL, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> ClipWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close() if kind is None else self.release()

    def evict(self, before: int) -> bool:
        """Deletes shards whose clips are all below ``before`` in `clips`; whether there was any."""
        self._check_held()
        return self._forget(self._shards.evict(before, self._write_meta))

    def truncate(self, num_clips: int) -> None:
        """Deletes all clips but the first ``num_clips``."""
        self._check_held()
        if self._forget(self._shards.truncate(num_clips, self._write_meta)):
            self._dirty = True

    def _forget(self, clips: list[Place]) -> bool:
        names = {clip.name for clip in clips}
        self.done -= names
        self.damaged -= names
        return bool(clips)

    def _append(
        self,
        streams: dict[str, Stream],
        data: Mapping[str, Iterable[Buffer]],
        frames: int,
        name: str,
        label: str | int | None = None,
        split: str | None = None,
        info: dict[str, Any] | None = None,
    ) -> None:
        if name in self.done:
            raise ValueError(f"clip name {name!r} is already in the store")
        if not self.streams:  # the first clip decides
            self.streams.update(streams)
            self._dirty = False  # the folder does not know the streams yet
        if streams != self.streams:
            have, got = (
                ", ".join(f"{s.name} {list(s.shape)}" for s in x.values())
                for x in (self.streams, streams)
            )
            raise ValueError(f"clip {name!r} has the streams {got}; the store has {have}")
        record = {"name": name, "frames": frames, "label": label, "split": split, "info": info}
        with self.saving():
            self._mark_unfinished()
            size = (self._shards.open.frames + frames) * self.streams["pixels"].frame_bytes
            if self._shards.open.clips and size > self.settings["shard_bytes"]:
                self._shards.seal()
                self._write_meta()
            shard = self._shards.open
            place = Place(name, shard.number, shard.frames, frames)
            shard.append(data, record)
        self.clips.append(place)
        self.done.add(name)

    def _check_held(self) -> None:
        if self.released:
            raise StoreError(f"clip store {str(self.path)!r} is closed: open it again, to go on")

    def _mark_unfinished(self) -> None:
        if not self._dirty:
            self._write_meta()
            self._dirty = True

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Lets go of the store when it cannot be written, and says it plainly for a full disk.

        Raises:
            StoreError: it was let go of before.
        """
        self._check_held()
        try:
            yield
        except OSError as error:
            self.release()
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise OSError(
                error.errno,
                f"no space left for clip store {str(self.path)!r}: {self.num_clips} clips are "
                "safe; free some space and run the same command again, it continues",
            ) from None

    def _write_meta(self, *, complete: bool = False) -> None:
        meta = self.settings | self._shards.meta() | {"complete": complete}
        meta["skipped"] = self.num_skipped if complete else None
        if self.left_out:
            meta["left_out"] = self.left_out
        text = json.dumps(meta, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
        with atomic_write(self.path / "store.json", sync=True) as part:
            part.write_text(text, encoding="utf-8")

    def _resume(self, keep_damaged: bool) -> None:
        meta = read_meta(self.path)
        try:
            begun = self._shards.resume(meta, keep_damaged=keep_damaged)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise StoreError(
                f"{str(self.path / 'store.json')!r} is damaged ({error!r}): make the store again"
            ) from None
        have, want = dotted(meta), dotted(self.settings)
        for key in sorted(want | have):
            if key.split(".")[0] not in self.settings or have.get(key) == want.get(key):
                continue
            if not begun:
                self._discard()
                break
            raise StoreError(
                f"clip store {str(self.path)!r} was begun with {key}={have.get(key)!r}, not "
                f"{want.get(key)!r}: use the same settings, or another folder"
            )
        self._dirty = begun and not meta["complete"]
        self.done.update(clip.name for clip in self.clips)
        skipped = self.path / SKIPPED
        for record in read_records(skipped):
            self.reasons.setdefault(record["reason"], []).append(record["name"])
            self.done.add(record["name"])
        if skipped.exists():
            os.truncate(skipped, skipped.read_bytes().rfind(b"\n") + 1)
        shutil.rmtree(self.path / SPOOL, ignore_errors=True)
        if not begun:
            self._mark_unfinished()
        logger.info("continuing clip store %s after %d clips", self.path, self.num_clips)

    def _discard(self) -> None:
        """Removes the files of a store that has no clip."""
        self._shards.clear()
        shutil.rmtree(self.path / SPOOL, ignore_errors=True)
        for name in (SKIPPED, "store.json"):
            (self.path / name).unlink(missing_ok=True)


def _array(value: Array) -> np.ndarray:
    return np.ascontiguousarray(value.cpu().numpy() if isinstance(value, torch.Tensor) else value)


def _images(key: str, value: Array, size: tuple[int, int]) -> np.ndarray:
    array = _array(value)
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[1:] != (3, *size):
        raise ValueError(
            f"{key} must be uint8 [T, 3, {size[0]}, {size[1]}], "
            f"got {array.dtype} {list(array.shape)}"
        )
    if not len(array):
        raise ValueError(f"{key} has no frame")
    return array


def _actions(value: Array) -> np.ndarray:
    array = _array(value)
    if array.dtype != np.float32 or array.ndim != 2:
        raise ValueError(f"actions must be float32 [T, A], got {array.dtype} {list(array.shape)}")
    if not np.isfinite(array).all():
        raise ValueError("actions hold NaN or infinity")
    return array
