"""Decodes a source with several processes, in order, into a clip store."""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import multiprocessing.process
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import av
import numpy as np

from prelar_trl.data.sources.base import ClipError, Item, Source
from prelar_trl.data.store import ACTIONS, ClipStore
from prelar_trl.data.writer import ClipWriter

logger = logging.getLogger(__name__)

Loaded = dict[str, np.ndarray] | str  # streams, or why there are none


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
    items = source.items()
    if not items:
        raise ValueError(f"source {str(source.root)!r} holds no clip of kind {source.kind!r}")
    options = source.options
    writer = ClipWriter(
        path,
        source=_described(source, items),
        height=options.size,
        width=options.size,
        decoder=source.decoder,
        resize=options.resize,
        shard_bytes=shard_bytes,
        info={"min_frames": min_frames, "frames": options.info} | (info or {}),
    )
    with writer:
        left = [item for item in items if item.name not in writer.done]
        done = len(items) - len(left)
        for item, loaded in load_in_order(source, left, workers):
            frames = 0
            if isinstance(loaded, str):
                writer.skip(item.name, loaded)
            elif len(loaded["pixels"]) < min_frames:
                writer.skip(item.name, f"shorter than {min_frames} frames")
            else:
                frames = len(loaded["pixels"])
                writer.add(
                    loaded.pop("pixels"),
                    loaded.pop(ACTIONS, None),
                    name=item.name,
                    label=item.label,
                    split=item.split,
                    **loaded,
                )
            done += 1
            if progress is not None:
                progress(done, len(items), frames)
    return ClipStore(path)


def _described(source: Source, items: Sequence[Item]) -> str:
    """Kind and list of the source, so that a store is not continued from another one by mistake."""
    names = "\n".join(item.name for item in items)
    digest = hashlib.sha256(names.encode("utf-8")).hexdigest()[:12]
    return f"prepare_videos, {source.kind}, {len(items)} clips, list {digest}"


def load_in_order(
    source: Source, items: Sequence[Item], workers: int
) -> Iterator[tuple[Item, Loaded]]:
    """Loads items with ``workers`` processes and yields them in their order.

    A file on which a decoder dies (not merely fails) is tried once more by itself, then given up.
    """
    if workers == 1:
        _start_worker()
        yield from ((item, _load(source, item)) for item in items)
        return
    left = deque(items)
    pool = _pool(workers)
    waiting: deque[tuple[Item, Future[Loaded]]] = deque()
    try:
        while left or waiting:
            try:
                while left and len(waiting) < 4 * workers:
                    waiting.append((left[0], pool.submit(_load, source, left[0])))
                    left.popleft()
                item, future = waiting[0]
                loaded = future.result()
                waiting.popleft()
            except BrokenProcessPool:
                left.extendleft(item for item, _ in reversed(waiting))
                waiting.clear()
                pool.shutdown(cancel_futures=True)
                item = left.popleft()
                loaded = _load_apart(source, item)
                pool = _pool(workers)
            yield item, loaded
    finally:
        pool.shutdown(cancel_futures=True)


def _pool(workers: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["prelar_trl.data.sources"])
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)


def _start_worker() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
        threading.Thread(target=_die_with, args=(parent,), daemon=True).start()
    av.logging.set_level(av.logging.PANIC)


def _die_with(parent: multiprocessing.process.BaseProcess) -> None:
    """A parent that was killed cannot end its workers: they look for themselves."""
    parent.join()
    os._exit(1)


def _load(source: Source, item: Item) -> Loaded:
    try:
        return source.load(item)
    except ClipError as error:
        return str(error)
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    except Exception as error:  # decoders fail on damage in many ways; one file stops no data set
        logger.exception("clip %r", item.name)
        return f"cannot be decoded: {type(error).__name__}"


def _load_apart(source: Source, item: Item) -> Loaded:
    with _pool(1) as pool:
        try:
            return pool.submit(_load, source, item).result()
        except BrokenProcessPool:
            return "the decoder crashed on it"
