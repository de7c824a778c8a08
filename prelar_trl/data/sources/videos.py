"""Any folder of videos and of folders of pictures."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from prelar_trl.data.sources.base import (
    Clip,
    ClipError,
    FrameOptions,
    Item,
    Source,
    text,
    with_distinct_names,
)
from prelar_trl.data.sources.decoding import DECODER, video_clip
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


class VideoFolder(Source):
    """Videos below a folder, and folders with pictures, each of which is one clip.

    A clip is named by its path below ``root``. Pictures are taken in the order of their numbers.
    Symbolic links are followed, loops are not. ``left_out`` tells the files that are no clips, and
    the folders that cannot be read.
    """

    kind = "videos"
    decoder = f"{DECODER}, {PICTURE_DECODER}"

    def __init__(self, root: str | Path, options: FrameOptions) -> None:
        super().__init__(root, options)
        os.listdir(self.root)  # says so if it cannot be read
        self._items = with_distinct_names(list(self._find()))

    def load(self, item: Item) -> Clip:
        """See `Source.load`."""
        if not item.path.is_dir():
            suffix = item.path.suffix.lower()
            animated = suffix in ANIMATED and suffix != ".gif"
            return (animation_clip if animated else video_clip)(item.path, self.options)
        files = [file.name for file in item.path.iterdir() if not os.path.isdir(file)]
        _, pictures, _ = classify(item.path, files)
        if not pictures:
            raise ClipError("no picture in the folder")
        names, strays = in_time_order(pictures)
        clip = picture_clip([item.path / name for name in names], self.options)
        if strays:
            clip.notes[STRAYS] = len(strays)
        return clip

    def _find(self) -> Iterator[Item]:
        seen: set[str] = set()
        for place, folders, files in os.walk(self.root, onerror=self._note_error, followlinks=True):
            if os.path.realpath(place) in seen:
                folders.clear()
                continue
            seen.add(os.path.realpath(place))
            folders.sort()
            folder = Path(place)
            below = folder.relative_to(self.root)
            if any(name.startswith(".") or name.lower() in HIDDEN for name in below.parts):
                media = sorted(f for f in files if f.lower().endswith(VIDEOS + PICTURES))
                videos, pictures, left_out = [], [], {"files in hidden folders": media}
            else:
                videos, pictures, left_out = classify(folder, files)
            for reason, names in left_out.items():
                for name in names:
                    self.left_out[reason].append(text(below / name))
            for name in videos:
                yield Item(text(below / name), folder / name)
            if pictures:
                yield Item(text(below if below.parts else self.root.absolute().name) + "/", folder)

    def _note_error(self, error: OSError) -> None:
        below = Path(error.filename).relative_to(self.root)
        self.left_out[f"folders that cannot be read ({error.strerror})"].append(text(below) + "/")


def classify(folder: Path, names: list[str]) -> tuple[list[str], list[str], dict[str, list[str]]]:
    """Tells what the files ``names`` of a folder are, each in order.

    Returns:
        Files that are a clip each, animated pictures among them; those that are a frame each, of
        one clip; the others, reason -> names.
    """
    clips, frames, left_out = [], [], defaultdict(list)
    videos = _named_like_videos(folder, names)
    for name in sorted(names):
        suffix = Path(name).suffix.lower()
        if name.startswith("."):
            left_out["hidden files"].append(name)
        elif suffix in VIDEOS or (suffix in ANIMATED and is_animated(folder / name)):
            clips.append(name)
        elif suffix not in PICTURES:
            left_out[f"{suffix} files" if suffix else "files without suffix"].append(name)
        elif _THUMBNAIL.sub("", Path(name).stem) in videos:
            left_out["pictures of videos of the same name"].append(name)
        else:
            frames.append(name)
    return clips, frames, left_out


def _named_like_videos(folder: Path, names: list[str]) -> set[str]:
    """The names, with and without suffix, of the videos that a folder's pictures may show."""
    if "thumb" in folder.name.lower():  # of videos above it, or in a folder beside it
        near = (path for pattern in ("*", "*/*") for path in folder.parent.glob(pattern))
        names = [*names, *(path.name for path in near)]
    videos = {name for name in names if name.lower().endswith(VIDEOS)}
    return videos | {Path(name).stem for name in videos}
