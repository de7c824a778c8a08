"""Any folder of videos and of folders of pictures."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from prelar_trl.data.sources.base import Clip, ClipError, Item, text, with_distinct_names
from prelar_trl.data.sources.decoding import DECODER, video_clip
from prelar_trl.data.sources.frames import FrameOptions
from prelar_trl.data.sources.numbering import in_time_order
from prelar_trl.data.sources.pictures import (
    ANIMATED,
    PICTURE_DECODER,
    PICTURES,
    animation_clip,
    is_animated,
    picture_clip,
)

VIDEOS = (
    *(".mp4", ".m4v", ".mov", ".qt", ".f4v", ".3gp", ".3g2", ".mkv", ".mk3d", ".webm", ".ogv"),
    *(".avi", ".divx", ".wmv", ".asf", ".flv", ".mpg", ".mpeg", ".mpe", ".m1v", ".m2v", ".vob"),
    *(".ts", ".mts", ".m2ts", ".m2t", ".mod", ".tod", ".mxf", ".dv", ".rm", ".rmvb", ".wtv"),
    *(".h264", ".264", ".hevc", ".h265", ".265", ".ivf", ".y4m", ".mjpeg", ".mjpg", ".nut"),
)
HIDDEN = frozenset(  # folders of thumbnails and of deleted files, besides those with a dot
    ("@eadir", "@tmp", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "$recycle.bin")
    + ("system volume information", "lost+found", "__macosx")
)
_THUMBNAIL = re.compile(r"[-_. ](thumb|thumbnail|poster|preview|cover|fanart)$", re.IGNORECASE)
STRAYS = "pictures left out that are not of the numbered series"


@dataclass
class Contents:
    """What the files of one folder are.

    Attributes:
        videos: files that are a clip each, animated pictures among them.
        pictures: files that are a frame each, of one clip.
        left_out: the others, reason -> names.
    """

    videos: list[str] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))


class VideoFolder:
    """Videos below a folder, and folders with pictures, each of which is one clip.

    A clip is named by its path below ``root``. Pictures are taken in the order of their numbers.
    Symbolic links are followed, loops are not.

    Attributes:
        left_out: files that are no clips, and folders that cannot be read: reason -> names.

    Raises:
        FileNotFoundError: ``root`` is no folder.
    """

    kind = "videos"
    decoder = f"{DECODER}, {PICTURE_DECODER}"

    def __init__(self, root: str | Path, options: FrameOptions) -> None:
        self.root, self.options = Path(root), options
        if not self.root.is_dir():
            raise FileNotFoundError(f"source folder {str(root)!r} does not exist")
        os.listdir(self.root)  # says so if it cannot be read
        self.left_out: dict[str, list[str]] = defaultdict(list)
        self._items = with_distinct_names(list(self._find()))

    def items(self) -> list[Item]:
        """All clips, ordered by name."""
        return self._items

    def load(self, item: Item) -> Clip:
        """See `Source.load`."""
        if not item.path.is_dir():
            animated = item.path.suffix.lower() in ANIMATED and item.path.suffix.lower() != ".gif"
            return (animation_clip if animated else video_clip)(item.path, self.options)
        pictures = contents(item.path, _listed(item.path)[1]).pictures
        if not pictures:
            raise ClipError("no picture in the folder")
        names, strays = in_time_order(pictures)
        clip = picture_clip([item.path / name for name in names], self.options)
        if strays:
            clip.notes[STRAYS] = len(strays)
        return clip

    def _find(self) -> Iterator[Item]:
        for folder, files, hidden in walk(self.root, self.left_out):
            below = folder.relative_to(self.root)
            if hidden:
                media = [f for f in files if f.lower().endswith(VIDEOS + PICTURES)]
                self._leave_out("files in hidden folders", below, media)
                continue
            found = contents(folder, files)
            for reason, names in found.left_out.items():
                self._leave_out(reason, below, names)
            for name in found.videos:
                yield Item(text(below / name), folder / name)
            if found.pictures:
                yield Item(text(below if below.parts else self.root.absolute().name) + "/", folder)

    def _leave_out(self, reason: str, below: Path, names: list[str]) -> None:
        if names:
            self.left_out[reason] += [text(below / name) for name in names]


def contents(folder: Path, names: list[str]) -> Contents:
    """Tells what the files ``names`` of a folder are."""
    found = Contents()
    videos = _named_like_videos(folder, names)
    for name in sorted(names):
        suffix = Path(name).suffix.lower()
        if name.startswith("."):
            found.left_out["hidden files"].append(name)
        elif suffix in VIDEOS or (suffix in ANIMATED and is_animated(folder / name)):
            found.videos.append(name)
        elif suffix not in PICTURES:
            found.left_out[f"{suffix} files" if suffix else "files without suffix"].append(name)
        elif _THUMBNAIL.sub("", Path(name).stem) in videos:
            found.left_out["pictures of videos of the same name"].append(name)
        else:
            found.pictures.append(name)
    return found


def _named_like_videos(folder: Path, names: list[str]) -> set[str]:
    """The names, with and without suffix, of the videos that a folder's pictures may show."""
    if "thumb" in folder.name.lower():  # of videos above it, or in a folder beside it
        near = (path for pattern in ("*", "*/*") for path in folder.parent.glob(pattern))
        names = [*names, *(path.name for path in near)]
    videos = {name for name in names if name.lower().endswith(VIDEOS)}
    return videos | {Path(name).stem for name in videos}


def walk(root: Path, left_out: dict[str, list[str]]) -> Iterator[tuple[Path, list[str], bool]]:
    """Folders below ``root`` with their files, and whether they are hidden.

    Follows links and enters no folder twice. A folder that cannot be read goes to ``left_out``.
    """
    seen: set[tuple[int, int]] = set()
    waiting = [(root, False)]
    while waiting:
        folder, hidden = waiting.pop()
        try:
            status = folder.stat()
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            folders, files = _listed(folder)
        except OSError as error:
            reason = f"folders that cannot be read ({error.strerror})"
            left_out[reason].append(text(folder.relative_to(root)) + "/")
            continue
        yield folder, files, hidden
        for name in reversed(folders):
            below = hidden or name.startswith(".") or name.lower() in HIDDEN
            waiting.append((folder / name, below))


def _listed(folder: Path) -> tuple[list[str], list[str]]:
    """The names of the folders and of the files in a folder, each in order."""
    folders, files = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                is_folder = entry.is_dir()
            except OSError:  # a link that leads nowhere
                is_folder = False
            (folders if is_folder else files).append(entry.name)
    return sorted(folders), sorted(files)
