from __future__ import annotations

import importlib.util
import json
import os
import wave
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from prelar_trl.data import ClipStore, ClipWriter, StoreError, VideoClips
from prelar_trl.data.sources import (
    ClipError,
    EpisodeFolder,
    FrameOptions,
    SomethingSomething,
    VideoFolder,
    export_episodes,
    export_frames,
    flow_colors,
    picture_clip,
    prepare,
    video_clip,
)
from prelar_trl.recipes.prepare_videos import run, summary
from tests.videos import assert_upright, config, encode, ramp, save_pictures, times

needs_opencv = pytest.mark.skipif(
    importlib.util.find_spec("cv2") is None, reason="optical flow needs opencv-python-headless"
)


def saved(folder: Path, frames: np.ndarray) -> list[Path]:
    """The frames as pictures."""
    names = [f"{t}.png" for t in range(len(frames))]
    save_pictures(folder, frames, names)
    return [folder / name for name in names]


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".avi", ".mov", ".gif"])
def test_every_kind_of_video_gives_its_frames_in_order_and_upright(tmp_path, suffix) -> None:
    clip = video_clip(encode(tmp_path / f"v{suffix}", ramp(12)), FrameOptions()).arrays()
    assert set(clip) == {"pixels"}
    assert clip["pixels"].shape == (12, 3, 64, 64) and clip["pixels"].dtype == np.uint8
    assert times(clip["pixels"]) == list(range(12))
    assert_upright(clip["pixels"])


@pytest.mark.parametrize("kind", ["video", "pictures"])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"stride": 3}, [0, 3, 6, 9]),
        ({"max_frames": 5}, [0, 1, 2, 3, 4]),
        ({"stride": 2, "max_frames": 3, "size": 32}, [0, 2, 4]),
    ],
)
def test_stride_and_length_pick_frames(tmp_path, kind: str, options: dict, expected: list) -> None:
    options = FrameOptions(**options)
    if kind == "video":
        clip = video_clip(encode(tmp_path / "v.mp4", ramp(12)), options)
    else:
        clip = picture_clip(saved(tmp_path / "v", ramp(12)), options)
    pixels = clip.arrays()["pixels"]
    assert times(pixels) == expected and pixels.shape[2:] == (options.size, options.size)


@pytest.mark.parametrize("shape", [(96, 160), (160, 96), (48, 64)])
def test_crop_keeps_the_middle_square_and_squeeze_keeps_everything(tmp_path, shape) -> None:
    height, width = shape
    frames = np.zeros((4, height, width, 3), np.uint8)
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    frames[:, top : top + side, left : left + side] = 250
    pictures, video = saved(tmp_path / "p", frames), encode(tmp_path / "v.mp4", frames)
    for resize in ("crop", "squeeze"):
        options = FrameOptions(resize=resize)
        for clip in (video_clip(video, options), picture_clip(pictures, options)):
            pixels = clip.arrays()["pixels"]
            assert pixels.shape == (4, 3, 64, 64)
            if resize == "crop":
                assert pixels[:, :, 2:-2, 2:-2].min() > 225
            else:
                assert abs(pixels.mean() - 250 * side**2 / (height * width)) < 8


