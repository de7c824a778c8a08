"""Which kind of source a folder is, lists that are not as they should be, beginning again."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from prelar_trl.data import ClipStore, ClipWriter, StoreError
from prelar_trl.data.sources import EpisodeFolder, FrameOptions, SomethingSomething
from prelar_trl.recipes.prepare_videos import run, summary
from tests.videos import config, encode, ramp, save_pictures, times


def save_episode(path: Path, frames: np.ndarray, **arrays: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, image=frames, **arrays)
    return path


# ---------------------------------------------------------------- the kind of a folder


def test_a_stray_npz_and_a_labels_file_do_not_change_what_most_files_are(tmp_path) -> None:
    root = tmp_path / "v"
    for name in ("a.mp4", "b.mp4"):
        encode(root / name, ramp(4))
    np.savez(root / "statistics.npz", mean=np.zeros(3))
    (root / "labels.json").write_text('{"a.mp4": "cat"}')
    store = run(config(root, tmp_path / "s"))
    assert store.names == ["a.mp4", "b.mp4"]
    assert {r: f["count"] for r, f in store.meta["left_out"].items()} == {
        ".npz files": 1,
        ".json files": 1,
    }


def test_a_stray_video_does_not_change_that_episodes_are_episodes(tmp_path) -> None:
    root = tmp_path / "v"
    encode(root / "demo.mp4", ramp(4))
    save_episode(root / "1.npz", ramp(5, 64, 64))
    save_episode(root / "2.NPZ.npz", ramp(6, 64, 64)).rename(root / "2.NPZ")
    store = run(config(root, tmp_path / "s"))
    assert store.meta["source"].startswith("prepare_videos, episodes")
    assert store.names == ["1.npz", "2.NPZ"] and times(store.read(1)) == list(range(6))
    assert '1  .mp4 files, e.g. "demo.mp4"' in summary(store)


def test_lists_of_ones_own_that_look_like_somethings_name_the_kind(tmp_path) -> None:
    root = tmp_path / "v"
    encode(root / "a.mp4", ramp(4))
    (root / "labels.json").write_text('{"cat": 0}')
    (root / "train.json").write_text('[{"file": "a.mp4"}]')
    with pytest.raises((ValueError, FileNotFoundError), match="add kind=videos"):
        run(config(root, tmp_path / "s"))
    assert run(config(root, tmp_path / "s", kind="videos")).names == ["a.mp4"]


def test_when_nothing_is_usable_the_reasons_are_told_and_one_can_begin_again(tmp_path) -> None:
    root = tmp_path / "v"
    root.mkdir()
    for name in ("1.npz", "2.npz"):
        (root / name).write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"nothing was added .*2 x not readable as .npz, e.g. '1"):
        run(config(root, tmp_path / "s"))
    encode(root / "a.mp4", ramp(4))
    assert run(config(root, tmp_path / "s", kind="videos")).names == ["a.mp4"]
    save_episode(root / "1.npz", ramp(5, 64, 64))
    with pytest.raises(StoreError, match="was begun with"):  # that one has a clip
        run(config(root, tmp_path / "s", kind="episodes"))
    assert run(config(root, tmp_path / "t", kind="episodes")).names == ["1.npz"]


def test_a_store_that_was_stopped_before_its_first_clip_can_be_begun_otherwise(tmp_path) -> None:
    writer = ClipWriter(tmp_path / "s", source="one", height=8, width=8)
    writer.skip("a", "broken")
    writer.release()
    clip = np.full((2, 3, 8, 8), 7, np.uint8)
    with ClipWriter(tmp_path / "s", source="other", height=8, width=8) as writer:
        assert not writer.done
        writer.add(clip, name="a")
    store = ClipStore(tmp_path / "s")
    assert store.meta["source"] == "other" and not store.skipped()
    with ClipWriter(tmp_path / "fresh", source="other", height=8, width=8) as writer:
        writer.add(clip, name="a")
    for file in sorted(p for p in store.path.rglob("*") if p.is_file()):
        assert file.read_bytes() == (tmp_path / "fresh" / file.relative_to(store.path)).read_bytes()


def test_a_first_clip_that_was_cut_short_leaves_nothing_behind(tmp_path) -> None:
    encode(tmp_path / "v" / "a.mp4", ramp(4))
    whole = run(config(tmp_path / "v", tmp_path / "whole"))
    store = run(config(tmp_path / "v", tmp_path / "s"))
    meta = store.meta | {"complete": False, "shards": [], "clips": 0, "frames": 0, "skipped": None}
    (store.path / "store.json").write_text(json.dumps(meta))
    (store.path / "clips" / "000000.jsonl").write_bytes(b"")
    (store.path / "spool" / "0").mkdir(parents=True)
    again = run(config(tmp_path / "v", tmp_path / "s"))
    files = sorted(p.relative_to(again.path) for p in again.path.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(whole.path) for p in whole.path.rglob("*") if p.is_file())
    for file in files:
        assert (again.path / file).read_bytes() == (whole.path / file).read_bytes()


# ---------------------------------------------------------------- lists


def something(root: Path, **lists) -> Path:
    """A Something-Something-V2 of one clip whose lists are replaced by ``lists``."""
    contents = {
        "labels": {"Holding something": "0", "Moving something up": "1"},
        "train": [{"id": "1", "template": "Holding [something]"}],
        "validation": [],
    }
    root.mkdir()
    (root / "1.webm").write_bytes(b"")
    for name, content in (contents | lists).items():
        (root / f"{name}.json").write_text(json.dumps(content))
    return root


RECORD = {"id": "1", "template": "Holding [something]"}
BAD_LISTS = [
    ({"labels": ["Holding something"]}, r"labels.json' must be a mapping .* is a list"),
    ({"labels": {"Holding something": "zero"}}, r"labels.json' .* 'Holding something' has 'zero'"),
    ({"labels": {}}, r"labels.json' is empty"),
    ({"train": {"1": RECORD}}, r"train.json' must be a list of records .* is a dict"),
    ({"train": [RECORD, {"id": "2"}]}, r"train.json' record 1 has no 'template': .*\"2\""),
    ({"train": [{"template": "Holding [something]"}]}, r"train.json' record 0 has no 'id'"),
    ({"train": [RECORD | {"template": None}]}, r"train.json' record 0 has no 'template'"),
    ({"train": ["1"]}, r"train.json' record 0 is '1', not a record"),
    ({"train": [RECORD | {"template": "Eating"}]}, r"record 0: template 'Eating' of clip 1 is not"),
    ({"train": [RECORD, RECORD]}, r"clip '1' is listed twice: .*record 0 and .*record 1"),
    ({"validation": [RECORD]}, r"listed twice: .*train.json' record 0 and .*validation.json' rec"),
]


@pytest.mark.parametrize(("lists", "message"), BAD_LISTS)
def test_bad_lists_are_told_by_file_and_record(tmp_path, lists: dict, message: str) -> None:
    root = something(tmp_path / "v", **lists)
    with pytest.raises(ValueError, match=message) as error:
        SomethingSomething(root, FrameOptions())
    assert "\n" not in str(error.value)


def test_lists_may_begin_with_a_byte_order_mark(tmp_path) -> None:
    root = something(tmp_path / "v")
    for file in root.glob("*.json"):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert [item.name for item in SomethingSomething(root, FrameOptions()).items()] == ["1"]


def test_text_lists_with_a_mark_or_windows_lines_are_read_and_doubles_are_told(tmp_path) -> None:
    save_pictures(tmp_path / "v" / "7", ramp(3, 64, 64), [f"{n:06d}.jpg" for n in (1, 2, 3)])
    train = tmp_path / "train.txt"
    train.write_bytes(b"\xef\xbb\xbf7 3 0\r\n")
    lists = {"train": str(train)}
    store = run(config(tmp_path / "v", tmp_path / "s", lists=lists))
    assert store.names == ["7"] and times(store.read(0)) == [0, 1, 2]
    (tmp_path / "val.txt").write_text("8 3 0\n7 3 0\n")
    lists["heldout"] = str(tmp_path / "val.txt")
    with pytest.raises(
        ValueError, match=r"clip '7' is listed twice: .*train.txt' line 1 and .*val"
    ):
        run(config(tmp_path / "v", tmp_path / "t", lists=lists))
    train.write_bytes(b"\xff\xfe7 3 0\n")
    with pytest.raises(ValueError, match=r"list '.*train.txt' is damaged"):
        run(config(tmp_path / "v", tmp_path / "t", lists=lists))
    train.write_text("7 0 0\n")
    with pytest.raises(ValueError, match="line 1 is '7 0 0'"):
        run(config(tmp_path / "v", tmp_path / "t", lists=lists))


# ---------------------------------------------------------------- episodes


def promising(path: Path, shape: tuple[int, ...], data: bytes) -> None:
    """An archive whose array has a header that promises ``shape``."""
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        size = len(header).to_bytes(2, "little")
        file.writestr("image.npy", b"\x93NUMPY\x01\x00" + size + header + data)


def test_archives_that_are_none_or_promise_too_much_are_skipped_with_a_reason(tmp_path) -> None:
    root = tmp_path / "v"
    frames = ramp(5, 64, 64)
    save_episode(root / "good.npz", frames)
    np.save(root / "array.npy", frames)
    (root / "array.npy").rename(root / "array.npz")
    promising(root / "huge.npz", (10**8, 64, 64, 3), frames.tobytes())
    promising(root / "small.npz", (5, 64, 64, 3), frames.tobytes())
    np.savez(root / "objects.npz", image=np.array([{}, {}], dtype=object))
    data = (root / "good.npz").read_bytes()
    (root / "flip.npz").write_bytes(data[:200] + bytes(20) + data[220:])
    store = run(config(root, tmp_path / "s"))
    assert store.names == ["good.npz", "small.npz"]
    for clip in range(2):
        assert np.array_equal(store.read(clip), frames.transpose(0, 3, 1, 2))
    assert dict(store.skipped()) == {
        "array.npz": "not readable as .npz",
        "flip.npz": "not readable as .npz",
        "huge.npz": "damaged: 'image' is announced larger than it is",
        "objects.npz": "image must be uint8 [T, H, W, 3], is object [2]",
    }


def test_episodes_in_another_memory_order_are_read(tmp_path) -> None:
    frames = ramp(5, 64, 64)
    save_episode(tmp_path / "a.npz", np.asfortranarray(frames), action=np.ones((5, 2)))
    source = EpisodeFolder(tmp_path, FrameOptions(), actions=True)
    clip = source.load(source.items()[0]).arrays()
    assert np.array_equal(clip["pixels"], frames.transpose(0, 3, 1, 2))
    assert clip["actions"].dtype == np.float32 and clip["actions"].shape == (5, 2)
