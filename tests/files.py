"""Files of a test: what a folder holds, and damage."""

from __future__ import annotations

from pathlib import Path


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def flip(file: Path, byte: int | None = None, bit: int = 0) -> None:
    """Flip a bit of a byte. Default: the one in the middle."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2 if byte is None else byte] ^= 1 << bit
    file.write_bytes(data)
