"""Helpers that every room of the library may use; they import none of them."""

from __future__ import annotations

import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from math import inf
from numbers import Integral
from pathlib import Path
from typing import Any, TypeVar

__all__ = [
    "STOPPED",
    "absolute",
    "atomic_write",
    "check_choice",
    "check_integers",
    "check_range",
    "dotted",
    "end_with_parent",
    "git_state",
    "hold_signals",
    "listed",
    "lock_folder",
    "map_ahead",
    "map_paths",
    "one_line",
    "read_json",
    "sha256",
    "write_json",
]

T = TypeVar("T")
R = TypeVar("R")

STOPPED = 75
"""Exit code of a run that was told to stop and has saved: ``EX_TEMPFAIL``, run me again."""


@contextmanager
def atomic_write(path: str | os.PathLike[str], *, sync: bool = False) -> Iterator[Path]:
    """Gives a path beside ``path`` to write a file or folder to, and moves it there at the end.

    So ``path`` always holds all of the old content or all of the new; after an error, the old.

    Args:
        path: what to write; its folder must exist. A folder is never written over another.
        sync: also wait until the file is on the disk, so that it survives a loss of power.
    """
    path = Path(path)
    part = path.with_name(f"{path.stem}.part{path.suffix}")
    try:
        yield part
        if sync:
            sync_to_disk(part)
        os.replace(part, path)
        if sync:
            sync_to_disk(path.parent)
    finally:
        if part.is_dir():
            shutil.rmtree(part)
        else:
            part.unlink(missing_ok=True)


def sync_to_disk(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: str | os.PathLike[str], value: Any, *, sync: bool = False) -> None:
    """Writes a value as JSON, and the folders above; ``sync`` as in :func:`atomic_write`."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, sync=sync) as part:
        part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_json(path: str | os.PathLike[str], *, missing_ok: bool = False) -> dict[str, Any]:
    """The mapping that a JSON file holds; nothing where there is none and ``missing_ok``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or holds something else; the message names the file.
    """
    if missing_ok and not Path(path).is_file():
        return {}
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds no mapping, but {type(content).__name__}")
    return content


def sha256(file: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def dotted(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        flat |= dotted(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat


def one_line(error: BaseException) -> str:
    """What an error says, without line breaks."""
    return " ".join(str(error).split())


def lock_folder(path: str | os.PathLike[str]) -> int:
    """Locks a folder against other writers, until the handle is closed or the process ends.

    Raises:
        BlockingIOError: someone else holds the lock.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise
    return handle


def map_paths(change: Callable[[str], str], paths: Any) -> Any:
    """A path, or all text in a list or mapping, by ``change``; what is no text stays as it is.

    So does an address, which has ``://`` in it, such as ``hf://owner/name``.
    """
    if isinstance(paths, Mapping):
        return {map_paths(change, x): map_paths(change, y) for x, y in paths.items()}
    if isinstance(paths, list | tuple):
        return [map_paths(change, x) for x in paths]
    return change(paths) if isinstance(paths, str) and "://" not in paths else paths


def absolute(path: str) -> str:
    """One spelling for each place."""
    return os.path.abspath(os.path.expanduser(path))


def check_choice(name: str, value: object, choices: Iterable[object]) -> None:
    """Raises a ``ValueError`` that names the choices if ``value`` is none of them."""
    choices = list(choices)
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; choose {listed(map(str, choices))}")


def check_integers(low: int = 1, high: int = 2**31 - 1, **numbers: object) -> None:
    """Raises TypeError for what is no whole number, ValueError outside [``low``, ``high``]."""
    for name, number in numbers.items():
        if not isinstance(number, Integral) or isinstance(number, bool):
            raise TypeError(f"{name}={number!r} must be a whole number")
        if int(number) < low:
            raise ValueError(f"{name}={number} must be at least {low}")
        if int(number) > high:
            raise ValueError(f"{name}={number} must be at most {high}")


def check_range(low: float, high: float = inf, **numbers: Any) -> None:
    """Raises ValueError for a number outside [``low``, ``high``] or infinite, TypeError else."""
    for name, number in numbers.items():
        try:
            good = low <= number <= high and number < inf
        except TypeError:
            raise TypeError(f"{name}={number!r} must be a number") from None
        if not good:
            words = f"be at least {low}" if high == inf else f"lie in [{low}, {high}]"
            raise ValueError(f"{name}={number} must {words}")


def listed(words: Iterable[str]) -> str:
    """``a, b or c``."""
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last


def git_state(source: str | os.PathLike[str] = __file__) -> dict[str, Any] | None:
    """Commit and dirty flag of the checkout that tracks ``source``.

    None when ``source`` is not tracked: an installed wheel may lie inside a checkout of
    something else, whose commit says nothing about this code.
    """
    source = Path(source).resolve()

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(source.parent), *args],
                capture_output=True,
                text=True,
                stdin=subprocess.DEVNULL,
            )
        except OSError:  # git is not installed
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", source.name) is None:
        return None
    commit = git("rev-parse", "HEAD")
    if commit is None:
        return None
    return {"commit": commit, "dirty": git("status", "--porcelain") != ""}


def without_null(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings and groups of them, without those that are null."""
    return {
        name: without_null(value) if isinstance(value, Mapping) else value
        for name, value in settings.items()
        if value is not None
    }


@contextmanager
def hold_signals(numbers: Iterable[signal.Signals]) -> Iterator[None]:
    """These signals wait until the end; a process that starts inside begins by holding them too."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def map_ahead(
    pool: Executor, function: Callable[[T], R], items: Iterable[T], ahead: int
) -> Iterator[R]:
    """What a function gives for each item, by a pool, in their order.

    At most ``ahead`` calls are under way or wait to be taken, however many items there are.
    """
    waiting: deque[Future[R]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) == ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def end_with_parent() -> None:
    """In a process of multiprocessing: from now on it ends with its parent, however that ends.

    A parent that was killed cannot end it, and an environment or a decoder may hang.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
