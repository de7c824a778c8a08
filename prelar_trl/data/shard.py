"""The shard of a clip store that still grows: its data files and their journal."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

from prelar_trl.data.store import CLIPS, Stream, sha256, shard_file, whole_clip

Buffer = bytes | memoryview


class OpenShard:
    """Appends clips to the files of one number.

    A clip is data first, then one line in the journal, so that whatever follows the last line
    whose data agree is no clip and can be cut off.

    Args:
        path: the store.
        number: the shard's.
        streams: what a clip consists of.
        clips, frames: how much of its files is kept, see `cut`.
    """

    def __init__(
        self,
        path: Path,
        number: int,
        streams: Mapping[str, Stream],
        clips: int = 0,
        frames: int = 0,
    ) -> None:
        self.path, self.number, self.streams = path, number, streams
        self.clips, self.frames = clips, frames
        self._files: dict[str, BinaryIO] = {}

    def append(self, data: Mapping[str, Iterable[Buffer]], record: dict[str, Any]) -> None:
        """Writes one clip; its checksums are added to ``record``.

        Args:
            data: for every stream the clip's bytes, in blocks.
            record: the clip's line in the journal, ``frames`` among it.
        """
        try:
            if not self._files:
                self._open()
            crc32 = {key: self._write(key, blocks) for key, blocks in data.items()}
            record = record | {"crc32": crc32}
            line = json.dumps(record, ensure_ascii=False, sort_keys=True) + "\n"
            self._write(CLIPS, [line.encode("utf-8")])
        except BaseException:
            self.cut()
            raise
        self.clips += 1
        self.frames += record["frames"]

    def recover(self) -> list[dict[str, Any]]:
        """Counts the whole clips of the files on the disk, cuts off the rest.

        Returns:
            The clips' records.
        """
        records = []
        journal = self._file(CLIPS)
        if journal.exists():
            with ExitStack() as stack:
                files = {k: stack.enter_context(self._file(k).open("rb")) for k in self.streams}
                for line in journal.read_bytes().split(b"\n")[:-1]:
                    record = whole_clip(line, files, self.streams)
                    if record is None:
                        break
                    records.append(record)
        self.clips = len(records)
        self.frames = sum(record["frames"] for record in records)
        self.cut()
        return records

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
        for file in self._files.values():
            os.fsync(file.fileno())
        self.close()
        names = (CLIPS, *self.streams)
        return {
            "clips": self.clips,
            "frames": self.frames,
            "sha256": {key: sha256(self._file(key)) for key in names},
        }

    def close(self) -> None:
        """Closes the files."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def delete(self) -> None:
        """Deletes the files."""
        self.close()
        for key in (CLIPS, *self.streams):
            self._file(key).unlink(missing_ok=True)

    def _file(self, key: str) -> Path:
        return shard_file(self.path, key, self.number)

    def _open(self) -> None:
        for key in (CLIPS, *self.streams):
            file = self._file(key)
            file.parent.mkdir(exist_ok=True)
            self._files[key] = file.open("ab", buffering=0)

    def _write(self, key: str, blocks: Iterable[Buffer]) -> int:
        """Appends blocks to a file; returns their CRC-32."""
        crc = 0
        for block in blocks:
            crc = zlib.crc32(block, crc)
            view = memoryview(block)
            while view:
                view = view[self._files[key].write(view) :]
        return crc
