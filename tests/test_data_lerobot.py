"""LeRobot data sets, version 3, written here as LeRobot does: many episodes a file."""

from __future__ import annotations

import importlib.util
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from prelar_trl.data import ClipStore
from prelar_trl.data.sources import FrameOptions, LeRobotDataset
from prelar_trl.recipes.prepare_videos import run
from prelar_trl.recipes.schema import PrepareVideosConfig
from tests.videos import encode, ramp, times

LENGTHS = [5, 7, 6]  # frames of the episodes; the last lies in a file of its own
FPS = 12
TOP = "observation.images.top"
CHUNK = "chunk-000/file-{:03d}"


def write(folder: Path, table: dict[str, list]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(table), folder)


def png(frame: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(frame).save(out, "png")
    return out.getvalue()


def make_dataset(root: Path, *, dtype: str = "video", cameras: tuple[str, ...] = (TOP,)) -> Path:
    """Episodes whose frames tell their place in the whole data set, whose actions too."""
    features = {name: {"dtype": dtype, "shape": [96, 128, 3]} for name in cameras}
    features["action"] = {"dtype": "float32", "shape": [2]}
    info = {
        "codebase_version": "v3.0",
        "fps": FPS,
        "features": features,
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    }
    (root / "meta").mkdir(parents=True)
    (root / "meta" / "info.json").write_text(json.dumps(info))
    frames = ramp(sum(LENGTHS))
    episodes: dict[str, list] = {}
    start = 0
    for number, length in enumerate(LENGTHS):
        file = number // 2
        begin = 0 if number == 2 else start
        row = {
            "episode_index": number,
            "tasks": [f"task {number}"],
            "length": length,
            "data/chunk_index": 0,
            "data/file_index": 0,
            "stats/action/mean": [0.0, 0.0],
        }
        for name in cameras if dtype == "video" else ():
            row |= {f"videos/{name}/chunk_index": 0, f"videos/{name}/file_index": file}
            row[f"videos/{name}/from_timestamp"] = begin / FPS
            row[f"videos/{name}/to_timestamp"] = (begin + length) / FPS
        for key, value in row.items():
            episodes.setdefault(key, []).append(value)
        start += length
    write(root / "meta" / "episodes" / (CHUNK.format(0) + ".parquet"), episodes)
    rows = {
        "episode_index": [n for n, length in enumerate(LENGTHS) for _ in range(length)],
        "frame_index": [t for length in LENGTHS for t in range(length)],
        "action": [[float(t), -float(t)] for t in range(sum(LENGTHS))],
    }
    for name in cameras:
        if dtype == "image":
            rows[name] = [{"bytes": png(f), "path": None} for f in frames]
            continue
        split = sum(LENGTHS[:2])
        for file, part in enumerate((frames[:split], frames[split:])):
            encode(root / "videos" / name / (CHUNK.format(file) + ".mp4"), part)
    write(root / "data" / (CHUNK.format(0) + ".parquet"), rows)
    return root


def prepare(source: Path, data: Path, **settings) -> ClipStore:
    return run(PrepareVideosConfig(source=str(source), data=str(data), workers=1, **settings))


@pytest.mark.parametrize("dtype", ["video", "image"])
def test_an_episode_is_a_clip_with_its_task(tmp_path: Path, dtype: str) -> None:
    store = prepare(make_dataset(tmp_path / "set", dtype=dtype), tmp_path / "store")
    assert store.frames.tolist() == LENGTHS
    assert list(store.labels) == ["task 0", "task 1", "task 2"]
    told = [t for clip in range(3) for t in times(store.read(clip))]
    assert told == list(range(sum(LENGTHS)))


def test_actions_lead_to_their_frame(tmp_path: Path) -> None:
    store = prepare(make_dataset(tmp_path / "set"), tmp_path / "store", actions=True)
    for clip, start in enumerate((0, 5, 12)):
        actions = store.read(clip, "actions")
        assert actions[0].tolist() == [0, 0]
        assert actions[1:, 0].tolist() == [start + t for t in range(LENGTHS[clip] - 1)]


def test_a_stride_counts_from_the_beginning_of_each_episode(tmp_path: Path) -> None:
    store = prepare(make_dataset(tmp_path / "set"), tmp_path / "store", stride=2, max_frames=3)
    assert [times(store.read(clip)) for clip in range(3)] == [[0, 2, 4], [5, 7, 9], [12, 14, 16]]


def test_the_camera_is_chosen_by_name(tmp_path: Path) -> None:
    source = make_dataset(tmp_path / "set", cameras=(TOP, "observation.images.wrist"))
    with pytest.raises(ValueError, match=rf"camera=<one of {TOP}, observation.images.wrist>"):
        prepare(source, tmp_path / "store")
    with pytest.raises(ValueError, match="no camera 'left'; it has observation.images.top"):
        prepare(source, tmp_path / "store", camera="left")
    store = prepare(source, tmp_path / "store", camera="wrist")
    assert len(store) == 3
    assert store.meta["left_out"]["cameras that were not chosen"]["example"] == TOP
    with pytest.raises(ValueError, match="camera= is for kind=lerobot or torchrl"):
        prepare(tmp_path, tmp_path / "other", kind="videos", camera="top")


def test_a_video_that_breaks_off_is_kept_and_noted(tmp_path: Path) -> None:
    source = make_dataset(tmp_path / "set")
    encode(source / "videos" / TOP / (CHUNK.format(0) + ".mp4"), ramp(10))  # 12 are promised
    store = prepare(source, tmp_path / "store")
    assert store.frames.tolist() == [5, 5, 6]
    assert "frames missing at the end" in store.notes()


def test_what_cannot_be_read_is_said_in_one_line(tmp_path: Path, monkeypatch) -> None:
    source = make_dataset(tmp_path / "set")
    options = FrameOptions()
    info = source / "meta" / "info.json"
    info.write_text(info.read_text().replace("v3.0", "v2.1"))
    with pytest.raises(ValueError, match=r"version v2.1: convert it to v3, or .* kind=videos"):
        LeRobotDataset(source, options)
    with pytest.raises(FileNotFoundError, match="no LeRobot data set"):
        LeRobotDataset(tmp_path, options)
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "pyarrow" else real(name)
    )
    with pytest.raises(ImportError, match="pip install pyarrow"):
        LeRobotDataset(source, options)
