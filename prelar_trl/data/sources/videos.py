"""Any folder of videos and of folders of pictures."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from prelar_trl.data.sources.base import ClipError, Item, text
from prelar_trl.data.sources.frames import (
    DECODER,
    PICTURE_DECODER,
    PICTURES,
    FrameOptions,
    picture_clip,
    video_clip,
)

VIDEOS = (".mp4", ".webm", ".avi", ".mov", ".gif", ".mkv", ".m4v", ".mpg", ".mpeg")


class VideoFolder:
    """Videos below a folder, and folders with pictures, each of which is one clip.

    A clip is named by its path below ``root``. Pictures are taken in natural order (2 before 10).
    Symbolic links are followed, loops are not.

    Raises:
        FileNotFoundError: ``root`` is no folder.
    """

    kind = "videos"
    decoder = f"{DECODER}, {PICTURE_DECODER}"

    def __init__(self, root: str | Path, options: FrameOptions) -> None:
        self.root, self.options = Path(root), options
        if not self.root.is_dir():
            raise FileNotFoundError(f"source folder {str(root)!r} does not exist")

    def items(self) -> list[Item]:
        """All clips, ordered by name."""
        found: list[Item] = []
        for folder, files in _walk(self.root):
            names = [name for name in files if not name.startswith(".")]
            for name in names:
                if name.lower().endswith(VIDEOS):
                    path = folder / name
                    found.append(Item(text(path.relative_to(self.root)), path))
            if any(name.lower().endswith(PICTURES) for name in names):
                name = folder.relative_to(self.root) if folder != self.root else folder.name
                found.append(Item(text(name) + "/", folder))
        return sorted(found, key=lambda item: item.name)

    def load(self, item: Item) -> dict[str, np.ndarray]:
        """See `Source.load`."""
        if not item.path.is_dir():
            return video_clip(item.path, self.options)
        return picture_clip(pictures_in(item.path), self.options)


def pictures_in(folder: Path) -> list[Path]:
    """The pictures of a folder in natural order.

    Raises:
        ClipError: there is none.
    """
    names = [n for n in os.listdir(folder) if n.lower().endswith(PICTURES) and n[0] != "."]
    if not names:
        raise ClipError("no picture in the folder")
    return [folder / name for name in sorted(names, key=_natural)]


def _natural(name: str) -> list[tuple[int, int, str]]:
    parts = re.split(r"(\d+)", name)
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in parts if p] + [(2, 0, name)]


def _walk(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """``os.walk`` that follows links and enters no folder twice."""
    seen: set[tuple[int, int]] = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders.sort()
        yield Path(folder), sorted(files)
