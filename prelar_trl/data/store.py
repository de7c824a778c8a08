"""The clip store: the folder that training reads, and its reader.

::

    <store>/
      store.json             format, version, source, decoder, resize, streams, shards + checksums
      clips/000000.jsonl     one line a clip: name, frames, label, split, info, crc32s
      pixels/000000.bin      uint8   [frames, 3, H, W], clip after clip, nothing between
      <image>/000000.bin     uint8   [frames, 3, H, W], further image streams, e.g. ``flow``
      actions/000000.bin     float32 [frames, A], only if known
      skipped.jsonl          what the source had and could not be used, with the reason
      spool/                 clips that are being decoded, while the store is written

Files with one number are one shard. The bytes depend on nothing but the clips, their order and the
settings: no date, no path, no machine. A shard is sealed in ``store.json`` with the SHA-256 of each
of its files; while it is open, its ``.jsonl`` is the journal by which `ClipWriter` resumes.

`EpisodeReplay` writes such a store too, an episode a clip, with ``rewards/`` and ``terminated/``
beside the actions. It deletes its oldest shards; ``store.json`` counts them under ``evicted``.
"""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prelar_trl.utils import check_integers, sha256

FORMAT = "prelar-clips"
VERSION = 1
KEYS = ("source", "height", "width", "shard_bytes", "info", "streams", "shards", "complete")
ACTIONS = "actions"
CLIPS = "clips"
SKIPPED = "skipped.jsonl"
SPOOL = "spool"
DTYPES = frozenset(np.dtype(code).name for code in "?bhilqBHILQefd")
VERIFY_ON_OPEN_BYTES = 64 * 2**20


class StoreError(ValueError):
    """A clip store that cannot be read or continued; the message says what to do."""


@dataclass(frozen=True)
class Stream:
    """What a store keeps for every frame under one name, which is that of a folder.

    Raises:
        ValueError: the name, dtype or shape is none.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w+", self.name) or self.name in (CLIPS, SPOOL):
            raise ValueError(
                f"stream name {self.name!r} must be a word other than {CLIPS} and {SPOOL}"
            )
        if self.dtype not in DTYPES:
            raise ValueError(f"stream {self.name} has dtype {self.dtype!r}: use numbers or bool")
        sizes = {f"stream {self.name}: shape[{i}]": size for i, size in enumerate(self.shape)}
        check_integers(0, **sizes)

    @property
    def frame_bytes(self) -> int:
        """Bytes of one frame."""
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


def shard_file(path: Path, stream: str, shard: int) -> Path:
    """The file of one stream (or of ``clips``) of one shard."""
    return path / stream / f"{shard:06d}.{'jsonl' if stream == CLIPS else 'bin'}"


def read_meta(path: Path) -> dict[str, Any]:
    """Reads ``store.json``.

    Raises:
        FileNotFoundError: there is no store.
        StoreError: damaged, foreign, or of another version.
    """
    file = path / "store.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"no clip store at {str(path)!r} (no store.json): make one with collect_videos or "
            "prepare_videos"
        )
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StoreError(f"{str(file)!r} is damaged ({error}): make the store again") from None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise StoreError(f"{str(file)!r} is not a clip store of this project: use another folder")
    if meta.get("version") != VERSION:
        raise StoreError(
            f"{str(path)!r} has store version {meta.get('version')}, this code reads {VERSION}: "
            "make the store again"
        )
    if lacking := [key for key in KEYS if key not in meta]:
        raise StoreError(f"{str(file)!r} is damaged (no {lacking[0]!r}): make the store again")
    try:
        streams_of(meta)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{str(file)!r} is damaged ({error}): make the store again") from None
    return meta


def streams_of(meta: dict[str, Any]) -> dict[str, Stream]:
    """The streams that ``store.json`` declares."""
    return {
        name: Stream(name, spec["dtype"], tuple(spec["shape"]))
        for name, spec in meta["streams"].items()
    }


def evicted_of(meta: dict[str, Any]) -> dict[str, int]:
    """How many shards, clips and frames were deleted before the first one that there is."""
    return meta.get("evicted") or {"shards": 0, "clips": 0, "frames": 0}


def read_records(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a ``.jsonl`` file, none if it is missing; StoreError if one is damaged."""
    lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise StoreError(f"{str(file)!r} is damaged ({error}): restore that file") from None


class MappedShards:
    """The streams of a store, memory-mapped and read-only; a shard may still grow."""

    def __init__(self, path: Path, streams: dict[str, Stream]) -> None:
        self.path, self.streams = path, streams
        self._maps: dict[tuple[str, int], tuple[mmap.mmap, np.ndarray]] = {}

    def read(self, stream: str, shard: int, start: int, frames: int) -> np.ndarray:
        """A view ``[frames, *shape]`` of consecutive frames of one shard."""
        return self._map(stream, shard, start + frames)[1][start : start + frames]

    def prefetch(self, stream: str, shard: int, start: int, frames: int) -> None:
        """Tells the system which frames will be read soon, so that it fetches them all at once.

        For windows that are not in memory this is ten times faster than reading alone.
        """
        size = self.streams[stream].frame_bytes
        begin = start * size
        page = begin // mmap.PAGESIZE * mmap.PAGESIZE
        memory = self._map(stream, shard, start + frames)[0]
        memory.madvise(mmap.MADV_WILLNEED, page, begin - page + frames * size)

    def _map(self, stream: str, shard: int, frames: int) -> tuple[mmap.mmap, np.ndarray]:
        key = (stream, shard)
        if key not in self._maps or len(self._maps[key][1]) < frames:
            spec = self.streams[stream]
            with shard_file(self.path, stream, shard).open("rb") as file:
                memory = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
            whole = len(memory) // spec.frame_bytes
            array = np.frombuffer(memory, spec.dtype, whole * int(np.prod(spec.shape)))
            self._maps[key] = (memory, array.reshape(-1, *spec.shape))
        return self._maps[key]


