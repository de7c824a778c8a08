"""Video files as people have them: damaged, mirrored, of many kinds, with several streams."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from av.video.frame import PictureType

from prelar_trl.data.sources import ClipError, FrameOptions, VideoFolder, video_clip
from prelar_trl.data.sources.decoding import BREAKS_OFF, DAMAGED, trusted
from prelar_trl.recipes.prepare_videos import run, summary
from tests.videos import by_ffmpeg, config, encode, ffmpeg, ramp

# Of the stored size, so that what ffmpeg shows is what must be stored.
MOVING = ("-f", "lavfi", "-i", "testsrc2=size=64x64:rate=25:duration=3")
H264 = ("-c:v", "libx264", "-g", "25", "-pix_fmt", "yuv420p")
FRAMES, KEYS = 75, (0, 25, 50)
KINDS = {  # each with a key frame every 25 frames
    "front.mp4": (*H264, "-movflags", "+faststart"),
    "front.mov": (*H264, "-movflags", "+faststart"),
    "fragments.mp4": (*H264, "-movflags", "frag_keyframe+empty_moov"),
    "old.avi": ("-c:v", "mpeg4", "-q:v", "4", "-g", "25"),
    "old.mpg": ("-c:v", "mpeg1video", "-q:v", "4", "-g", "25", "-bf", "0"),
    "open.mkv": H264,
    "cast.webm": ("-c:v", "libvpx", "-g", "25", "-deadline", "realtime", "-cpu-used", "8"),
    "air.ts": H264,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Undamaged files of all kinds, and their frames according to ffmpeg."""
    folder = tmp_path_factory.mktemp("whole")
    for name, options in KINDS.items():
        ffmpeg(*MOVING, *options, folder / name)
    return folder, {name: by_ffmpeg(folder / name) for name in KINDS}


def shown_at(frames: np.ndarray, reference: np.ndarray) -> list[int | None]:
    """Which frame of the reference each frame is, None if it is none of them."""
    at: list[int | None] = []
    for frame in frames:
        distance = np.abs(reference.astype(np.int16) - frame).mean((1, 2, 3))
        at.append(int(distance.argmin()) if distance.min() < 1.5 else None)
    return at


@pytest.mark.parametrize("name", KINDS)
def test_an_undamaged_file_is_as_ffmpeg_shows_it_and_has_no_notes(whole, name: str) -> None:
    folder, reference = whole
    clip = video_clip(folder / name, FrameOptions())
    assert shown_at(clip.arrays()["pixels"], reference[name]) == list(range(FRAMES))
    assert not clip.notes


@pytest.mark.parametrize("name", KINDS)
def test_of_a_file_that_breaks_off_what_can_be_played_is_kept(whole, tmp_path, name) -> None:
    folder, reference = whole
    data = (folder / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) * 6 // 10])
    clip = video_clip(tmp_path / name, FrameOptions())
    at = shown_at(clip.arrays()["pixels"], reference[name])
    assert None not in at and at == sorted(at) and len(at) > FRAMES // 3
    assert at[:-4] == list(range(len(at) - 4))  # near its end B-frames may be missing
    if not name.endswith(".ts"):  # a transport stream knows no length: any end is an end
        assert clip.notes[BREAKS_OFF] or clip.notes[DAMAGED]


@pytest.mark.parametrize("name", ["front.mp4", "front.mov", "old.avi", "old.mpg", "air.ts"])
def test_after_damage_frames_count_again_from_the_next_key_frame(whole, tmp_path, name) -> None:
    folder, reference = whole
    data = bytearray((folder / name).read_bytes())
    middle = len(data) // 2
    data[middle : middle + 400] = bytes(np.random.default_rng(1).integers(0, 256, 400, np.uint8))
    (tmp_path / name).write_bytes(data)
    clip = video_clip(tmp_path / name, FrameOptions())
    at = shown_at(clip.arrays()["pixels"], reference[name])
    assert None not in at  # not one picture that the undamaged file does not show
    assert at == sorted(at)
    lost = sorted(set(range(FRAMES)) - set(at))
    assert 0 < len(lost) <= lost[-1] - lost[0] + 1 < 30
    assert lost[-1] + 1 in (*KEYS, FRAMES)
    assert clip.notes[DAMAGED] > 0


