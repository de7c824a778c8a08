"""Files that few people have and that a data set must survive: odd streams, no permission."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from prelar_trl.data.sources import ClipError, EpisodeFolder, FrameOptions, VideoFolder, video_clip
from prelar_trl.data.sources.decoding import DAMAGED, JUMPS
from prelar_trl.recipes.prepare_videos import run
from tests.test_data_folders import as_nobody  # noqa: F401
from tests.videos import config, encode, ffmpeg, ramp, save_pictures, times

MOVING = ("-f", "lavfi", "-i", "testsrc2=size=64x64:rate=25:duration=3")
H264 = ("-c:v", "libx264", "-g", "25", "-pix_fmt", "yuv420p")


def flv_tags(data: bytes) -> list[int]:
    """Where the data of each video tag of an flv file begins."""
    place, found = 13, []
    while place < len(data):
        size = int.from_bytes(data[place + 1 : place + 4])
        if data[place] == 9:
            found.append(place + 11)
        place += 11 + size + 4
    return found


def test_a_stream_that_damage_has_invented_hides_no_video(tmp_path: Path) -> None:
    ffmpeg(*MOVING, *H264, tmp_path / "a.flv")
    data = bytearray((tmp_path / "a.flv").read_bytes())
    tags = flv_tags(data)
    data[tags[40]] |= 0x0F  # another codec, which does not exist
    (tmp_path / "b.flv").write_bytes(data)
    whole, damaged = (video_clip(tmp_path / f"{x}.flv", FrameOptions()) for x in "ab")
    expected, kept = whole.arrays()["pixels"], damaged.arrays()["pixels"]
    assert np.array_equal(kept[:30], expected[:30]) and len(kept) > 40
    for tag in tags:
        data[tag] |= 0x0F
    (tmp_path / "c.flv").write_bytes(data)
    with pytest.raises(ClipError):
        video_clip(tmp_path / "c.flv", FrameOptions()).arrays()


def test_frames_that_the_demuxer_skips_are_noted_as_a_jump(tmp_path: Path) -> None:
    ffmpeg(*MOVING, *H264, tmp_path / "a.mkv")
    data = bytearray((tmp_path / "a.mkv").read_bytes())
    middle = len(data) // 2
    data[middle : middle + 20] = bytes(np.random.default_rng(2).integers(0, 256, 20, np.uint8))
    (tmp_path / "b.mkv").write_bytes(data)
    clip = video_clip(tmp_path / "b.mkv", FrameOptions())
    assert 40 < len(clip.arrays()["pixels"]) < 75
    assert clip.notes[JUMPS] or clip.notes[DAMAGED]


def test_a_changing_frame_rate_is_no_jump(tmp_path: Path) -> None:
    slower = "setpts='PTS*(1+N/25)'"
    ffmpeg(*MOVING, "-vf", slower, "-fps_mode", "vfr", *H264, tmp_path / "a.mkv")
    slides = ("-f", "lavfi", "-i", "testsrc2=size=64x64:rate=1:duration=4")
    ffmpeg(*slides, *H264, tmp_path / "b.mkv")
    for name in ("a.mkv", "b.mkv"):
        clip = video_clip(tmp_path / name, FrameOptions())
        assert clip.arrays() and JUMPS not in clip.notes, name


def test_a_file_that_may_not_be_read_says_so(as_nobody: Path) -> None:  # noqa: F811
    root = as_nobody / "v"
    for name in ("a.mp4", "b.mp4"):
        encode(root / name, ramp(3))
    (root / "b.mp4").chmod(0)
    store = run(config(root, as_nobody / "s"))
    assert store.names == ["a.mp4"]
    assert store.skipped() == [("b.mp4", "cannot be read: Permission denied")]
    np.savez(root / "1.npz", image=ramp(3, 64, 64))
    (root / "1.npz").chmod(0)
    source = EpisodeFolder(root, FrameOptions())
    with pytest.raises(PermissionError):
        source.load(source.items()[0]).arrays()


@pytest.mark.parametrize("suffix", ["j2k", "qoi", "pcx", "sgi", "mpo"])
def test_pictures_of_rarer_formats_are_frames(tmp_path: Path, suffix: str) -> None:
    save_pictures(tmp_path / "v", ramp(3, 64, 64), [f"{n}.{suffix}" for n in range(3)])
    source = VideoFolder(tmp_path / "v", FrameOptions())
    [item] = source.items()
    assert times(source.load(item).arrays()["pixels"]) == [0, 1, 2]


def test_thumbnails_in_a_folder_beside_that_of_the_videos_are_left_out(tmp_path: Path) -> None:
    encode(tmp_path / "videos" / "a.mp4", ramp(3))
    encode(tmp_path / "videos" / "b.mp4", ramp(3))
    save_pictures(tmp_path / "thumbnails", ramp(2), ["a.jpg", "b.jpg"])
    save_pictures(tmp_path / "thumb_cam", ramp(3), ["0.jpg", "1.jpg", "2.jpg"])  # of no video
    source = VideoFolder(tmp_path, FrameOptions())
    assert [i.name for i in source.items()] == ["thumb_cam/", "videos/a.mp4", "videos/b.mp4"]
    assert len(source.left_out["pictures of videos of the same name"]) == 2


def test_clips_that_would_all_be_too_short_are_no_work(tmp_path: Path) -> None:
    encode(tmp_path / "v" / "a.mp4", ramp(3))
    with pytest.raises(ValueError, match="max_frames=1 cuts every clip off below min_frames=2"):
        run(config(tmp_path / "v", tmp_path / "s", max_frames=1))
    assert not (tmp_path / "s").exists()
