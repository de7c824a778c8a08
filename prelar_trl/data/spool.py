"""A clip on its way into a store: frames are written as they come, memory does not grow."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from prelar_trl.data.store import Stream

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
        """Writes one frame of every stream.

        Raises:
            ValueError: the streams are others than those of the first frame.
            SpoolError: no space is left, or the folder cannot be written.
        """
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
