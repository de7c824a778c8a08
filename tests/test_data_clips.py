from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from prelar_trl.data import ClipStore, ClipWriter, StoreError, VideoClips
from tests.files import contents, flip

LENGTHS = (7, 4, 10, 1, 6)
SMALL = {"source": "test", "height": 8, "width": 8}


def frames_of(clip: int, length: int) -> torch.Tensor:
    """Frame t of clip c holds the number 20 c + t."""
    number = 20 * clip + torch.arange(length, dtype=torch.uint8)
    return number.view(-1, 1, 1, 1).repeat(1, 3, 8, 8)


def add_clip(writer: ClipWriter, clip: int, length: int, actions: bool = True) -> None:
    """Frames of clip c hold the numbers 20 c + t, and so do its actions, twice."""
    number = (20 * clip + torch.arange(length)).float().unsqueeze(-1).repeat(1, 2)
    frames = frames_of(clip, length)
    writer.add(frames, number if actions else None, name=f"clip {clip}", label=clip % 2)


def write(path: Path, lengths=LENGTHS, *, actions=True, start=0, **options) -> Path:
    with ClipWriter(path, **{**SMALL, "shard_bytes": 2500, **options}) as writer:
        for clip, length in list(enumerate(lengths))[start:]:
            add_clip(writer, clip, length, actions)
    return path


def test_what_is_written_is_read_back_exactly(tmp_path) -> None:
    store = ClipStore(write(tmp_path / "s"))
    assert len(store.meta["shards"]) > 1
    assert store.frames.tolist() == list(LENGTHS)
    assert store.names[2] == "clip 2" and store.labels == [0, 1, 0, 1, 0]
    assert store.num_frames == 28 and store.size == (8, 8)
    for clip, length in enumerate(LENGTHS):
        assert np.array_equal(store.read(clip), frames_of(clip, length).numpy())
        assert np.array_equal(store.read(clip, "actions")[:, 0], 20 * clip + np.arange(length))


def test_windows_are_consecutive_frames_of_one_clip(tmp_path) -> None:
    clips = VideoClips(write(tmp_path / "s"), clip_len=4, batch_size=64)
    seen = set()
    for _ in range(10):
        batch = clips.sample()
        assert batch.batch_size == (64, 4)
        assert batch["pixels"].shape == (64, 4, 3, 8, 8) and batch["pixels"].dtype == torch.uint8
        number = batch["pixels"][..., 0, 0, 0].int()
        assert bool((number.diff(dim=1) == 1).all())
        assert bool((batch["pixels"] == number[..., None, None, None]).all())
        assert batch["is_first"].squeeze(-1).tolist() == [[True, False, False, False]] * 64
        seen |= set(number[:, 0].tolist())
    possible = {20 * c + s for c, length in enumerate(LENGTHS) for s in range(length - 3)}
    assert seen == possible


def test_a_batch_holds_no_actions_unless_a_probe_asks_which_changes_no_draw(tmp_path) -> None:
    path = write(tmp_path / "s")
    clips, other = (VideoClips(path, 4, 8, seed=3) for _ in range(2))
    probe = clips.sample_with_actions()
    assert set(probe.keys()) == {"pixels", "is_first", "action"}
    assert torch.equal(probe["action"][..., 0], probe["pixels"][..., 0, 0, 0].float())
    batch = clips.sample()
    assert set(batch.keys()) == {"pixels", "is_first"}
    assert torch.equal(batch["pixels"], other.sample()["pixels"])


@pytest.mark.parametrize("prefetch", [0, 3])
def test_draws_depend_on_the_seed_and_continue_from_a_state(tmp_path, prefetch: int) -> None:
    path = write(tmp_path / "s")
    options = {"clip_len": 4, "batch_size": 8}
    one = VideoClips(path, **options, seed=3, prefetch=prefetch)
    plain = VideoClips(path, **options, seed=3)
    for _ in range(3):
        assert torch.equal(one.sample()["pixels"], plain.sample()["pixels"])
    other = VideoClips(path, **options, seed=4, prefetch=prefetch)
    assert not torch.equal(other.sample()["pixels"], plain.sample()["pixels"])
    one.sample()
    other.load_state_dict(one.state_dict())
    for _ in range(4):
        assert torch.equal(one.sample()["pixels"], other.sample()["pixels"])


