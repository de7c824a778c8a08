"""Something-Something-V2: the ``.webm`` files with their JSON lists, or official JPEG folders."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from prelar_trl.data.sources.base import Clip, ClipError, FrameOptions, Item, Source
from prelar_trl.data.sources.decoding import DECODER, video_clip
from prelar_trl.data.sources.pictures import PICTURE_DECODER, picture_clip
from prelar_trl.data.store import ClipStore
from prelar_trl.utils import atomic_write

_SPLITS = {"train": "train", "validation": "heldout"}


class SomethingSomething(Source):
    """The data set as it is distributed: ``<id>.webm`` and ``labels/train/validation.json``.

    Training clips come first, then validation clips, in the order of the lists.
    Both the newer names of the lists and the older ``something-something-v2-train.json`` are found,
    in ``root`` or one folder below, as are the videos.

    Args:
        root, options: see `Source`.
        labels: keep clips of these classes only: class numbers or template texts (with or without
            brackets). None keeps all.

    Raises:
        FileNotFoundError: lists or videos are missing.
        ValueError: a damaged list, a clip listed twice, or an unknown label; naming file and
            record.
    """

    kind = "something"
    decoder = DECODER

    def __init__(
        self, root: str | Path, options: FrameOptions, *, labels: Sequence[int | str] | None = None
    ) -> None:
        super().__init__(root, options)
        self.classes = _read_classes(_find_list(self.root, "labels"))
        files = {name: _find_list(self.root, name) for name in _SPLITS}
        wanted = None if labels is None else {_class_number(x, self.classes) for x in labels}
        videos = _video_folder(self.root)
        places: dict[str, str] = {}
        for name, split in _SPLITS.items():
            for place, clip, template in _read_records(files[name]):
                number = self.classes.get(_plain(template))
                if number is None:
                    raise ValueError(
                        f"{place}: template {template!r} of clip {clip} is not in labels.json: "
                        "are the files of one release?"
                    )
                _note_place(places, clip, place)
                if wanted is None or number in wanted:
                    self._items.append(Item(clip, videos / f"{clip}.webm", number, split))

    def load(self, item: Item) -> Clip:
        """See `Source.load`."""
        if not item.path.is_file():
            raise ClipError("the file is missing")
        return video_clip(item.path, self.options)


class FrameLists(Source):
    """Official JPEG layout: ``<root>/<id>/000001.jpg ...`` and text lists of ``id frames class``.

    Args:
        root: the folder of the clips' folders.
        options: see `Source`.
        lists: split -> text list, e.g. ``{"train": "train.txt", "heldout": "validation.txt"}``.
        labels: keep clips of these class numbers only.

    Raises:
        FileNotFoundError: the folder or a list is missing.
        ValueError: a line of a list that is not ``id frames class``, a clip listed twice, or a
            label that is no class number.
    """

    kind = "frames"
    decoder = PICTURE_DECODER

    def __init__(
        self,
        root: str | Path,
        options: FrameOptions,
        *,
        lists: dict[str, str | Path],
        labels: Sequence[int] | None = None,
    ) -> None:
        super().__init__(root, options)
        if others := [label for label in labels or () if not isinstance(label, int)]:
            unknown = f"label {others[0]!r} is no class number"
            raise ValueError(f"{unknown}: text lists hold no templates")
        places: dict[str, str] = {}
        for split, file in lists.items():
            for place, name, frames, number in _read_list(Path(file)):
                _note_place(places, name, place)
                if labels is None or number in labels:
                    self._items.append(Item(name, self.root / name, number, split, frames))

    def load(self, item: Item) -> Clip:
        """See `Source.load`."""
        paths = [item.path / f"{n:06d}.jpg" for n in range(1, (item.frames or 0) + 1)]
        missing = next((p for p in paths if not p.is_file()), None)
        if missing is not None:
            raise ClipError(f"{item.frames} frames are listed, {missing.name} is missing")
        return picture_clip(paths, self.options)


def _read_list(file: Path) -> Iterator[tuple[str, str, int, int]]:
    """Place in the file, id (which may hold spaces), frames and class of each line."""
    if not file.is_file():
        raise FileNotFoundError(f"list {str(file)!r} does not exist")
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except ValueError as error:
        raise ValueError(f"list {str(file)!r} is damaged: {error}") from None
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line:
            continue
        place = f"{str(file)!r} line {number}"
        try:
            name, frames, label = line.rsplit(maxsplit=2)
            entry = name, int(frames), int(label)
            if entry[1] < 1:
                raise ValueError
        except ValueError:
            raise ValueError(f"{place} is {line!r}, not 'id frames class'") from None
        yield place, *entry


def _note_place(places: dict[str, str], clip: str, place: str) -> None:
    """Remembers where a clip is listed; ValueError if it is already."""
    if clip in places:
        raise ValueError(f"clip {clip!r} is listed twice: {places[clip]} and {place}")
    places[clip] = place


def write_lists(store: ClipStore, folder: str | Path) -> list[Path]:
    """Writes the official text lists of a store whose clips have splits and class numbers.

    Returns the files: ``train.txt`` and ``validation.txt`` (held-out clips), as far as there are.
    """
    written = []
    for name, split in _SPLITS.items():
        lines = [
            f"{store.names[clip]} {store.frames[clip]} {store.labels[clip]}\n"
            for clip in range(len(store))
            if store.splits[clip] == split and isinstance(store.labels[clip], int)
        ]
        if lines:
            Path(folder).mkdir(parents=True, exist_ok=True)
            written.append(Path(folder, f"{name}.txt"))
            written[-1].write_text("".join(lines), encoding="utf-8")
    return written


def export_frames(store: ClipStore, folder: str | Path, *, quality: int = 95) -> int:
    """Writes a store in the official layout: ``<clip>/000001.jpg ...`` and the text lists.

    Clips whose folder exists are left alone; each folder appears whole or not at all. Returns the
    number of clips written.

    Raises:
        ValueError: a clip's name leads out of the folder; nothing has been written then.
    """
    if outside := [name for name in store.names if ".." in Path(name).parts]:
        raise ValueError(
            f"clip {outside[0]!r} of {str(store.path)!r} would not lie in {folder}: rename it"
        )
    written = 0
    for clip, name in enumerate(store.names):
        place = Path(folder, name.strip("/"))
        if place.exists():
            continue
        with atomic_write(place) as part:
            part.mkdir(parents=True, exist_ok=True)
            for number, frame in enumerate(store.read(clip), 1):
                picture = Image.fromarray(np.ascontiguousarray(frame.transpose(1, 2, 0)))
                picture.save(part / f"{number:06d}.jpg", quality=quality)
        written += 1
    write_lists(store, folder)
    return written


def _plain(template: str) -> str:
    return template.replace("[", "").replace("]", "").strip()


def _class_number(label: int | str, classes: dict[str, int]) -> int:
    numbers = set(classes.values())
    if isinstance(label, int) or str(label).isdecimal():
        if int(label) in numbers:
            return int(label)
        raise ValueError(f"label {label} is unknown: classes are {min(numbers)}..{max(numbers)}")
    if _plain(label) not in classes:
        raise ValueError(f"label {label!r} is no template of labels.json, e.g. {min(classes)!r}")
    return classes[_plain(label)]


def list_file(root: Path, name: str) -> Path | None:
    """Where a JSON list of the data set lies, None if nowhere."""
    names = (f"{name}.json", f"something-something-v2-{name}.json")
    return next((f / n for f in _folders(root) for n in names if os.path.isfile(f / n)), None)


def _folders(root: Path) -> list[Path]:
    """The folder and those in it; none if it is missing."""
    return [root, *sorted(filter(os.path.isdir, root.iterdir()))] if root.is_dir() else []


def _find_list(root: Path, name: str) -> Path:
    file = list_file(root, name)
    if file is None:
        raise FileNotFoundError(f"no {name}.json in {str(root)!r} or in a folder below it")
    return file


def _read_json(file: Path, kind: type, what: str) -> Any:
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{str(file)!r} is damaged: {error}") from None
    if not isinstance(content, kind):
        raise ValueError(f"{str(file)!r} must be {what}, is a {type(content).__name__}")
    return content


def _read_classes(file: Path) -> dict[str, int]:
    """Templates without brackets -> class numbers."""
    what = "a mapping of templates to class numbers"
    classes = _read_json(file, dict, what)
    for template, number in classes.items():
        if not str(number).isdecimal():
            raise ValueError(f"{str(file)!r} must be {what}, but {template!r} has {number!r}")
    if not classes:
        raise ValueError(f"{str(file)!r} is empty")
    return {_plain(template): int(number) for template, number in classes.items()}


def _read_records(file: Path) -> Iterator[tuple[str, str, str]]:
    """Place in the file, id and template of each record."""
    records = _read_json(file, list, "a list of records with 'id' and 'template'")
    for number, record in enumerate(records):
        place = f"{str(file)!r} record {number}"
        if not isinstance(record, dict):
            raise ValueError(f"{place} is {record!r}, not a record with 'id' and 'template'")
        for key, kinds in (("id", str | int), ("template", str)):
            if not isinstance(record.get(key), kinds) or record[key] == "":
                raise ValueError(f"{place} has no {key!r}: {json.dumps(record)[:80]}")
        yield place, str(record["id"]), record["template"]


def _video_folder(root: Path) -> Path:
    for folder in _folders(root):
        if next(folder.glob("*.webm"), None) is not None:
            return folder
    raise FileNotFoundError(f"no .webm file in {str(root)!r} or in a folder below it")
