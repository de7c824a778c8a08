"""What a damaged replay costs: the episodes that were hit, not the run."""

from __future__ import annotations

import json
import logging
import os
import random
from pathlib import Path

import pytest
import torch

from prelar_trl.data import EpisodeReplay, StoreError
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