def test_pictures_of_the_right_size_are_kept_exactly(tmp_path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    clip = picture_clip(saved(tmp_path / "v", frames), FrameOptions()).arrays()["pixels"]
    assert np.array_equal(clip, frames.transpose(0, 3, 1, 2))


def test_a_folder_of_videos_and_picture_folders_becomes_a_store(tmp_path) -> None:
    root = tmp_path / "my videos"
    encode(root / "b" / "Küche löffel.mp4", ramp(8))
    encode(root / "a.webm", ramp(10))
    encode(root / "UPPER.mp4", ramp(7)).rename(root / "UPPER.MP4")
    saved(root / "frames 1", ramp(11))  # 0, 1, ... 10: natural order
    (root / "notes.txt").write_text("no video")
    (root / "loop").symlink_to(root)
    (root / "b" / "up").symlink_to("..")
    (root / "self.mp4").symlink_to("self.mp4")
    store = run(config(root, tmp_path / "s"))
    names = ["UPPER.MP4", "a.webm", "b/Küche löffel.mp4", "frames 1/"]
    assert store.names == names and store.frames.tolist() == [7, 10, 8, 11]
    for clip in range(4):
        assert times(store.read(clip)) == list(range(store.frames[clip]))
    assert [name for name, _ in store.skipped()] == ["self.mp4"]
    assert store.meta["decoder"].startswith("PyAV") and store.meta["resize"] == "squeeze"
    assert VideoClips(store.path, 8, 4).sample()["pixels"].shape == (4, 8, 3, 64, 64)


def test_damaged_files_are_skipped_with_a_reason_and_the_rest_is_kept(tmp_path) -> None:
    root = tmp_path / "v"
    good = encode(root / "good.mp4", ramp(12))
    data = good.read_bytes()
    (root / "zero.mp4").write_bytes(b"")
    (root / "text.mp4").write_text("I am no video at all. " * 100)
    (root / "cut.mp4").write_bytes(data[: len(data) // 2])  # the index at the end is gone
    (root / "wrong.avi").write_bytes(data)  # mp4 inside: content decides
    encode(root / "one.webm", ramp(1))
    webm = encode(root / "cut.webm", ramp(12))
    webm.write_bytes(webm.read_bytes()[: webm.stat().st_size // 2])
    with wave.open(str(root / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(b"\0\0" * 4000)
    (root / "sound.wav").rename(root / "sound.mp4")
    with av.open(str(root / "audio.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        silence.sample_rate = 8000
        container.mux(stream.encode(silence))
        container.mux(stream.encode(None))
    store = run(config(root, tmp_path / "s"))
    skipped = dict(store.skipped())
    assert {"good.mp4", "wrong.avi"} <= set(store.names) <= {"good.mp4", "wrong.avi", "cut.webm"}
    assert times(store.read(store.names.index("wrong.avi"))) == list(range(12))
    assert skipped["zero.mp4"] == "the file is empty"
    assert skipped["text.mp4"] == skipped["cut.mp4"] == "not readable as a video"
    assert skipped["one.webm"] == "shorter than 2 frames"
    assert skipped["audio.mp4"] == skipped["sound.mp4"] == "no picture in it (audio only?)"
    text = summary(store)
    assert "2  not readable as a video, e.g. " in text and f"{len(skipped)} skipped" in text


def something(root: Path) -> Path:
    """A tiny Something-Something-V2 in the form in which it is distributed."""
    (root / "labels").mkdir(parents=True)
    labels = {"Holding something": "0", "Moving something up": "1"}
    records = {
        "train": [
            {"id": "11", "label": "holding pen", "template": "Holding [something]"},
            {"id": "7", "label": "moving cup up", "template": "Moving [something] up"},
            {"id": "99", "label": "gone", "template": "Holding [something]"},
        ],
        "validation": [{"id": "5", "label": "x", "template": "Moving [something] up"}],
    }
    for name, content in {"labels": labels, **records}.items():
        (root / "labels" / f"{name}.json").write_text(json.dumps(content))
    for name, length in (("11", 10), ("7", 12), ("5", 9)):
        encode(root / "videos" / f"{name}.webm", ramp(length))
    return root


def test_something_something_keeps_classes_splits_and_writes_the_official_lists(tmp_path) -> None:
    store = run(config(something(tmp_path / "ssv2"), tmp_path / "s"))
    assert store.names == ["11", "7", "5"] and store.labels == [0, 1, 1]
    assert store.splits == ["train", "train", "heldout"]
    assert store.skipped() == [("99", "the file is missing")]
    lists = store.path / "lists"
    assert (lists / "train.txt").read_text() == "11 10 0\n7 12 1\n"
    assert (lists / "validation.txt").read_text() == "5 9 1\n"
    assert VideoClips(store.path, 9, split="heldout").num_clips == 1
    assert VideoClips(store.path, 9, split="train").num_clips == 2


def test_the_official_layout_is_written_back_and_read_again(tmp_path) -> None:
    out = tmp_path / "out"
    root = something(tmp_path / "ssv2")
    store = run(config(root, tmp_path / "s", export=str(out), export_as="jpeg"))
    assert sorted(p.name for p in (out / "7").iterdir())[0] == "000001.jpg"
    lists = {"train": str(out / "train.txt"), "heldout": str(out / "validation.txt")}
    again = run(config(out, tmp_path / "again", lists=lists))
    assert (again.names, again.labels, again.splits) == (store.names, store.labels, store.splits)
    for clip in range(len(store)):
        difference = again.read(clip).astype(int) - store.read(clip)
        assert np.abs(difference).mean() < 3


def test_a_clip_is_not_written_outside_the_export(tmp_path) -> None:
    with ClipWriter(tmp_path / "s", source="test", height=8, width=8) as writer:
        writer.add(np.zeros((2, 3, 8, 8), np.uint8), name="../gone")
    with pytest.raises(ValueError, match="clip '../gone' of .* would not lie in"):
        export_frames(ClipStore(tmp_path / "s"), tmp_path / "out")
    assert not (tmp_path / "gone").exists()


def test_a_store_is_not_continued_from_another_source(tmp_path) -> None:
    encode(tmp_path / "v" / "a.mp4", ramp(4))
    encode(tmp_path / "w" / "a.mp4", ramp(4))
    encode(tmp_path / "w" / "b.mp4", ramp(4))
    run(config(tmp_path / "v", tmp_path / "s"))
    with pytest.raises(StoreError, match="was begun with source=.* 1 clips.* 2 clips"):
        run(config(tmp_path / "w", tmp_path / "s"))


def test_something_something_is_filtered_by_number_or_template(tmp_path) -> None:
    root = something(tmp_path / "ssv2")
    for labels in ([1], ["Moving [something] up"], ["Moving something up"]):
        items = SomethingSomething(root, FrameOptions(), labels=labels).items()
        assert [item.name for item in items] == ["7", "5"]
    with pytest.raises(ValueError, match="label 7 is unknown: classes are 0..1"):
        SomethingSomething(root, FrameOptions(), labels=[7])
    with pytest.raises(ValueError, match="is no template of labels.json"):
        SomethingSomething(root, FrameOptions(), labels=["Eating something"])
    (root / "labels" / "train.json").write_text("[{")
    with pytest.raises(ValueError, match="train.json' is damaged"):
        SomethingSomething(root, FrameOptions())
    (root / "labels" / "train.json").unlink()
    with pytest.raises(FileNotFoundError, match="no train.json in"):
        SomethingSomething(root, FrameOptions())


def test_official_jpeg_folders_with_text_lists(tmp_path) -> None:
    root = tmp_path / "frames"
    for name, length in (("11", 10), ("7", 6), ("8", 4)):
        (root / name).mkdir(parents=True)
        for number, frame in enumerate(ramp(length, 64, 64), 1):
            Image.fromarray(frame).save(root / name / f"{number:06d}.jpg", quality=95)
    (tmp_path / "train.txt").write_text("11 10 3\n8 5 3\n")
    (tmp_path / "val.txt").write_text("7 6 4\n")
    lists = {"train": str(tmp_path / "train.txt"), "heldout": str(tmp_path / "val.txt")}
    store = run(config(root, tmp_path / "s", lists=lists))
    assert store.names == ["11", "7"] and store.labels == [3, 4]
    assert times(store.read(0)) == list(range(10))
    assert store.skipped() == [("8", "5 frames are listed, 000005.jpg is missing")]
    (tmp_path / "train.txt").write_text("11 ten 3\n")
    with pytest.raises(ValueError, match="line 1 is '11 ten 3', not 'id frames class'"):
        run(config(root, tmp_path / "t", lists=lists))


def episodes(folder: Path, sizes=(9, 12)) -> Path:
    folder.mkdir()
    for number, length in enumerate(sizes):
        flags = np.zeros(length, bool)
        np.savez_compressed(
            folder / f"20260101T00000{number}-ab{number}-{length - 1}.npz",
            image=ramp(length, 64, 64),
            action=np.arange(length * 3, dtype=np.float32).reshape(length, 3),
            reward=np.zeros(length, np.float32),
            is_first=flags,
            is_last=flags,
            is_terminal=flags,
        )
    return folder


def test_npz_episodes_become_a_store_and_can_be_exported_back(tmp_path) -> None:
    root = episodes(tmp_path / "rlbench")
    bad = root / "20260101T000009-cut-8.npz"
    bad.write_bytes(next(root.glob("*.npz")).read_bytes()[:300])
    np.savez(root / "20260101T000010-odd-8.npz", image=np.zeros((9, 64, 64)))
    store = run(config(root, tmp_path / "s", actions=True, export=str(tmp_path / "out")))
    assert store.frames.tolist() == [9, 12]
    assert np.array_equal(store.read(1), ramp(12, 64, 64).transpose(0, 3, 1, 2))
    assert [reason for _, reason in store.skipped()] == [
        "not readable as .npz",
        "no 'action' in the file",
    ]
    files = sorted((tmp_path / "out").glob("*.npz"))
    assert [f.stem.rsplit("-", 1)[1] for f in files] == ["8", "11"]
    with np.load(files[1]) as episode:
        assert np.array_equal(episode["image"], ramp(12, 64, 64))
        assert np.array_equal(episode["action"], np.arange(36, dtype=np.float32).reshape(12, 3))
        assert episode["is_first"].tolist() == [True] + [False] * 11
        assert episode["is_last"].tolist() == [False] * 11 + [True]
        assert set(episode) >= {"reward", "is_terminal"}
    assert export_episodes(store, tmp_path / "out") == 0
    again = run(config(tmp_path / "out", tmp_path / "again", actions=True))
    assert (
        again.meta["shards"][0]["sha256"]["pixels"] == (store.meta["shards"][0]["sha256"]["pixels"])
    )
    plain = run(config(root, tmp_path / "plain"))
    assert set(plain.streams) == {"pixels"}


def test_an_episode_without_pictures_gives_its_reason(tmp_path) -> None:
    np.savez(tmp_path / "a.npz", image=np.zeros((9, 64, 64)))
    source = EpisodeFolder(tmp_path, FrameOptions())
    with pytest.raises(ClipError, match=r"image must be uint8 .* float64 \[9, 64, 64\]"):
        source.load(source.items()[0]).arrays()


@needs_opencv
@pytest.mark.parametrize("kind", ["video", "pictures"])
def test_flow_tells_direction_and_stands_still_first(tmp_path, kind: str) -> None:
    rng, options = np.random.default_rng(0), FrameOptions(flow=True)
    canvas = np.kron(rng.integers(0, 256, (40, 60, 3), np.uint8), np.ones((8, 8, 1), np.uint8))
    frames = np.stack([canvas[64:192, 200 - 4 * t : 328 - 4 * t] for t in range(6)])  # to the right
    if kind == "video":
        clip = video_clip(encode(tmp_path / "v.mp4", frames), options).arrays()
    else:
        clip = picture_clip(saved(tmp_path / "v", frames), options).arrays()
    flow = clip["flow"]
    assert flow.shape == clip["pixels"].shape and flow.dtype == np.uint8
    assert (flow[0] == 255).all()
    middle = np.median(flow[1:, :, 16:48, 16:48], axis=(0, 2, 3))  # 4 of 16 pixels at full speed
    assert np.allclose(middle, [255, 191, 191], atol=12)


def test_flow_colors_are_a_hue_wheel() -> None:
    full = 100 / 8
    flow = np.zeros((1, 100, 2), np.float32)
    flow[0, 1:5] = [[full, 0], [-full, 0], [0, full], [0, -full]]
    white, right, left, down, up = flow_colors(flow)[0, :5].tolist()
    assert white == [255, 255, 255]
    assert right == [255, 0, 0] and left == [0, 255, 255]
    assert down == [128, 255, 0] and up == [128, 0, 255]


@needs_opencv
def test_flow_is_a_second_stream_of_the_store(tmp_path) -> None:
    encode(tmp_path / "v" / "a.mp4", ramp(6))
    store = run(config(tmp_path / "v", tmp_path / "s", flow=True))
    batch = VideoClips(store.path, 5, 2, streams=("pixels", "flow")).sample()
    assert batch["flow"].shape == (2, 5, 3, 64, 64)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"kind": "films"}, "kind='films' is unknown"),
        ({"resize": "stretch"}, "resize='stretch' is unknown"),
        ({"stride": 0}, "stride=0"),
        ({"pixels": 4}, "pixels=4 must be at least 8"),
        ({"max_frames": 0}, "max_frames=0"),
        ({"export_as": "zip"}, "export_as='zip' is unknown"),
        ({"min_frames": 0}, "min_frames=0"),
        ({"labels": [3]}, "labels= is for kind=something or frames"),
        ({"actions": True}, "actions= is for kind=episodes"),
        ({"kind": "frames"}, "needs lists="),
        ({"kind": "episodes"}, "holds no clip of kind 'episodes'"),
    ],
)
def test_bad_settings_are_refused_before_any_work(tmp_path, overrides: dict, message: str) -> None:
    encode(tmp_path / "v" / "a.mp4", ramp(3))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(config(tmp_path / "v", tmp_path / "s", **overrides))


def test_nothing_usable_is_an_error(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="'nowhere' does not exist"):
        run(config(Path("nowhere"), tmp_path / "s"))
    (tmp_path / "v").mkdir()
    with pytest.raises(ValueError, match="holds no clip of kind 'videos'"):
        prepare(VideoFolder(tmp_path / "v", FrameOptions()), tmp_path / "s")
    (tmp_path / "v" / "a.mp4").write_text("no video")
    with pytest.raises(ValueError, match="nothing was added"):
        prepare(VideoFolder(tmp_path / "v", FrameOptions()), tmp_path / "s")


def test_strange_file_names_are_files(tmp_path, monkeypatch) -> None:
    names = ["12:30 a%03d.mp4", "-i.mp4", "http:.mp4", "a\nb.mp4"]
    data = encode(tmp_path / "plain" / "a.mp4", ramp(4)).read_bytes()
    (tmp_path / "v").mkdir()
    for name in (*map(os.fsencode, names), b"\xff.mp4", b"\xfe.mp4"):  # the last are no text
        with open(os.fsencode(tmp_path / "v") + b"/" + name, "wb") as file:
            file.write(data)
    monkeypatch.chdir(tmp_path / "v")
    store = prepare(VideoFolder(".", FrameOptions()), tmp_path / "s" / "store")
    assert sorted(store.names) == sorted([*names, "\\xfe.mp4", "\\xff.mp4"])


def test_an_unexpected_failure_of_a_decoder_skips_the_clip(tmp_path, monkeypatch) -> None:
    for name in ("a.mp4", "b.mp4"):
        encode(tmp_path / "v" / name, ramp(4))
    source = VideoFolder(tmp_path / "v", FrameOptions())

    def load(item):
        if item.name == "a.mp4":
            raise IndexError
        return video_clip(item.path, source.options)

    monkeypatch.setattr(source, "load", load)
    store = prepare(source, tmp_path / "s")
    assert store.names == ["b.mp4"]
    assert store.skipped() == [("a.mp4", "cannot be decoded: IndexError")]
