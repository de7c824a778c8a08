"""Files that ``torch.save`` wrote, read as data only and only as they were written.

Every room of the library may use this; it imports none of them.
"""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import torch

__all__ = ["DamagedFileError", "is_whole", "read_tensors"]


class DamagedFileError(ValueError):
    """A file of tensors whose bytes are not those that were written, or that is something else."""


def is_whole(path: Path) -> bool:
    """Whether the checksums agree that the file's entries hold; torch does not look at them."""
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except Exception:  # damaged headers make it raise nearly anything
        return False


def read_tensors(path: str | os.PathLike[str]) -> Any:
    """Read onto the CPU what ``torch.save`` wrote.

    ``torch.load`` compares no checksum: of a file with a flipped bit it gives other weights. Files
    in the form of before torch 1.6, which have none, are read too.

    Raises:
        DamagedFileError: it is damaged, holds more than data, or is no file of tensors.
    """
    try:
        if zipfile.is_zipfile(path) and not is_whole(Path(path)):
            raise DamagedFileError(f"{path} is damaged: a checksum in it differs")
        return torch.load(path, map_location="cpu", weights_only=True)
    except DamagedFileError:
        raise
    except Exception as error:  # damaged bytes make the unpickler raise nearly anything
        raise DamagedFileError(f"{path} is no file of tensors ({type(error).__name__})") from error
