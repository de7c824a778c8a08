"""Checkpoints: one atomic file with everything a continuation needs.

A checkpoint is a dictionary of tensors, numbers, strings, lists and dictionaries. It is read as
such: loading never runs code from the file.
"""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from prelar_trl.utils import atomic_write

__all__ = ["load_checkpoint", "rng_state", "save_checkpoint", "set_rng_state"]

FORMAT = 1


def save_checkpoint(path: str | os.PathLike[str], state: dict[str, Any]) -> Path:
    """Write ``state`` so that ``path`` always holds a whole checkpoint, the old or the new one.

    Raises:
        OSError: no space or not writable; what was there stays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with atomic_write(path, sync=True) as part, part.open("wb") as file:
            torch.save({"format": FORMAT, **state}, file)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        free = shutil.disk_usage(path.parent).free / 2**20
        raise OSError(
            f"checkpoint {path} was not written ({free:.0f} MiB free on the disk); "
            "the one before it is kept, free some space and continue"
        ) from error
    return path


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is damaged, is none of ours, or of a newer format.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}: the run has saved none yet")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes make the unpickler raise nearly anything
        raise ValueError(
            f"checkpoint {path} cannot be read ({type(error).__name__}): the file is damaged or "
            "not one of this package"
        ) from error
    if not isinstance(state, dict) or not isinstance(state.get("format"), int):
        raise ValueError(f"{path} is not a checkpoint of this package")
    if state["format"] > FORMAT:
        raise ValueError(
            f"checkpoint {path} has format {state['format']}; this version reads up to {FORMAT}, "
            "update the package"
        )
    return state


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
