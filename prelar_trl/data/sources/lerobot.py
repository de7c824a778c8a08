"""LeRobot data sets, version 3: parquet and mp4 files that hold many episodes each.

::

    meta/info.json                                     features, frames a second, version
    meta/episodes/chunk-000/file-000.parquet           one row an episode: where it lies
    data/chunk-000/file-000.parquet                    one row a frame: actions, pictures as bytes
    videos/<camera>/chunk-000/file-000.mp4             the episodes one after the other
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from prelar_trl.data.sources.base import (
    Clip,
    ClipError,
    Frame,
    FrameOptions,
    Item,
    Source,
    leading_actions,
)
from prelar_trl.data.sources.decoding import DECODER, Section, video_clip
from prelar_trl.data.sources.pictures import PICTURE_DECODER, array_clip
from prelar_trl.data.store import ACTIONS
from prelar_trl.utils import read_json

INFO = Path("meta", "info.json")
MISSING = "frames missing at the end"


def is_lerobot(root: Path) -> bool:
    """Whether a folder holds a LeRobot data set of version 3."""
    try:
        return str(read_json(root / INFO).get("codebase_version", "")).startswith("v3")
    except (OSError, ValueError):
        return False


class LeRobotDataset(Source):
    """One camera of a LeRobot data set; an episode is a clip, its task the label.

    Args:
        root, options: see `Source`.
        camera: the feature to show, such as ``observation.images.top``, or the last part of its
            name. Default: the only one.
        actions: also store the actions, for probes. LeRobot's leave from a frame, here they lead to
            one: the first is zero, the last of an episode is left out.

    Raises:
        ImportError: pyarrow is not installed.
        FileNotFoundError: a file is missing.
        ValueError: another version, no such camera, several cameras and none chosen, actions
            together with a stride, or without ``action`` in the data set.
    """

    kind = "lerobot"
    decoder = f"{DECODER}, {PICTURE_DECODER}"

    def __init__(
        self,
        root: str | Path,
        options: FrameOptions,
        *,
        camera: str | None = None,
        actions: bool = False,
    ) -> None:
        if importlib.util.find_spec("pyarrow") is None:
            raise ImportError(
                "LeRobot data sets need pyarrow, which is not installed: pip install pyarrow"
            )
        super().__init__(root, options, actions)
        if not (self.root / INFO).is_file():
            raise FileNotFoundError(f"{str(self.root / INFO)!r} is missing: no LeRobot data set")
        self.info = read_json(self.root / INFO)
        version = str(self.info.get("codebase_version", "unknown"))
        if not version.startswith("v3"):
            raise ValueError(
                f"LeRobot data set {str(root)!r} has version {version}: convert it to v3, or read "
                "its files with kind=videos"
            )
        features = self.info["features"]
        pictures = [name for name, x in features.items() if x["dtype"] in ("video", "image")]
        self.camera = self.choose_camera(pictures, camera)
        self.is_video = features[self.camera]["dtype"] == "video"
        if actions and "action" not in features:
            raise ValueError(f"LeRobot data set {str(root)!r} has no feature 'action'")
        self._episodes = {f"episode_{e['episode_index']:06d}": e for e in self._read_episodes()}
        for name, episode in sorted(self._episodes.items()):
            label = next(map(str, episode.get("tasks") or ()), None)
            self._items.append(Item(name, self._file(episode, self.is_video), label))

    def load(self, item: Item) -> Clip:
        """See `Source.load`."""
        episode = self._episodes[item.name]
        if self.is_video:
            begin = episode[f"videos/{self.camera}/from_timestamp"]
            section = Section(begin, episode["length"], float(self.info["fps"]))
            clip = video_clip(item.path, self.options, section)
        else:
            clip = array_clip(self._pictures(episode), self.options)
        return Clip(self._frames(clip, episode), clip.notes)

    def _frames(self, clip: Clip, episode: dict[str, Any]) -> Iterator[Frame]:
        actions = None
        if self.actions:  # LeRobot's leave from a frame
            left = np.array(self._rows(episode, "action").to_pylist(), np.float32)
            actions = leading_actions(left)[:-1]
        count = 0
        for count, frame in enumerate(clip.frames, 1):
            yield frame if actions is None else frame | {ACTIONS: actions[count - 1]}
        expected = -(-episode["length"] // self.options.stride)
        expected = min(expected, self.options.max_frames or expected)
        if count < expected:
            if actions is not None and clip.notes:  # frames within may be missing
                raise ClipError("damaged: its frames cannot be matched with the actions")
            clip.notes[MISSING] = expected - count

    def _pictures(self, episode: dict[str, Any]) -> Iterator[np.ndarray]:
        for cell in self._rows(episode, self.camera).to_pylist():
            try:
                picture = Image.open(io.BytesIO(cell["bytes"]))
                yield np.asarray(picture.convert("RGB"))
            except Exception:  # decoders fail on damage in many ways
                raise ClipError("damaged: a picture cannot be read") from None

    def _rows(self, episode: dict[str, Any], column: str) -> Any:
        """A column of an episode's rows, in the order of its frames."""
        import pyarrow.parquet as pq  # an extra of this project, so not at the top

        path = self._file(episode, is_video=False)
        wanted = [("episode_index", "=", episode["episode_index"])]
        table = pq.read_table(path, columns=[column, "frame_index"], filters=wanted)
        if len(table) != episode["length"]:
            raise ClipError(f"{len(table)} rows of data for {episode['length']} frames")
        return table.sort_by("frame_index")[column]

    def _file(self, episode: dict[str, Any], is_video: bool) -> Path:
        """The file that holds an episode's video, or its rows."""
        prefix = f"videos/{self.camera}/" if is_video else "data/"
        pattern = self.info["video_path" if is_video else "data_path"]
        place = {key: episode[prefix + key] for key in ("chunk_index", "file_index")}
        return self.root / pattern.format(video_key=self.camera, **place)

    def _read_episodes(self) -> list[dict[str, Any]]:
        import pyarrow.parquet as pq  # an extra of this project, so not at the top

        files = sorted((self.root / "meta" / "episodes").glob("*/*.parquet"))
        if not files:
            raise FileNotFoundError(f"{str(self.root / 'meta/episodes')!r} holds no parquet file")
        episodes = []
        for file in files:
            schema = pq.read_schema(file)
            columns = [name for name in schema.names if not name.startswith("stats/")]
            episodes += pq.read_table(file, columns=columns).to_pylist()
        return episodes
