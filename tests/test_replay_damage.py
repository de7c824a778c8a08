"""What a damaged replay costs: the episodes that were hit, not the run."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from torchrl.envs import Transform

from prelar_trl.data import ClipStore, ClipWriter, EpisodeReplay, StoreError
from prelar_trl.data.shards import OpenShard
from tests.files import flip
from tests.test_replay import expect, opened, steps

EPISODE = 10 * 3 * 4 * 4  # bytes of the pixels of nine steps


def filled(path: Path, episodes: int = 4, **options) -> EpisodeReplay:
    """A replay of episodes of nine steps; number n has frames of n * 20 and on."""
    replay = opened(path, **options)
    for number in range(episodes):
        replay.extend(steps(9, base=20 * number))
    return replay


def killed(replay: EpisodeReplay) -> None:
    """As a process that is killed leaves it."""
    replay.storage._store.release()


def sampled(replay: EpisodeReplay) -> set[int]:
    """Numbers of the episodes that are drawn."""
    frames = torch.cat([replay.sample()["pixels"][..., 0, 0, 0] for _ in range(20)])
    return set((frames // 20).flatten().tolist())


@pytest.mark.parametrize("shard", ["open", "sealed"])
@pytest.mark.parametrize("stream", ["pixels", "actions", "rewards", "terminated"])
def test_a_flipped_bit_loses_its_episode_alone(
    shard: str, stream: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    capacity = {"open": 1_000, "sealed": 80}[shard]  # sealed: a shard an episode
    replay = filled(tmp_path, capacity=capacity)
    state = replay.state_dict()
    killed(replay)
    files = sorted((replay.path / stream).iterdir())
    assert (len(files) > 1) == (shard == "sealed")
    file = files[1 if shard == "sealed" else 0]
    size = file.stat().st_size
    flip(file, size // 2 if shard == "sealed" else size * 3 // 8)  # within the second episode
    with caplog.at_level(logging.WARNING):
        again = opened(tmp_path, capacity=capacity)
    assert "episode 000001 of" in caplog.text and "is damaged and left out" in caplog.text
    again.load_state_dict(state)
    assert again.num_eligible == 3
    assert sampled(again) == {0, 2, 3}
    again.extend(steps(9, base=80))
    expect(again.episode(4), 9, base=80)
    assert sampled(again) == {0, 2, 3, 4}


def test_random_flips_are_found(tmp_path: Path) -> None:
    replay = filled(tmp_path, capacity=1_000)
    killed(replay)
    file = replay.path / "pixels" / "000000.bin"
    generator, whole = random.Random(0), file.read_bytes()
    for _ in range(40):
        byte = generator.randrange(len(whole))
        flip(file, byte, generator.randrange(8))
        damaged = byte // EPISODE
        again = opened(tmp_path, capacity=1_000)
        if damaged == 3:  # the last: as one that was being written
            assert again.num_episodes == 3
            again.extend(steps(9, base=60))
        else:
            assert again.storage._store.damaged == {f"{damaged:06d}"}
        killed(again)
        file.write_bytes(whole)


def test_a_torn_last_line_loses_one_episode_and_not_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    replay = filled(tmp_path, capacity=1_000)
    state = replay.state_dict()
    killed(replay)
    journal = replay.path / "clips" / "000000.jsonl"
    whole = journal.read_bytes()
    last = whole.splitlines()[-1]
    renamed = last.replace(b'"name"', b'"nale"')
    for torn in (
        whole[:-1],
        whole[:-9],
        whole[:-40] + b"\0" * 40 + b"\n",
        renamed.join(whole.split(last)),
    ):
        journal.write_bytes(torn)
        again = opened(tmp_path, capacity=1_000)
        assert again.num_episodes == 3
        with caplog.at_level(logging.WARNING):
            again.load_state_dict(state)
        assert "ends at episode 3, the checkpoint at 4" in caplog.text
        again.extend(steps(9, base=60))
        assert journal.read_bytes() == whole
        expect(again.episode(3), 9, base=60)
        killed(again)


def test_a_line_whose_data_never_came_is_no_episode(tmp_path: Path) -> None:
    replay = filled(tmp_path, capacity=1_000)
    killed(replay)
    os.truncate(replay.path / "rewards" / "000000.bin", 3 * 10 * 4 + 8)
    again = opened(tmp_path, capacity=1_000)
    assert again.num_episodes == 3
    expect(again.episode(2), 9, base=40)


def test_an_episode_number_that_is_written_anew_is_good(tmp_path: Path) -> None:
    replay = filled(tmp_path, 2, capacity=1_000)
    state = replay.state_dict()
    for number in (2, 3):
        replay.extend(steps(9, base=20 * number))
    killed(replay)
    flip(replay.path / "pixels" / "000000.bin", 2 * EPISODE)
    again = opened(tmp_path, capacity=1_000)
    again.load_state_dict(state)
    again.extend(steps(9, base=40))
    assert sampled(again) == {0, 1, 2}


def test_a_replay_that_is_gone_is_an_error(tmp_path: Path) -> None:
    state = filled(tmp_path / "a").state_dict()
    with pytest.raises(ValueError, match="ends at episode 0, the checkpoint at 4: it is another"):
        opened(tmp_path / "b").load_state_dict(state)


@pytest.mark.parametrize("damage", [lambda x: x[:20], lambda x: b"\0" + x[1:], lambda x: b""])
def test_a_damaged_journal_of_a_sealed_shard_is_named(damage, tmp_path: Path) -> None:
    replay = filled(tmp_path, capacity=80)
    killed(replay)
    journal = replay.path / "clips" / "000001.jsonl"
    journal.write_bytes(damage(journal.read_bytes()))
    with pytest.raises(StoreError, match=r"000001.jsonl' is damaged: restore that file"):
        opened(tmp_path, capacity=80)


def test_what_a_state_counts_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replay = filled(tmp_path, capacity=1_000)
    synced: set[str] = set()
    real = os.fsync

    def fsync(handle: int) -> None:
        synced.add(Path(os.readlink(f"/proc/self/fd/{handle}")).parent.name)
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    assert replay.state_dict()["end"] == 4
    assert synced == {"clips", "pixels", "actions", "rewards", "terminated"}


def test_the_journal_of_a_replay_is_written_last(tmp_path: Path) -> None:
    replay = filled(tmp_path, 1, capacity=1_000)
    written: list[str] = []
    shard = replay.storage._store._shards.open
    real = shard._write
    shard._write = lambda key, blocks: written.append(key) or real(key, blocks)
    replay.extend(steps(9, base=20))
    assert written[-1] == "clips" and len(written) == 5
    line = (replay.path / "clips" / "000000.jsonl").read_text().splitlines()[1]
    assert set(json.loads(line)["crc32"]) == {"pixels", "actions", "rewards", "terminated"}


@pytest.mark.parametrize("folder", ["/outside", "../outside", "clips", "spool", ""])
def test_a_store_names_no_folder_but_its_own(folder: str, tmp_path: Path) -> None:
    """A run folder that came from elsewhere deletes nothing beside itself."""
    filled(tmp_path).close()
    outside = tmp_path / "outside" / "000000.bin"
    outside.parent.mkdir()
    outside.write_bytes(b"precious")
    file = tmp_path / "r" / "store.json"
    meta = json.loads(file.read_text())
    name = str(tmp_path / "outside") if folder == "/outside" else folder
    meta |= {"streams": {name: meta["streams"]["pixels"]}, "shards": [], "complete": False}
    file.write_text(json.dumps(meta))
    with pytest.raises(StoreError, match="is damaged .stream name .* must be a word other than"):
        opened(tmp_path)
    assert outside.read_bytes() == b"precious"


@pytest.mark.parametrize(
    "spec", [{"dtype": "object", "shape": [1]}, {"dtype": "uint8", "shape": [-1]}, {"shape": [1]}]
)
def test_a_stream_that_is_none_is_named(spec: dict, tmp_path: Path) -> None:
    filled(tmp_path).close()
    file = tmp_path / "r" / "store.json"
    meta = json.loads(file.read_text())
    file.write_text(json.dumps(meta | {"streams": {"pixels": spec}}))
    with pytest.raises(StoreError, match=r"store.json' is damaged \("):
        opened(tmp_path)


def test_a_flipped_bit_in_a_sealed_journal_is_named(tmp_path: Path) -> None:
    killed(filled(tmp_path, capacity=80))
    journal = tmp_path / "r" / "clips" / "000001.jsonl"
    whole = journal.read_bytes()
    journal.write_bytes(whole.replace(b'"label": null', b'"label": 1234'))
    assert journal.read_bytes() != whole
    with pytest.raises(StoreError, match=r"000001.jsonl' is damaged: restore that file"):
        opened(tmp_path, capacity=80)


def test_a_copy_beside_a_shard_disturbs_nothing(tmp_path: Path) -> None:
    killed(filled(tmp_path, capacity=80))
    copy = tmp_path / "r" / "pixels" / "000001.bin.bak"
    copy.touch()
    assert sampled(opened(tmp_path, capacity=80)) and copy.exists()


def test_what_a_crash_while_deleting_leaves_is_deleted_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replay = filled(tmp_path, 5, capacity=40)
    with monkeypatch.context() as patched:
        patched.setattr(OpenShard, "delete", lambda shard: killed(replay))  # the process ends here
        for number in range(5, 9):
            with suppress(StoreError):
                replay.extend(steps(9, base=20 * number))
                break
    oldest = min(int(x.stem) for x in (replay.path / "pixels").iterdir())
    killed(replay)
    again = opened(tmp_path, capacity=40)
    first = again.storage._store._shards.evicted["shards"]
    assert oldest < first
    for stream in ("pixels", "clips", "actions"):
        assert min(int(x.stem) for x in (replay.path / stream).iterdir()) == first


def test_after_a_full_disk_a_replay_goes_on_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replay = filled(tmp_path, 1, capacity=1_000)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="no space left"):
        patched.setattr(OpenShard, "_write", full)
        replay.extend(steps(9, base=20))
    replay.extend(steps(9, base=40))
    with pytest.raises(StoreError, match="another process is writing"):
        opened(tmp_path, capacity=1_000)
    replay.close()
    assert len(ClipStore(replay.path)) == 2
    replay.extend(steps(9, base=60))
    replay.close()
    assert len(ClipStore(replay.path)) == 3


def test_a_closed_store_takes_no_clip(tmp_path: Path) -> None:
    writer = ClipWriter(tmp_path, source="test", height=4, width=4)
    writer.add(steps(9)["pixels"])
    writer.close()
    for use in (lambda: writer.add(steps(9)["pixels"]), lambda: writer.truncate(0)):
        with pytest.raises(StoreError, match="is closed: open it again"):
            use()
    assert len(ClipStore(tmp_path)) == 1


@pytest.mark.parametrize("prefetch", [0, 2])
def test_after_a_draw_that_failed_the_next_is_that_of_no_failure(
    prefetch: int, tmp_path: Path
) -> None:
    replay = filled(tmp_path, capacity=1_000, prefetch=prefetch)
    whole = filled(tmp_path / "whole", capacity=1_000)

    class Fails(Transform):
        left = 1

        def forward(self, tensordict):
            self.left -= 1
            if self.left >= 0:
                raise RuntimeError("once")
            return tensordict

    state = replay.state_dict()
    replay.buffer.append_transform(Fails())
    with pytest.raises(RuntimeError, match="once"):
        replay.sample()
    if not prefetch:
        replay.load_state_dict(state)
    assert bool((replay.sample() == whole.sample()).all())
    replay.state_dict()
    replay.close()


def with_vector(data: TensorDict, size: int = 2) -> TensorDict:
    vector = torch.zeros(len(data), size)
    return data.clone().set("vector", vector).set(("next", "vector"), vector)


@pytest.mark.parametrize("known", ["store", "unfinished"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: data, "vector has shape None per step; the replay .* holds .2."),
        (lambda data: with_vector(data, 3), "vector has shape .3."),
        (lambda data: with_vector(data).exclude(("next", "vector")), "vector is .2.* None in next"),
        (lambda data: with_vector(data).set("action", torch.zeros(9, 5)), "action has shape .5."),
        (
            lambda data: with_vector(data).set(("collector", "traj_ids"), torch.zeros(9, 2)),
            "traj_ids.* must be one number per step, got .2.",
        ),
    ],
)
def test_steps_that_do_not_fit_are_refused_whole(
    known: str, spoil, message: str, tmp_path: Path
) -> None:
    """Nothing is taken, neither is the unfinished episode lost that they would go on with."""
    replay = opened(tmp_path)
    replay.extend(with_vector(steps(9, done=known == "store")))
    pending = replay.state_dict()["pending"]
    with pytest.raises(ValueError, match=message):
        replay.extend(spoil(steps(9, base=9)))
    assert replay.num_episodes == (known == "store")
    assert replay.state_dict()["pending"].keys() == pending.keys()
    replay.extend(with_vector(steps(9, base=9)))
    assert replay.num_episodes == 1 + (known == "store")
