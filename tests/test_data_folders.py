"""What a folder holds: which files are clips, which are frames, what is left out and counted."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prelar_trl.data.sources import (
    ClipError,
    FrameOptions,
    Item,
    VideoFolder,
    in_time_order,
    prepare,
    to_rgb,
)
from prelar_trl.data.sources.base import with_distinct_names
from prelar_trl.data.sources.pictures import DARK, animation_clip, picture_clip
from prelar_trl.data.sources.videos import STRAYS
from prelar_trl.recipes.prepare_videos import run, summary
from tests.videos import config, encode, ramp, save_pictures, times

# ---------------------------------------------------------------- the order of pictures


@pytest.mark.parametrize(
    "ordered",
    [
        ["1.png", "2.png", "10.png"],
        ["0.05.png", "0.1.png", "0.15.png", "0.2.png", "1.0.png", "10.0.png"],
        ["0.0.png", "1e-05.png", "0.0001.png", "0.5.png"],
        ["999.5.jpg", "1000.25.jpg", "1000.3.jpg"],
        ["999999999.9.png", "1305031102.1753.png", "1305031102.2.png"],
        [f"{n}.png" for n in range(-6, 6)],
        ["t-2.png", "t-1.png", "t0.png", "t1.png"],
        ["f_-10.png", "f_-9.png", "f_3.png"],
        ["frame-9.png", "frame-10.png", "frame-11.png"],
        ["1.9.png", "1.10.png", "1.11.png"],
        ["2024-05-01_9-59-58.png", "2024-05-01_9-59-59.png", "2024-05-01_10-00-00.png"],
        ["00_58.png", "00_59.png", "01_00.png", "01_01.png"],
        ["frame_1_happy.png", "frame_2_sad.png", "frame_3_happy.png", "frame_4_sad.png"],
        ["1.png", "2.jpg", "3.png", "4.jpg"],
        ["a.png", "b.png", "c.png"],
        ["IMG (1).png", "IMG (2).png", "IMG (10).png"],
    ],
)
def test_pictures_are_in_the_order_of_their_numbers(ordered: list[str]) -> None:
    for seed in range(3):
        shuffled = np.random.default_rng(seed).permutation(ordered).tolist()
        assert in_time_order(shuffled) == (ordered, [])


@pytest.mark.parametrize(
    "names",
    [
        ["0001_rgb.png", "0001_mask.png", "0002_rgb.png", "0002_mask.png"],
        ["0.png", "0.jpg", "1.png", "1.jpg"],
        ["rgb_1.10.png", "depth_1.12.png", "rgb_1.20.png", "depth_1.22.png"],
        ["left1.png", "left2.png", "right1.png", "right2.png"],
        ["0001_cam0.png", "0001_cam1.png", "0002_cam0.png", "0002_cam1.png"],
        ["cam1_7.png", "cam1_8.png", "cam2_7.png", "cam2_8.png"],
    ],
)
def test_two_series_in_one_folder_are_refused_by_name(names: list[str]) -> None:
    with pytest.raises(ClipError, match=r"more than one series of pictures, e\.g\. '.*' and '"):
        in_time_order(names)


def test_pictures_that_are_not_of_the_series_are_left_out() -> None:
    names = ["cover.png", "2.png", "1.png", "3.png", "old4.png"]
    assert in_time_order(names) == (["1.png", "2.png", "3.png"], ["cover.png", "old4.png"])


def test_times_as_names_reach_the_store_in_order_and_two_series_say_so(tmp_path) -> None:
    root = tmp_path / "v"
    frames = ramp(6, 64, 64)
    save_pictures(root / "times", frames, [f"{t}.png" for t in (0.05, 0.1, 0.15, 0.2, 0.25, 1.0)])
    save_pictures(root / "two", frames, [f"{t // 2}_{'ab'[t % 2]}.png" for t in range(6)])
    save_pictures(root / "cover", frames, ["0.png", "1.png", "2.png", "3.png", "4.png", "me.png"])
    store = run(config(root, tmp_path / "s"))
    assert store.names == ["cover/", "times/"]
    assert times(store.read(1)) == list(range(6)) and times(store.read(0)) == list(range(5))
    assert store.notes() == {STRAYS: [("cover/", 1)]}
    [(name, reason)] = store.skipped()
    assert name == "two/" and "more than one series" in reason and reason in summary(store)


# ---------------------------------------------------------------- which files are what


def test_hidden_folders_thumbnails_and_other_files_are_left_out_and_counted(tmp_path) -> None:
    root = tmp_path / "v"
    for name in ("a.mp4", ".ipynb_checkpoints/a-checkpoint.mp4", ".Trash-1000/files/b.mp4"):
        encode(root / name, ramp(4))
    frames = ramp(4, 64, 64)
    numbers = [f"{t}.png" for t in range(4)]
    save_pictures(root / "@eaDir" / "a.mp4", frames[:2], ["SYNO_1.jpg", "SYNO_2.jpg"])
    save_pictures(root / "frames" / ".ipynb_checkpoints", frames, numbers)
    save_pictures(root / "frames", frames, numbers)
    save_pictures(root, frames[:3], ["a.jpg", "a.mp4.jpg", "a-poster.png"])
    save_pictures(root / "thumbs", frames[:1], ["a.webp"])
    save_pictures(root / "@channel", frames, numbers)  # not every @ is a server's
    (root / "frames" / "._0.png").write_bytes(b"Mac")
    for name in ("notes.txt", "more.TXT", "annotations.json", "README"):
        (root / name).write_text("")
    store = run(config(root, tmp_path / "s"))
    assert store.names == ["@channel/", "a.mp4", "frames/"] and not store.skipped()
    assert {reason: found["count"] for reason, found in store.meta["left_out"].items()} == {
        "files in hidden folders": 1 + 1 + 2 + 4,
        "hidden files": 1,
        "pictures of videos of the same name": 4,
        ".txt files": 2,
        ".json files": 1,
        "files without suffix": 1,
    }
    said = summary(store)
    assert "17 files left out:" in said
    assert "       8  files in hidden folders, e.g. " in said
    assert '       1  .json files, e.g. "annotations.json"' in said


def animation(path: Path, frames: np.ndarray, **options) -> None:
    first, *rest = [Image.fromarray(f) for f in frames]
    first.save(path, save_all=True, append_images=rest, duration=80, **options)


@pytest.mark.parametrize("suffix", [".webp", ".png", ".gif", ".tif"])
def test_each_animated_picture_is_a_clip_and_still_ones_are_frames(tmp_path, suffix) -> None:
    root, frames = tmp_path / "v", ramp(8, 64, 64)
    save_pictures(root / "still", frames, [f"{t}{suffix}" for t in range(8)])
    options = {"lossless": True} if suffix == ".webp" else {}
    animation(root / f"one{suffix}", frames[:5], **options)
    animation(root / f"two{suffix.upper()}", frames[2:], **options)
    store = run(config(root, tmp_path / "s"))
    assert store.names == [f"one{suffix}", "still/", f"two{suffix.upper()}"]
    shown = [times(store.read(clip)) for clip in range(3)]
    assert shown == [list(range(5)), list(range(8)), list(range(2, 8))]


def test_the_picture_for_programs_that_cannot_play_an_apng_is_no_frame(tmp_path) -> None:
    frames = ramp(6, 64, 64)
    animation(tmp_path / "a.png", frames[[5, 0, 1, 2]], default_image=True)
    clip = animation_clip(tmp_path / "a.png", FrameOptions())
    assert times(clip.arrays()["pixels"]) == [0, 1, 2]


def test_of_an_animation_that_breaks_off_what_can_be_shown_is_kept(tmp_path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), np.uint8)
    animation(tmp_path / "a.tif", noise)
    data = (tmp_path / "a.tif").read_bytes()
    (tmp_path / "a.tif").write_bytes(data[: len(data) // 2])
    clip = animation_clip(tmp_path / "a.tif", FrameOptions())
    kept = clip.arrays()["pixels"]
    assert len(kept) in (2, 3) and np.array_equal(kept, noise[: len(kept)].transpose(0, 3, 1, 2))
    assert clip.notes == {"breaks off before its end": 1}


def test_a_link_that_leads_nowhere_costs_no_other_picture(tmp_path) -> None:
    save_pictures(tmp_path / "v" / "a", ramp(5), [f"{t}.png" for t in range(5)])
    (tmp_path / "v" / "a" / "5.png").symlink_to("n" * 300)
    store = run(config(tmp_path / "v", tmp_path / "s"))
    assert times(store.read(0)) == [0, 1, 2, 3, 4]
    assert store.notes() == {"pictures left out that cannot be read": [("a/", 1)]}


def test_bad_pictures_in_a_folder_are_left_out_and_noted(tmp_path) -> None:
    root = tmp_path / "v"
    save_pictures(root / "a", ramp(6), [f"{t}.jpg" for t in range(6)])
    whole = (root / "a" / "2.jpg").read_bytes()
    (root / "a" / "2.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "a" / "4.jpg").write_bytes(b"")
    (root / "b").mkdir()
    (root / "b" / "1.jpg").write_bytes(b"nothing")
    store = run(config(root, tmp_path / "s"))
    assert store.names == ["a/"] and times(store.read(0)) == [0, 1, 3, 5]
    assert store.notes() == {"pictures left out that cannot be read": [("a/", 2)]}
    assert store.skipped() == [("b/", "damaged: '1.jpg' is no readable picture")]


def test_clips_of_one_name_are_told_apart_before_decoding(tmp_path) -> None:
    root = tmp_path / "frames"
    numbers = [f"{t}.png" for t in range(3)]
    save_pictures(root, ramp(3, 64, 64), numbers)
    save_pictures(root / "frames", ramp(5, 64, 64)[2:], numbers)
    store = run(config(root, tmp_path / "s"))
    assert store.names == ["frames/", "frames (2)/"]
    assert [times(store.read(clip)) for clip in range(2)] == [[0, 1, 2], [2, 3, 4]]
    items = [Item(name, Path(str(n))) for n, name in enumerate(("a", "a/", "a", "a (2)"))]
    assert len({item.name.rstrip("/") for item in with_distinct_names(items)}) == 4


def test_a_source_that_names_two_clips_alike_fails_before_decoding(tmp_path, monkeypatch) -> None:
    encode(tmp_path / "v" / "a.mp4", ramp(3))
    source = VideoFolder(tmp_path / "v", FrameOptions())
    twice = source.items() * 2
    monkeypatch.setattr(source, "items", lambda: twice)
    with pytest.raises(ValueError, match="names 2 clips 'a.mp4'"):
        prepare(source, tmp_path / "s")
    assert not (tmp_path / "s").exists()


@pytest.fixture
def as_nobody():
    """A folder of an unprivileged user; permissions mean nothing to root."""
    with tempfile.TemporaryDirectory() as folder:
        user = os.geteuid()
        if user == 0:
            os.chown(folder, 65534, 65534)
            os.seteuid(65534)
        yield Path(folder)
        os.seteuid(user)


@pytest.mark.parametrize("mode", [0o000, 0o400])
def test_a_folder_that_cannot_be_read_is_told_and_the_rest_is_kept(as_nobody, mode: int) -> None:
    root = as_nobody / "v"
    save_pictures(root / "good", ramp(3, 64, 64), ["0.png", "1.png", "2.png"])
    closed = root / "closed"
    save_pictures(closed, ramp(3, 64, 64), ["0.png", "1.png", "2.png"])
    closed.chmod(mode)
    for kind in ("auto", "videos"):
        store = run(config(root, as_nobody / kind, kind=kind))
        assert store.names == ["good/"]
        told = {name for name, _ in store.skipped()}
        told |= {found["example"] for found in store.meta.get("left_out", {}).values()}
        assert told == {"closed/"}
    closed.chmod(0o700)


# ---------------------------------------------------------------- any picture as 8-bit RGB


def test_pictures_of_more_than_8_bits_are_scaled_by_the_documented_rule(tmp_path) -> None:
    values = np.linspace(0, 65535, 64 * 64).reshape(64, 64)
    expected = np.round(values.astype(np.uint16) * (255 / 65535))
    for name in ("a.png", "a.tif", "a.jp2"):
        Image.fromarray(values.astype(np.uint16)).save(tmp_path / name)
    header = b"P5 64 64 65535\n"
    (tmp_path / "a.pgm").write_bytes(header + values.astype(">u2").tobytes())
    Image.fromarray((values / 65535).astype(np.float32)).save(tmp_path / "f.tif")
    Image.fromarray(values.astype(np.int32)).save(tmp_path / "i.tif")
    for file in sorted(tmp_path.iterdir()):
        pixels = picture_clip([file], FrameOptions()).arrays()["pixels"]
        for channel in pixels[0]:
            assert np.abs(channel - expected).max() <= 1, file.name


def test_white_makes_depth_visible(tmp_path) -> None:
    depth = np.linspace(0, 4000, 64 * 64).reshape(64, 64)  # millimetres
    Image.fromarray(depth.astype(np.uint16)).save(tmp_path / "1.png")
    Image.fromarray((depth / 1000).astype(np.float32)).save(tmp_path / "1.tif")
    for name, white in (("1.png", 2000), ("1.tif", 2)):
        options = FrameOptions(white=white)
        pixels = picture_clip([tmp_path / name], options).arrays()["pixels"][0, 0]
        assert np.abs(pixels - np.clip(depth / 2000 * 255, 0, 255)).max() <= 1
    dark = picture_clip([tmp_path / "1.png"], FrameOptions())
    assert dark.arrays()["pixels"].max() == round(4000 / 257) and dark.notes == {DARK: 1}
    with pytest.raises(ClipError, match=r"floating-point pictures with values outside 0..1: set"):
        picture_clip([tmp_path / "1.tif"], FrameOptions()).arrays()
    with pytest.raises(ValueError, match="white=0"):
        FrameOptions(white=0)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_other_modes_are_as_pillow_converts_them(mode: str) -> None:
    colors = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    picture = Image.fromarray(colors).convert(mode)
    assert to_rgb(picture).tobytes() == picture.convert("RGB").tobytes()


def test_not_a_number_is_black() -> None:
    values = np.array([[np.nan, 0.5], [1, 0]], np.float32)
    assert np.asarray(to_rgb(Image.fromarray(values)))[..., 0].tolist() == [[0, 128], [255, 0]]