def test_a_stride_counts_the_frames_that_were_left_out_too(whole, tmp_path) -> None:
    folder, reference = whole
    data = bytearray((folder / "old.avi").read_bytes())
    data[len(data) // 2 : len(data) // 2 + 20] = bytes(20)
    (tmp_path / "a.avi").write_bytes(data)
    clip = video_clip(tmp_path / "a.avi", FrameOptions(stride=5))
    at = shown_at(clip.arrays()["pixels"], reference["old.avi"])
    assert set(at) < set(range(0, FRAMES, 5)) and len(at) > 8


def test_what_was_left_out_of_a_clip_is_in_the_store_and_in_its_summary(whole, tmp_path) -> None:
    folder, _ = whole
    root = tmp_path / "v"
    root.mkdir()
    data = (folder / "old.avi").read_bytes()
    (root / "cut.avi").write_bytes(data[: len(data) * 6 // 10])
    (root / "whole.avi").write_bytes(data)
    store = run(config(root, tmp_path / "s"))
    assert store.names == ["cut.avi", "whole.avi"]
    assert store.infos == [{"notes": {DAMAGED: 1}}, None]
    assert store.notes() == {DAMAGED: [("cut.avi", 1)]}
    assert f'1 kept in part:\n       1  {DAMAGED}, e.g. "cut.avi"' in summary(store)


def test_a_file_without_a_single_sound_frame_says_so(whole, tmp_path) -> None:
    folder, _ = whole
    data = bytearray((folder / "front.mp4").read_bytes())
    start = data.index(b"mdat") + 4
    data[start:] = bytes(len(data) - start)
    (tmp_path / "a.mp4").write_bytes(data)
    with pytest.raises(ClipError, match="damaged: no frame can be decoded"):
        video_clip(tmp_path / "a.mp4", FrameOptions()).arrays()


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
@pytest.mark.parametrize("mirror", [(), ("-display_hflip",), ("-display_vflip",)])
def test_display_matrices_turn_and_mirror_as_ffmpeg_does(tmp_path, rotation, mirror) -> None:
    stored = encode(tmp_path / "stored.mp4", ramp(4))
    turned = tmp_path / "turned.mp4"
    ffmpeg("-display_rotation", rotation, *mirror, "-i", stored, "-c", "copy", turned)
    expected = by_ffmpeg(turned)
    pixels = video_clip(turned, FrameOptions()).arrays()["pixels"]
    assert np.abs(pixels.astype(int) - expected).mean() < 2
    if rotation or mirror:  # the four quadrants of the picture differ
        assert np.abs(pixels.astype(int) - by_ffmpeg(stored)).mean() > 20


SUFFIXES = {
    **{suffix: () for suffix in ("wmv", "flv", "ts", "mts", "m2ts", "m4v", "MPEG", "vob", "asf")},
    "3gp": ("-c:v", "mpeg4"),
    "ogv": ("-c:v", "libtheora", "-q:v", "8"),
    "mxf": ("-c:v", "mpeg2video"),
    "WMV": (),
}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_kind_that_pyav_plays_is_read(tmp_path, suffix: str) -> None:
    name = f"a.{suffix}"
    ffmpeg(*MOVING, "-t", "0.4", *SUFFIXES[suffix], tmp_path / name)
    source = VideoFolder(tmp_path, FrameOptions())
    assert [item.name for item in source.items()] == [name]
    pixels = source.load(source.items()[0]).arrays()["pixels"]
    expected = by_ffmpeg(tmp_path / name)
    assert pixels.shape == expected.shape
    assert np.abs(pixels.astype(int) - expected).mean() < 2


def two_streams(path: Path, *dispositions: str) -> np.ndarray:
    """A small red stream and a large blue one; returns the mean color that is shown."""
    red, blue = ("-f", "lavfi", "-i"), ("-f", "lavfi", "-i")
    inputs = (*red, "color=red:s=64x48:d=1:r=5", *blue, "color=blue:s=128x96:d=1:r=5")
    ffmpeg(*inputs, "-map", 0, "-map", 1, "-c:v", "mpeg4", *dispositions, path)
    return video_clip(path, FrameOptions()).arrays()["pixels"].mean((0, 2, 3))


def test_of_several_streams_the_default_one_is_taken_else_the_largest(tmp_path) -> None:
    none = ("-disposition:v:0", "0", "-disposition:v:1", "0")
    first = ("-disposition:v:0", "default", "-disposition:v:1", "0")
    assert two_streams(tmp_path / "first.mkv", *first)[0] > 200
    assert two_streams(tmp_path / "none.mkv", *none)[2] > 200
    assert two_streams(tmp_path / "plain.avi")[2] > 200  # knows no default


def test_a_cover_picture_is_no_video(tmp_path) -> None:
    cover = ("-f", "lavfi", "-i", "color=red:s=640x480:d=0.04:r=25")
    sound = ("-f", "lavfi", "-i", "sine=d=0.5")
    as_cover = ("-c:v:{}", "mjpeg", "-disposition:v:{}", "attached_pic")
    song = [option.format(0) for option in as_cover]
    ffmpeg(*cover, *sound, "-map", 0, "-map", 1, "-frames:v", 1, *song, tmp_path / "song.mp4")
    with pytest.raises(ClipError, match="no picture in it"):
        video_clip(tmp_path / "song.mp4", FrameOptions()).arrays()
    film = [option.format(1) for option in as_cover]
    inputs = (*MOVING, *cover, "-map", 0, "-map", 1, "-c:v:0", "mpeg4", "-frames:v:0", 10)
    ffmpeg(*inputs, *film, tmp_path / "film.mp4")
    pixels = video_clip(tmp_path / "film.mp4", FrameOptions()).arrays()["pixels"]
    assert len(pixels) == 10


class Sequence(list):
    """Frames in the order in which they are shown, as the decoder would hand them out."""

    def __init__(self, *frames: str) -> None:
        """``I0 B2 P1! x4``: kind, number in the order of decoding; ! corrupt, x not decodable."""
        self.notes: Counter[str] = Counter()
        for text in frames:
            number = int(text[1:].rstrip("!"))
            frame = SimpleNamespace(
                name=text,
                key_frame=text[0] == "I",
                pict_type=PictureType[text[0]] if text[0] != "x" else None,
                is_corrupt=text.endswith("!"),
            )
            self.append((number, None if text[0] == "x" else frame))


@pytest.mark.parametrize(
    ("frames", "kept"),
    [
        ("I0 B2 B3 P1 B5 P4 I6", "I0 B2 B3 P1 B5 P4 I6"),
        ("I0 B2 B3 P1! B5 P4 I6 P7", "I0 I6 P7"),  # B2 and B3 were decoded from P1
        ("I0 B2 P1 B4! P3 B6 P5 I7", "I0 B2 P1 P3 I7"),  # P3 was decoded before B4
        ("I0 x4 B3 B5 P2 I6", "I0 B3 P2 I6"),  # what was decoded before the damage is sound
        ("P1! P2 P3", ""),
        ("I0! P1 I2 P3", "I2 P3"),
    ],
)
def test_damage_spoils_what_was_decoded_from_it_and_nothing_else(frames: str, kept: str) -> None:
    decoding = Sequence(*frames.split())
    shown = [frame.name for frame in trusted(decoding, lambda frame: frame, 1)]
    assert shown == kept.split()
    assert decoding.notes.total() == len(decoding) - len(shown)


def test_a_stream_of_nothing_but_b_frames_does_not_pile_up() -> None:
    decoding = Sequence("I0", *(f"B{n}" for n in range(1, 1000)))
    scaled = []
    frames = trusted(decoding, lambda frame: scaled.append(frame) or frame, 1)
    for seen, _ in enumerate(frames):
        assert len(scaled) - seen <= 18
    assert seen == 999
