"""Decodes a source with several processes, in order, into a clip store."""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import signal
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import av.logging

from prelar_trl.data.shards import Spool, SpoolError
from prelar_trl.data.sources.base import ClipError, Item, Source
from prelar_trl.data.store import SPOOL, ClipStore
from prelar_trl.data.writer import ClipWriter
from prelar_trl.utils import end_with_parent, map_ahead

logger = logging.getLogger(__name__)

Loaded = tuple[Spool, dict[str, int]] | str  # clip and its notes, or why there is none


def prepare(
    source: Source,
    path: str | Path,
    *,
    min_frames: int = 2,
    workers: int = 1,
    shard_bytes: int = 256 * 2**20,
    info: dict | None = None,
    progress: Callable[[int, int, int], None] | None = None,
) -> ClipStore:
    """Turns a source into a clip store; run again, it continues where it was stopped.

    Args:
        source: what to read; its ``options`` go into the store's metadata.
        path: the store.
        min_frames: shorter clips are skipped.
        workers: decoding processes.
        shard_bytes: see `ClipWriter`.
        info: further settings for the metadata.
        progress: called after each clip with (clips done, clips in all, frames of this clip).

    Raises:
        ValueError: nothing to read, nothing usable, or bad settings; before decoding if possible.
        StoreError: the store was begun with other settings.
        OSError: no space is left; what was finished is safe.
    """
    if min_frames < 1 or workers < 1:
        raise ValueError(f"min_frames={min_frames} and workers={workers} must be at least 1")
    options = source.options
    if options.max_frames is not None and options.max_frames < min_frames:
        raise ValueError(
            f"max_frames={options.max_frames} cuts every clip off below min_frames={min_frames}: "
            "nothing would be left"
        )
    items = source.items()
    if not items:
        raise ValueError(
            f"source {str(source.root)!r} holds no clip of kind {source.kind!r}"
            + "".join(f"; {len(names)} {what}" for what, names in source.left_out.items())
        )
    name, count = Counter(item.name for item in items).most_common(1)[0]
    if count > 1:
        raise ValueError(f"source {str(source.root)!r} names {count} clips {name!r}")
    # Kind and list, so that a store is not continued from another source by mistake.
    digest = hashlib.sha256("\n".join(item.name for item in items).encode("utf-8")).hexdigest()
    writer = ClipWriter(
        path,
        source=f"prepare_videos, {source.kind}, {len(items)} clips, list {digest[:12]}",
        height=options.size,
        width=options.size,
        decoder=source.decoder,
        resize=options.resize,
        shard_bytes=shard_bytes,
        info={"min_frames": min_frames, "frames": asdict(options)} | (info or {}),
        left_out=source.left_out,
    )
    left = [item for item in items if item.name not in writer.done]
    loads = load_in_order(source, left, workers, writer.path / SPOOL)
    with writer, writer.saving(), closing(loads):
        for done, (item, loaded) in enumerate(loads, len(items) - len(left) + 1):
            frames = _put(writer, item, loaded, min_frames)
            if progress is not None:
                progress(done, len(items), frames)
    return ClipStore(path)


def _put(writer: ClipWriter, item: Item, loaded: Loaded, min_frames: int) -> int:
    """Adds a clip to the store, or notes why not; returns the number of frames added."""
    if isinstance(loaded, str):
        writer.skip(item.name, loaded)
        return 0
    spool, notes = loaded
    if spool.frames < min_frames:
        spool.delete()
        writer.skip(item.name, f"shorter than {min_frames} frames")
        return 0
    info = {"notes": notes} if notes else None
    writer.add_spool(spool, name=item.name, label=item.label, split=item.split, info=info)
    return spool.frames


def load_in_order(
    source: Source, items: Sequence[Item], workers: int, folder: Path
) -> Generator[tuple[Item, Loaded], None, None]:
    """Loads items with ``workers`` processes and yields them in their order.

    A clip is decoded into files in ``folder``, so that its length costs no memory. A file on which
    a decoder dies (not merely fails) is tried once more by itself, then given up.
    """
    if workers == 1:
        _start_worker(source)
        for number, item in enumerate(items):
            yield item, _load(source, item, folder / str(number))
        return
    pairs = [(item, folder / str(number)) for number, item in enumerate(items)]
    done = 0
    while done < len(pairs):
        pool = _pool(workers, source)
        try:
            for loaded in map_ahead(pool, _load_here, pairs[done:], 4 * workers):
                yield items[done], loaded
                done += 1
        except BrokenProcessPool:
            pool.shutdown(cancel_futures=True)  # nothing else writes into the folders then
            yield items[done], _load_apart(source, *pairs[done])
            done += 1
        finally:
            pool.shutdown(cancel_futures=True)


def _pool(workers: int, source: Source) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["prelar_trl.data.sources"])
    return ProcessPoolExecutor(
        workers, mp_context=context, initializer=_start_worker, initargs=(source,)
    )


_source: Source | None = None  # of this process, if it is a worker


def _start_worker(source: Source) -> None:
    global _source  # sent once a process, not once a clip
    if multiprocessing.parent_process() is not None:
        _source = source
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
        end_with_parent()
    av.logging.set_level(av.logging.PANIC)


def _load_here(pair: tuple[Item, Path]) -> Loaded:
    assert _source is not None, "not a worker"
    return _load(_source, *pair)


def _load(source: Source, item: Item, folder: Path) -> Loaded:
    spool = Spool(folder)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")  # of damage, which is noted
            clip = source.load(item)
            for frame in clip.frames:
                spool.append(frame)
        spool.close()
        return spool, dict(clip.notes)
    except SpoolError:
        spool.delete()
        raise
    except ClipError as error:
        reason = str(error)
    except OSError as error:
        reason = f"cannot be read: {error.strerror or error}"
    except Exception as error:  # decoders fail on damage in many ways; one file stops no data set
        logger.exception("clip %r", item.name)
        reason = f"cannot be decoded: {type(error).__name__}"
    spool.delete()
    return reason


def _load_apart(source: Source, item: Item, folder: Path) -> Loaded:
    with _pool(1, source) as pool:
        try:
            return pool.submit(_load_here, (item, folder)).result()
        except BrokenProcessPool:
            Spool(folder).delete()
            return "the decoder crashed on it"
