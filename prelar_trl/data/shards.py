"""The files of a clip store that is being written: a clip's own, and the shards it goes to."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from prelar_trl.data.store import (
    CLIPS,
    StoreError,
    Stream,
    evicted_of,
    read_records,
    shard_file,
    streams_of,
)
from prelar_trl.utils import sha256

Buffer = bytes | memoryview
BLOCK_BYTES = 2**20


class SpoolError(OSError):
    """A spool that cannot be written; not the fault of the clip."""


class Spool:
    """One clip in a folder of its own, a file a stream; what the folder holds is overwritten."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.streams: dict[str, Stream] = {}  # decided by the first frame
        self.frames = 0
        self._files: dict[str, BinaryIO] = {}

    def append(self, frame: Mapping[str, np.ndarray]) -> None:
        """Writes one frame of every stream; `SpoolError` if it cannot be written."""
        streams = {k: Stream(k, str(a.dtype), a.shape) for k, a in sorted(frame.items())}
        if not self.frames:
            self.streams = streams
        if streams != self.streams:
            raise ValueError(f"frame {self.frames} has other streams than the first")
        try:
            if not self._files:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._files = {k: self._file(k).open("wb", buffering=0) for k in streams}
            for key, array in frame.items():
                view = np.ascontiguousarray(array).data.cast("B")
                while view:
                    view = view[self._files[key].write(view) :]
        except OSError as error:
            raise SpoolError(*error.args) from None
        self.frames += 1

    def close(self) -> None:
        """Closes the files: the spool can be read, and sent to another process."""
        for file in self._files.values():
            file.close()
        self._files = {}

    def blocks(self, key: str) -> Iterator[bytes]:
        """The bytes of one stream."""
        with self._file(key).open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                yield block

    def delete(self) -> None:
        """Removes the folder."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}.bin"


class OpenShard:
    """Appends clips to the files of one number, of which the first ``clips`` and ``frames`` count.

    A clip is data first, then one line in the journal, so that whatever follows the last line
    whose data agree is no clip and can be cut off.
    """

    def __init__(
        self, path: Path, number: int, streams: Mapping[str, Stream], clips: int, frames: int
    ) -> None:
        self.path, self.number, self.streams = path, number, streams
        self.clips, self.frames = clips, frames
        self._files: dict[str, BinaryIO] = {}

    def append(self, data: Mapping[str, Iterable[Buffer]], record: dict[str, Any]) -> None:
        """Writes one clip: the bytes of each stream, in blocks, then ``record`` with checksums."""
        try:
            if not self._files:
                for key in (CLIPS, *self.streams):
                    self._file(key).parent.mkdir(exist_ok=True)
                    self._files[key] = self._file(key).open("ab", buffering=0)
            crc32 = {key: self._write(key, blocks) for key, blocks in data.items()}
            line = json.dumps(record | {"crc32": crc32}, ensure_ascii=False, sort_keys=True) + "\n"
            self._write(CLIPS, [line.encode("utf-8")])
        except BaseException:
            self.cut()
            raise
        self.clips += 1
        self.frames += record["frames"]

    def records(self) -> list[dict[str, Any]]:
        """The journal, up to a damaged line; ``whole`` says whether a clip's data agree with it."""
        journal = self._file(CLIPS)
        if not journal.exists():
            return []
        records = []
        with ExitStack() as stack:
            files = {k: stack.enter_context(self._file(k).open("rb")) for k in self.streams}
            for line in journal.read_bytes().split(b"\n")[:-1]:
                record = _parsed(line)
                if record is None:
                    break
                sizes = {k: record["frames"] * s.frame_bytes for k, s in self.streams.items()}
                crc32 = {k: _crc32(files[k], size) for k, size in sizes.items()}
                records.append(record | {"whole": crc32 == record["crc32"]})
        return records

    def sync(self) -> None:
        """Waits until the clips are on the disk."""
        for file in self._files.values():
            os.fsync(file.fileno())

    def cut(self) -> None:
        """Cuts the files back to the last whole clip."""
        for key, stream in self.streams.items():
            if self._file(key).exists():
                os.truncate(self._file(key), self.frames * stream.frame_bytes)
        journal = self._file(CLIPS)
        if journal.exists():
            lines = journal.read_bytes().split(b"\n")[: self.clips]
            os.truncate(journal, sum(len(line) + 1 for line in lines))

    def seal(self) -> dict[str, Any]:
        """Finishes the shard; returns what ``store.json`` says of it."""
        self.sync()
        self.close()
        digests = {key: sha256(self._file(key)) for key in (CLIPS, *self.streams)}
        return {"clips": self.clips, "frames": self.frames, "sha256": digests}

    def close(self) -> None:
        """Closes the files."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def delete(self) -> None:
        """Deletes the files, which are closed."""
        for key in (CLIPS, *self.streams):
            self._file(key).unlink(missing_ok=True)

    def _file(self, key: str) -> Path:
        return shard_file(self.path, key, self.number)

    def _write(self, key: str, blocks: Iterable[Buffer]) -> int:
        """Appends blocks to a file; returns their CRC-32."""
        crc = 0
        for block in blocks:
            crc = zlib.crc32(block, crc)
            view = memoryview(block)
            while view:
                view = view[self._files[key].write(view) :]
        return crc


def _parsed(line: bytes) -> dict[str, Any] | None:
    """A line of a journal; None if it is damaged."""
    try:
        record = json.loads(line)
        known = isinstance(record["name"], str) and "info" in record
        return record if known and record["frames"] > 0 and record["crc32"] is not None else None
    except (ValueError, KeyError, TypeError):
        return None


def _crc32(file: BinaryIO, size: int) -> int:
    """CRC-32 of the next ``size`` bytes, or of what there is."""
    crc = 0
    while size and (block := file.read(min(size, BLOCK_BYTES))):
        crc = zlib.crc32(block, crc)
        size -= len(block)
    return crc


class Place(NamedTuple):
    """Where a clip lies: its first frame is ``row`` of ``shard``."""

    name: str
    shard: int
    row: int
    frames: int


class Shards:
    """The sealed shards of a store, and the open one behind them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.streams: dict[str, Stream] = {}  # what a clip consists of; empty before the first
        self.clips: list[Place] = []
        self.damaged: set[str] = set()  # names of clips that do not agree with their checksums
        self.evicted = evicted_of({})  # shards, clips and frames that were deleted
        self.open = self._shard(0)  # still grows
        self._seals: list[dict[str, Any]] = []

    def _shard(self, number: int, clips: int = 0, frames: int = 0) -> OpenShard:
        return OpenShard(self.path, number, self.streams, clips, frames)

    def resume(self, meta: dict[str, Any], *, keep_damaged: bool = False) -> bool:
        """Finds the clips on the disk; of the open shard the whole ones, the rest is cut off.

        With ``keep_damaged`` the data of all shards are read, and nothing is cut off before the
        last whole clip of the open one: what is damaged stays, see ``damaged``.

        Returns:
            False if there was no clip; what a first one may have left is removed then.
        """
        self.streams.update(streams_of(meta))
        self.evicted, self._seals = evicted_of(meta), meta["shards"]
        first = self.evicted["shards"]
        journal = shard_file(self.path, CLIPS, first)
        if not (first or self._seals or (journal.exists() and journal.stat().st_size)):
            self.clear()
            return False
        for name in (CLIPS, *self.streams):  # what a crash in `evict` may have left
            for file in (self.path / name).glob("[0-9]*"):
                if file.stem.isdecimal() and int(file.stem) < first:
                    file.unlink()
        if meta["complete"]:  # the last shard may take further clips
            self._seals = self._seals[:-1]
        for number, seal in enumerate(self._seals, first):
            journal = shard_file(self.path, CLIPS, number)
            if not journal.is_file() or sha256(journal) != seal["sha256"][CLIPS]:
                raise StoreError(f"{str(journal)!r} is damaged: restore that file")
            records = self._shard(number).records() if keep_damaged else read_records(journal)
            self._found(number, records)
        number = first + len(self._seals)
        records = self._shard(number).records()
        whole = [record["whole"] for record in records]
        if keep_damaged:
            count = len(whole) - whole[::-1].index(True) if True in whole else 0
        else:
            count = [*whole, False].index(False)
        self.open = self._shard(number, count, sum(r["frames"] for r in records[:count]))
        self.open.cut()
        self._found(number, records[:count])
        return True

    def _found(self, shard: int, records: list[dict[str, Any]]) -> None:
        row = 0
        for record in records:
            self.clips.append(Place(record["name"], shard, row, record["frames"]))
            row += record["frames"]
            if not record.get("whole", True):
                self.damaged.add(record["name"])

    def seal(self) -> None:
        """Seals the open shard, if it holds a clip, and opens the next."""
        if self.open.clips:
            self._seals.append(self.open.seal())
            self.open = self._shard(self.open.number + 1)
            self.open.cut()  # what a crash in `truncate` may have left

    def evict(self, before: int, save: Callable[[], None]) -> list[Place]:
        """Deletes the oldest sealed shards, as far as all their `clips` are below ``before``.

        ``save`` writes ``store.json``, before the files go. Returns the clips that are gone.
        """
        first, last = self.evicted["shards"], self.open.number
        if before < len(self.clips):
            last = self.clips[before].shard
        gone = [clip for clip in self.clips if clip.shard < last]
        if gone:
            del self.clips[: len(gone)]
            self.evicted = {
                "shards": last,
                "clips": self.evicted["clips"] + len(gone),
                "frames": self.evicted["frames"] + sum(clip.frames for clip in gone),
            }
            del self._seals[: last - first]
            save()
            for number in range(first, last):
                self._shard(number).delete()
        return gone

    def truncate(self, num_clips: int, save: Callable[[], None]) -> list[Place]:
        """Deletes all clips but the first ``num_clips``; otherwise as `evict`."""
        gone = self.clips[num_clips:]
        if gone:
            self.open.close()
            _, shard, row, _ = gone[0]
            last = self.open.number
            del self.clips[num_clips:]
            self.open = self._shard(shard, sum(clip.shard == shard for clip in self.clips), row)
            del self._seals[shard - self.evicted["shards"] :]
            save()
            for number in range(shard + 1, last + 1):
                self._shard(number).delete()
            self.open.cut()
        return gone

    def meta(self) -> dict[str, Any]:
        """What ``store.json`` says of the shards."""
        streams = self.streams.values()
        meta = {
            "clips": sum(seal["clips"] for seal in self._seals),
            "frames": sum(seal["frames"] for seal in self._seals),
            "streams": {s.name: {"dtype": s.dtype, "shape": list(s.shape)} for s in streams},
            "shards": self._seals,
        }
        return meta | ({"evicted": self.evicted} if self.evicted["shards"] else {})

    def clear(self) -> None:
        """Deletes all files."""
        for name in (CLIPS, *self.streams):
            shutil.rmtree(self.path / name, ignore_errors=True)
        self.streams.clear()
        self.open = self._shard(0)
