"""Checkpoints: one atomic file with everything a continuation needs.

A checkpoint is a dictionary of tensors, numbers, strings, lists and dictionaries. It is read as
such: loading never runs code from the file. What is not finite is not written, and a file that was
damaged is not read.
"""

from __future__ import annotations

import logging
import math
import os
import random
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from prelar_trl.checkpoint_files import all_before, before, has_checkpoint
from prelar_trl.tensor_files import DamagedFileError, is_whole, read_tensors
from prelar_trl.utils import atomic_write

__all__ = [
    "DamagedFileError",
    "has_checkpoint",
    "kept_rng",
    "load_checkpoint",
    "load_newest_checkpoint",
    "read_tensors",
    "rng_state",
    "save_checkpoint",
    "set_rng_state",
]

FORMAT = 1
logger = logging.getLogger(__name__)


def save_checkpoint(
    path: str | os.PathLike[str],
    state: dict[str, Any],
    *,
    keep: int | None = None,
    finite: bool = True,
) -> Path:
    """Write ``state`` so that ``path`` always holds a whole checkpoint, the old or the new one.

    Args:
        path: the file, e.g. ``last.pt``.
        state: tensors, numbers, strings, lists and dictionaries.
        keep: how many stay: this one, and before it ``last_1.pt``, ``last_2.pt``, ...; older ones
            of these names are deleted. A damaged one takes no whole one's place. Default: it takes
            the place of the newest, and no other file is touched.
        finite: refuse NaN and infinity. Default: True.

    Raises:
        OSError: no space or not writable; what was there stays.
        ValueError: a tensor holds NaN or infinity, named; what was there stays.
    """
    path = Path(path)
    bad = first_not_finite(state) if finite else None
    if bad is not None:
        raise ValueError(
            f"checkpoint {path} was not written: {bad} holds NaN or infinity; the one before it is "
            "kept"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with atomic_write(path, sync=True) as part:
            with part.open("wb") as file:
                torch.save({"format": FORMAT, **state}, file)
            if keep is not None:
                _make_way(path, keep)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        free = shutil.disk_usage(path.parent).free / 2**20
        raise OSError(
            f"checkpoint {path} was not written ({free:.0f} MiB free on the disk); "
            "the one before it is kept, free some space and continue"
        ) from error
    if keep is not None:
        for number, other in all_before(path).items():
            if number >= keep:
                other.unlink(missing_ok=True)
    return path


def _make_way(path: Path, keep: int) -> None:
    """The checkpoint at ``path`` is also ``<stem>_1``, those before it move on by one."""
    if keep < 2 or not path.is_file() or not is_whole(path):
        return
    for number in range(keep - 1, 1, -1):
        if before(path, number - 1).is_file():
            os.replace(before(path, number - 1), before(path, number))
    with atomic_write(before(path, 1)) as link:
        link.unlink(missing_ok=True)  # left by a process that was killed here
        try:
            os.link(path, link)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, link)


def first_not_finite(state: Mapping[str, Any]) -> str | None:
    """The name of a tensor with NaN or infinity; one reduction where there is none.

    ``losses`` may be: those of an update that was skipped, to be shown again.
    """
    kept = {key: value for key, value in state.items() if key != "losses"}
    tensors = {name: x for name, x in _floating(kept) if x.numel()}
    if not tensors or get_total_norm(tensors.values(), norm_type=math.inf).isfinite():
        return None
    return next(name for name, x in tensors.items() if not x.isfinite().all())


def _floating(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The floating-point tensors of nested dictionaries and lists, by their dotted names."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield name, value
        return
    items: Any = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    for key, item in items:
        yield from _floating(item, f"{name}.{key}" if name else str(key))


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Raises:
        FileNotFoundError: there is none.
        DamagedFileError: the file is damaged, or something else altogether.
        ValueError: it is none of ours, or of a newer format.
    """
    path = Path(path)
    if not path.is_file():
        older = next(iter(all_before(path).values()), None)
        what = f"copy {older.name} there" if older else "the run has saved none yet"
        raise FileNotFoundError(f"no checkpoint {path}: {what}")
    try:
        state = read_tensors(path)
    except DamagedFileError as error:
        raise DamagedFileError(
            f"checkpoint {path} cannot be read ({error}): the file is damaged or not one of this "
            "package"
        ) from error
    if not isinstance(state, dict) or not isinstance(state.get("format"), int):
        raise ValueError(f"{path} is not a checkpoint of this package")
    if state["format"] > FORMAT:
        raise ValueError(
            f"checkpoint {path} has format {state['format']}; this version reads up to {FORMAT}, "
            "update the package"
        )
    return state


def load_newest_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """As :func:`load_checkpoint`; if that one is damaged or gone, the newest whole one before it.

    It is said by name, as a warning.
    """
    path = Path(path)
    for other in all_before(path).values():
        try:
            return load_checkpoint(path)
        except (DamagedFileError, FileNotFoundError) as error:
            logger.warning("%s; taking %s, the one before it, instead", error, other)
            path = other
    return load_checkpoint(path)


def rng_state() -> dict[str, Any]:
    """The state of all global random generators: torch, CUDA, NumPy, Python."""
    version, keys, position, has_gauss, gauss = cast(Any, np.random.get_state())  # noqa: NPY002
    python_version, python_keys, python_gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [version, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss],
        "python": [python_version, list(python_keys), python_gauss],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what :func:`rng_state` gave; CUDA only with as many devices as then."""
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    version, keys, *rest = state["numpy"]
    np.random.set_state((version, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    python_version, python_keys, python_gauss = state["python"]
    random.setstate((python_version, tuple(python_keys), python_gauss))


@contextmanager
def kept_rng() -> Iterator[None]:
    """What is drawn inside does not move the global random generators."""
    state = rng_state()
    try:
        yield
    finally:
        set_rng_state(state)