class ClipStore:
    """Reads a finished clip store.

    Sizes and the clip lists are always checked. The pixels' checksums are checked on opening when
    the store is at most 64 MiB, else by `verify`.

    Args:
        path: the folder, or that of a fine-tuning run, whose replay is meant.

    Attributes:
        meta: contents of ``store.json``.
        streams: name -> `Stream`.
        names, labels, splits, infos: per clip; all but the name may be None.
        frames, shard, row: int64 ``[N]``: length, shard, first frame within the shard.
        shards: the mapped files.

    Raises:
        FileNotFoundError: there is no store.
        StoreError: unfinished, damaged, foreign or of another version.
    """

    def __init__(self, path: str | Path) -> None:
        folder, replay = Path(path), Path(path, "replay")
        is_run = not (folder / "store.json").exists() and (replay / "store.json").is_file()
        self.path = replay if is_run else folder
        self.meta = read_meta(self.path)
        try:
            self._open(path)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise StoreError(
                f"{str(self.path / 'store.json')!r} is damaged ({error!r}): make the store again"
            ) from None

    def _open(self, path: str | Path) -> None:
        if not self.meta["complete"]:
            source = self.meta["source"]
            how = "finetune, with resume=true" if source == "replay" else source
            raise StoreError(
                f"clip store {str(path)!r} is unfinished: run the command that makes it ({how}) "
                "once more, it continues where it stopped"
            )
        self.streams = streams_of(self.meta)
        self.shards = MappedShards(self.path, self.streams)
        records: list[dict[str, Any]] = []
        place: list[tuple[int, int]] = []
        for number, seal in self._seals():
            self._check_sizes(number, seal)
            self._check_digest(number, seal, CLIPS)
            row = 0
            for record in read_records(shard_file(self.path, CLIPS, number)):
                records.append(record)
                place.append((number, row))
                row += record["frames"]
        self.names: list[str] = [r["name"] for r in records]
        self.labels: list[str | int | None] = [r["label"] for r in records]
        self.splits: list[str | None] = [r["split"] for r in records]
        self.infos: list[dict[str, Any] | None] = [r["info"] for r in records]
        self.frames = np.array([r["frames"] for r in records], dtype=np.int64)
        self.shard, self.row = np.array(place, dtype=np.int64).reshape(-1, 2).T
        if self.num_bytes <= VERIFY_ON_OPEN_BYTES:
            self.verify()

    def _seals(self) -> Iterator[tuple[int, dict[str, Any]]]:
        return enumerate(self.meta["shards"], evicted_of(self.meta)["shards"])

    def _check_sizes(self, number: int, seal: dict[str, Any]) -> None:
        sizes = {k: seal["frames"] * s.frame_bytes for k, s in self.streams.items()}
        for name in (CLIPS, *sizes):
            file = shard_file(self.path, name, number)
            if not file.is_file():
                raise self._damaged(file, "it is missing")
            size = file.stat().st_size
            if size != sizes.get(name, size):
                raise self._damaged(file, f"it has {size} bytes, not {sizes[name]}")

    def _check_digest(self, number: int, seal: dict[str, Any], name: str) -> None:
        file = shard_file(self.path, name, number)
        if sha256(file) != seal["sha256"][name]:
            raise self._damaged(file, "its checksum differs")

    def _damaged(self, file: Path, why: str) -> StoreError:
        return StoreError(
            f"clip store is damaged at {str(file)!r} ({why}): delete the folder "
            f"{str(self.path)!r} and make it again, or restore that file"
        )

    def __len__(self) -> int:
        return len(self.names)

    @property
    def num_frames(self) -> int:
        """Frames of all clips together."""
        return int(self.frames.sum())

    @property
    def num_bytes(self) -> int:
        """Bytes of all streams together."""
        return self.num_frames * sum(s.frame_bytes for s in self.streams.values())

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of a frame, in pixels."""
        _, height, width = self.streams["pixels"].shape
        return height, width

    def verify(self) -> None:
        """Compares every file with its checksum. Reads the whole store.

        Raises:
            StoreError: naming the first file that differs.
        """
        for number, seal in self._seals():
            for name in seal["sha256"]:
                self._check_digest(number, seal, name)

    def skipped(self) -> list[tuple[str, str]]:
        """Name and reason of each clip that the source had and that could not be used."""
        return [(r["name"], r["reason"]) for r in read_records(self.path / SKIPPED)]

    def notes(self) -> dict[str, list[tuple[str, int]]]:
        """What was left out of clips that are kept: reason -> (name, how many) of each clip."""
        notes: dict[str, list[tuple[str, int]]] = {}
        for name, info in zip(self.names, self.infos, strict=True):
            for reason, count in ((info or {}).get("notes") or {}).items():
                notes.setdefault(reason, []).append((name, count))
        return notes

    def read(
        self, clip: int, stream: str = "pixels", start: int = 0, frames: int | None = None
    ) -> np.ndarray:
        """A read-only view ``[frames, *shape]`` of one clip, by default of all its frames."""
        frames = int(self.frames[clip]) - start if frames is None else frames
        row = int(self.row[clip]) + start
        return self.shards.read(stream, int(self.shard[clip]), row, frames)

    def __repr__(self) -> str:
        height, width = self.size
        return (
            f"ClipStore({str(self.path)!r}: {len(self)} clips, {self.num_frames} frames of "
            f"{height}x{width}, source={self.meta['source']!r})"
        )