def test_several_processes_share_one_stream(tmp_path) -> None:
    path = write(tmp_path / "s", [6] * 12)
    whole = VideoClips(path, 4, 12, strategy="epoch").sample()["pixels"]
    shares = [VideoClips(path, 4, 6, strategy="epoch", rank=r, world_size=2) for r in range(2)]
    for rank, share in enumerate(shares):
        assert torch.equal(share.sample()["pixels"], whole[rank::2])
    clips = whole[:, 0, 0, 0, 0] // 20
    assert sorted(clips.tolist()) == list(range(12))  # an epoch: nobody reads a clip of another


def test_heldout_clips_are_never_trained_on(tmp_path) -> None:
    path = write(tmp_path / "s", [6] * 12)
    drawn = {}
    for split in ("train", "heldout", "all"):
        clips = VideoClips(path, 4, 64, split=split, heldout=0.25)
        pixels = torch.cat([clips.sample()["pixels"][:, 0, 0, 0, 0] for _ in range(5)])
        drawn[split] = set((pixels // 20).tolist())
        assert clips.num_clips == len(drawn[split])
    assert len(drawn["heldout"]) == 3
    assert not drawn["train"] & drawn["heldout"]
    assert drawn["train"] | drawn["heldout"] == drawn["all"] == set(range(12))


def test_several_stores_are_one_and_a_mixture_follows_its_weights(tmp_path) -> None:
    one, other = write(tmp_path / "a", [6, 6]), tmp_path / "b"
    with ClipWriter(other, **SMALL) as writer:
        for clip in range(8):
            split = "heldout" if clip == 2 else "train"
            writer.add(torch.full((6, 3, 8, 8), 200 + clip, dtype=torch.uint8), split=split)
    for stores, expected in (([one, other], 0.8), ({one: 3, other: 1}, 0.25)):
        clips = VideoClips(stores, 4, 4000)
        assert clips.num_clips == 10
        share = (clips.sample()["pixels"][:, 0, 0, 0, 0] >= 200).float().mean()
        assert abs(share - expected) < 0.04
    heldout = VideoClips(other, 4, 16, split="heldout").sample()  # as recorded
    assert heldout["pixels"].unique().tolist() == [202]


def test_further_image_streams_are_sampled_in_step(tmp_path) -> None:
    with ClipWriter(tmp_path / "s", **SMALL) as writer:
        for clip in range(3):
            writer.add(frames_of(clip, 6), flow=frames_of(clip, 6) + 100)
    batch = VideoClips(tmp_path / "s", 4, 8, streams=("pixels", "flow")).sample()
    assert torch.equal(batch["flow"], batch["pixels"] + 100)
    with pytest.raises(ValueError, match="no image stream 'depth': it has flow, pixels"):
        VideoClips(tmp_path / "s", 4, streams=("pixels", "depth"))
    with pytest.raises(ValueError, match="must name image streams"):
        VideoClips(tmp_path / "s", 4, streams=())


def test_too_long_windows_say_the_longest_clip(tmp_path) -> None:
    path = write(tmp_path / "s")
    with pytest.raises(ValueError, match="clip_len=25, but the longest .* has 10 frames"):
        VideoClips(path)
    clips = VideoClips(path, 7)
    assert (clips.num_clips, clips.num_too_short, clips.num_frames) == (2, 3, 17)


@pytest.mark.parametrize(
    ("frames", "actions", "message"),
    [
        (torch.zeros(5, 3, 8, 8), None, r"uint8 \[T, 3, 8, 8\], got float32 \[5, 3, 8, 8\]"),
        (frames_of(0, 5).permute(0, 2, 3, 1), None, r"got uint8 \[5, 8, 8, 3\]"),
        (frames_of(0, 5)[:, :, :7], None, r"got uint8 \[5, 3, 7, 8\]"),
        (frames_of(0, 5)[:0], None, "no frame"),
        (frames_of(0, 5), torch.full((5, 2), float("nan")), "NaN"),
        (frames_of(0, 5), torch.zeros(4, 2), "actions has 4 rows for 5 frames"),
        (frames_of(0, 5), torch.zeros(5, 2, dtype=torch.float64), "actions must be float32"),
        (frames_of(0, 5), torch.zeros(5, 3), r"actions \[3\], pixels .* the store has actions"),
        (frames_of(0, 5), None, "the store has actions"),
    ],
)
def test_a_bad_clip_is_refused_and_harms_nothing(tmp_path, frames, actions, message) -> None:
    with ClipWriter(tmp_path / "s", **SMALL) as writer:
        add_clip(writer, 1, 6)
        with pytest.raises(ValueError, match=message):
            writer.add(frames, actions)
        with pytest.raises(ValueError, match="already in the store"):
            add_clip(writer, 1, 6)
    store = ClipStore(tmp_path / "s")
    assert len(store) == 1 and np.array_equal(store.read(0), frames_of(1, 6).numpy())


def test_names_may_be_any_text(tmp_path) -> None:
    name = "ein Name \u2028 mit Ümläuten/und\nZeilen"
    with ClipWriter(tmp_path / "s", **SMALL) as writer:
        writer.add(frames_of(0, 5), name=name)
    assert ClipStore(tmp_path / "s").names == [name]


def test_a_store_continued_after_finishing_equals_one_made_at_once(tmp_path) -> None:
    whole = contents(write(tmp_path / "whole"))
    for first in range(1, len(LENGTHS)):
        path = write(tmp_path / f"two{first}", LENGTHS[:first])
        assert contents(write(path, start=first)) == whole


def test_a_store_interrupted_anywhere_equals_one_made_at_once(tmp_path) -> None:
    """Cuts every file of an unfinished store at random places, as a crash might."""
    whole = contents(write(tmp_path / "whole"))
    rng = np.random.default_rng(0)
    for trial in range(12):
        path = tmp_path / f"cut{trial}"
        writer = ClipWriter(path, **SMALL, shard_bytes=2500)
        for clip in range(4):
            add_clip(writer, clip, LENGTHS[clip])
        last = writer.clips[-1].shard
        writer.release()
        for name, suffix in (("pixels", "bin"), ("actions", "bin"), ("clips", "jsonl")):
            file = path / name / f"{last:06d}.{suffix}"
            data = file.read_bytes()
            file.write_bytes(data[: rng.integers(len(data) + 1)])
        with pytest.raises(StoreError, match="unfinished"):
            ClipStore(path)
        with ClipWriter(path, **SMALL, shard_bytes=2500) as writer:
            for clip, length in enumerate(LENGTHS):
                if f"clip {clip}" not in writer.done:
                    add_clip(writer, clip, length)
        assert contents(path) == whole


def test_skipped_clips_are_remembered(tmp_path) -> None:
    path = tmp_path / "s"
    writer = ClipWriter(path, **SMALL)
    add_clip(writer, 0, 5)
    writer.skip("bad", "it is empty")
    with pytest.raises(StoreError, match="another process is writing"):
        ClipWriter(path, **SMALL)
    writer.release()
    with pytest.raises(StoreError, match="begun with source='test', not 'other'"):
        ClipWriter(path, **SMALL | {"source": "other"})
    with ClipWriter(path, **SMALL) as writer:
        assert writer.done == {"clip 0", "bad"} and writer.num_skipped == 1
    assert ClipStore(path).meta["skipped"] == 1


def test_an_exception_leaves_an_unfinished_store_and_an_empty_one_is_not_finished(tmp_path) -> None:
    with pytest.raises(KeyError), ClipWriter(tmp_path / "s", **SMALL) as writer:
        add_clip(writer, 0, 5)
        raise KeyError
    with pytest.raises(StoreError, match="unfinished: run the command that makes it"):
        VideoClips(tmp_path / "s")
    with pytest.raises(ValueError, match="nothing was added"):
        ClipWriter(tmp_path / "empty", **SMALL).close()


def test_missing_foreign_and_newer_stores_are_named(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="no clip store at"):
        VideoClips(tmp_path / "nothing")
    (tmp_path / "store.json").write_text('{"format": "zarr"}')
    with pytest.raises(StoreError, match="not a clip store of this project"):
        VideoClips(tmp_path)
    (tmp_path / "store.json").write_text("{")
    with pytest.raises(StoreError, match="is damaged"):
        VideoClips(tmp_path)
    path = write(tmp_path / "s")
    meta = json.loads((path / "store.json").read_text())
    (path / "store.json").write_text(json.dumps(meta | {"version": 99}))
    with pytest.raises(StoreError, match="store version 99"):
        VideoClips(path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("precious")
    with pytest.raises(StoreError, match="not empty"):
        ClipWriter(tmp_path / "other", source="test")


@pytest.mark.parametrize("stream", ["pixels", "actions", "clips"])
@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_damage_is_found_when_a_store_is_opened(tmp_path, stream: str, damage: str) -> None:
    path = write(tmp_path / "s")
    file = sorted((path / stream).iterdir())[1]
    if damage == "delete":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        flip(file)
    with pytest.raises(StoreError, match=f"damaged at .*{stream}"):
        ClipStore(path)
