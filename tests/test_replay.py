from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict

from prelar_trl.data import ClipStore, EpisodeReplay, StoreError, VideoClips
from tests.toy_runs import different


def steps(length: int, *, base: int = 0, done: bool = True, terminated: bool = True) -> TensorDict:
    """``length`` steps in TorchRL's layout; every number is base + its time.

    pixels_t = base + t, action_t = base + t, reward that came with frame t = base + t.
    """
    time = base + torch.arange(length + 1)
    pixels = time.to(torch.uint8).view(-1, 1, 1, 1).repeat(1, 3, 4, 4)
    end = torch.zeros(length, 1, dtype=torch.bool)
    end[-1] = done
    following = {
        "pixels": pixels[1:],
        "reward": time[1:].float().unsqueeze(-1),
        "done": end,
        "terminated": end & terminated,
        "truncated": end & (not terminated),
    }
    action = time[:-1].float().unsqueeze(-1).repeat(1, 2)
    return TensorDict({"pixels": pixels[:-1], "action": action, "next": following}, [length])


def opened(path, **options) -> EpisodeReplay:
    return EpisodeReplay(path / "r", **{"window": 4, "batch_size": 16, "capacity": 60} | options)


def finished(replay: EpisodeReplay, data: TensorDict) -> int:
    """How many episodes ``data`` finish."""
    before = replay.num_episodes
    replay.extend(data)
    return replay.num_episodes - before


def expect(episode: TensorDict, length: int, base: int = 0, terminated: bool = True) -> None:
    """``episode`` is `steps` in DreamerV2's layout."""
    time = base + torch.arange(length + 1)
    action = (time - 1).float()
    action[0] = 0
    reward = time.float()
    reward[0] = 0
    assert episode.batch_size == (length + 1,)
    assert torch.equal(episode["pixels"][:, 0, 0, 0].long(), time)
    assert torch.equal(episode["action"], action.unsqueeze(-1).repeat(1, 2))
    assert torch.equal(episode["reward"], reward.unsqueeze(-1))
    assert episode["is_first"].squeeze(-1).tolist() == [True] + [False] * length
    assert episode["terminated"].squeeze(-1).tolist() == [False] * length + [terminated]


def test_an_episode_is_shifted_to_the_action_that_led_to_the_frame(tmp_path) -> None:
    replay, data = opened(tmp_path), steps(9, base=10)
    before = data.clone()
    assert replay.extend(data).tolist() == list(range(10))
    assert bool((data == before).all()) and set(data.keys()) == set(before.keys())
    expect(replay.episode(0), 9, base=10)
    replay.extend(steps(5, base=50, terminated=False))
    expect(replay.episode(1), 5, base=50, terminated=False)
    assert (replay.num_episodes, replay.num_frames, len(replay)) == (2, 16, 16)


def test_sampled_windows_keep_the_alignment_and_begin_with_is_first(tmp_path) -> None:
    replay = opened(tmp_path)
    replay.extend(steps(9, base=10))
    replay.extend(steps(6, base=50))
    for _ in range(20):
        batch = replay.sample()
        assert batch.batch_size == (16, 4)
        assert batch["pixels"].dtype == torch.uint8
        assert batch["action"].dtype == batch["reward"].dtype == torch.float32
        time = batch["pixels"][..., 0, 0, 0].float()
        inside = (time != 10) & (time != 50)
        assert bool((time.diff(dim=1) == 1).all())
        assert torch.equal(batch["reward"].squeeze(-1), time * inside)
        assert torch.equal(batch["action"][..., 0], (time - 1) * inside)
        assert torch.equal(batch["terminated"].squeeze(-1), (time == 19) | (time == 56))
        assert batch["is_first"].squeeze(-1).tolist() == [[True, False, False, False]] * 16


def test_an_episode_may_arrive_in_pieces_or_step_by_step(tmp_path) -> None:
    whole = steps(9, base=10)
    for cuts in ([3], [1, 2, 8], list(range(1, 9))):
        replay = EpisodeReplay(tmp_path / str(len(cuts)), window=4, capacity=60)
        for begin, end in zip([0, *cuts], [*cuts, 9], strict=True):
            assert replay.num_episodes == 0
            replay.extend(whole[begin:end])
        expect(replay.episode(0), 9, base=10)
    one, two = opened(tmp_path / "one"), opened(tmp_path / "two")
    both = torch.stack([steps(7, base=10), steps(7, base=50)])  # [N, T]
    for t in range(7):
        one.add(both[0, t])
        two.add(both[:, t])
    expect(one.episode(0), 7, base=10)
    for number in range(2):
        expect(two.episode(number), 7, base=both[number, 0]["pixels"][0, 0, 0].item())


def test_episodes_of_several_workers_are_not_mixed(tmp_path) -> None:
    replay = opened(tmp_path)
    first = [steps(5, base=0), steps(3, base=100), steps(4, base=150)]
    second = [steps(3, base=20), steps(9, base=120), steps(4, base=170)]
    lines = [torch.cat([a, b]) for a, b in zip(first, second, strict=True)]  # 8, 12, 8 steps
    assert finished(replay, torch.stack([line[:8] for line in lines])) == 5
    assert finished(replay, torch.stack([x[8:12] for x in (torch.cat([lines[1]] * 2),) * 3])) == 3
    lengths = sorted(len(replay.episode(i)) - 1 for i in range(5))
    assert lengths == [3, 3, 4, 4, 5]
    expect(replay.episode(0), 5, base=0)
    expect(replay.episode(1), 3, base=20)
    expect(replay.episode(2), 3, base=100)
    found = [replay.episode(i) for i in range(5, 8)]
    assert any(len(e) == 10 and int(e["pixels"][0, 0, 0, 0]) == 120 for e in found)


def test_trajectory_ids_keep_asynchronous_workers_apart(tmp_path) -> None:
    replay = opened(tmp_path)
    one, other = steps(6, base=10), steps(6, base=50)
    for begin in (0, 3):
        for number, line in ((7, one), (9, other)):
            piece = line[begin : begin + 3].clone()
            piece["collector", "traj_ids"] = torch.full((3,), number)
            replay.extend(piece)
    expect(replay.episode(0), 6, base=10)
    expect(replay.episode(1), 6, base=50)


def test_a_reset_before_the_end_breaks_the_episode_off(tmp_path) -> None:
    replay = opened(tmp_path)
    broken, whole = steps(5, base=10, done=False), steps(4, base=50)
    for line in (broken, whole):
        first = torch.zeros(len(line), 1, dtype=torch.bool)
        first[0] = True
        line["is_first"] = first
    assert finished(replay, broken) == 0
    assert finished(replay, whole) == 2
    together = EpisodeReplay(tmp_path / "t", window=4, capacity=60)
    assert finished(together, torch.cat([broken, whole])) == 2
    for each in (replay, together):
        expect(each.episode(0), 5, base=10, terminated=False)
        expect(each.episode(1), 4, base=50)


@pytest.mark.parametrize("capacity", [40, 41, 49])
def test_the_oldest_episodes_make_room(tmp_path, capacity: int) -> None:
    replay = opened(tmp_path, capacity=capacity)
    for number in range(9):
        replay.extend(steps(9, base=20 * number))
        assert replay.num_frames <= capacity
    assert replay.num_episodes == 4
    for place, number in enumerate(range(5, 9)):
        expect(replay.episode(place), 9, base=20 * number)
    seen = {int(x) // 20 for _ in range(20) for x in replay.sample()["pixels"][:, 0, 0, 0, 0]}
    assert seen == {5, 6, 7, 8}


def test_reopening_finds_every_finished_episode(tmp_path) -> None:
    replay = opened(tmp_path, capacity=40)
    for number in range(6):
        replay.extend(steps(6 + number % 3, base=20 * number))
    replay.extend(steps(5, base=200, done=False))
    before = [replay.episode(i) for i in range(replay.num_episodes)]
    replay.close()
    again = opened(tmp_path, capacity=40)
    assert again.num_frames == replay.num_frames
    for i, episode in enumerate(before):
        assert bool((again.episode(i) == episode).all())
    assert again.num_episodes == len(before)
    again.extend(steps(6, base=220))
    expect(again.episode(again.num_episodes - 1), 6, base=220)


@pytest.mark.parametrize("file", ["clips/000000.jsonl", "pixels/000000.bin"])
def test_a_file_torn_at_a_crash_loses_only_its_episode(tmp_path, file: str) -> None:
    replay = opened(tmp_path, capacity=400)
    replay.extend(steps(6, base=10))
    replay.extend(steps(6, base=50))
    shutil.copytree(replay.path, tmp_path / "crashed" / "r")
    torn = tmp_path / "crashed" / "r" / file
    torn.write_bytes(torn.read_bytes()[:-4])
    again = opened(tmp_path / "crashed", capacity=400)
    assert again.num_episodes == 1
    again.extend(steps(6, base=90))
    expect(again.episode(0), 6, base=10)
    expect(again.episode(1), 6, base=90)


def test_the_disk_holds_little_more_than_the_capacity(tmp_path) -> None:
    replay = opened(tmp_path, capacity=80)
    for number in range(50):
        replay.extend(steps(9, base=number))
        replay.sample()
    size = sum(file.stat().st_size for file in (replay.path / "pixels").iterdir())
    assert 80 <= size / (3 * 4 * 4) <= 100
    maps = [x for x in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in x]
    assert not [x for x in maps if "deleted" in x]  # it would keep the space
    expect(replay.episode(7), 9, base=49)


def test_same_seed_same_batches_and_the_state_continues_exactly(tmp_path) -> None:
    replay = opened(tmp_path, seed=3)
    other = EpisodeReplay(tmp_path / "o", window=4, batch_size=16, capacity=60, seed=3)
    for each in (replay, other):
        each.extend(steps(9, base=10))
        each.extend(steps(3, base=50, done=False))
    assert torch.equal(replay.sample()["pixels"], other.sample()["pixels"])
    state = replay.state_dict()
    rest = steps(9, base=53)
    replay.extend(steps(9, base=100))  # another worker's later episode, to be undone
    replay.close()
    again = opened(tmp_path, seed=77)
    again.load_state_dict(state)
    assert again.num_episodes == 1
    for each in (again, other):
        assert finished(each, rest) == 1
        expect(each.episode(1), 12, base=50)
    for _ in range(3):
        assert torch.equal(again.sample()["pixels"], other.sample()["pixels"])
    again.close()
    assert opened(tmp_path).num_episodes == 2


@pytest.mark.parametrize("strategy", ["prioritize_ends", "frames", "epoch"])
def test_batches_drawn_ahead_are_those_of_drawing_none_ahead(tmp_path, strategy: str) -> None:
    def make(name: str, seed: int, prefetch: int) -> EpisodeReplay:
        options = {"window": 4, "batch_size": 5, "capacity": 60, "strategy": strategy}
        return EpisodeReplay(tmp_path / name, **options, seed=seed, prefetch=prefetch)

    plain, ahead = make("plain", 3, 0), make("ahead", 3, 2)
    replays = [plain, ahead]
    for number in range(8):  # the ring is full after six
        for each in replays:
            each.extend(steps(9, base=20 * number))
            each.extend(steps(2, base=200, done=False))
        for _ in range(3):
            batch, *others = (each.sample() for each in replays)
            assert all((batch == other).all() for other in others)
        if number == 2:  # what was drawn ahead is not in the state
            state = ahead.state_dict()
            assert different(state["sampler"], plain.state_dict()["sampler"]) == []
            shutil.copytree(ahead.path, tmp_path / "late")
            replays.append(make("late", 4, 3))
            replays[-1].load_state_dict(state)
    for each in replays:
        each.close()


def test_the_next_epoch_after_a_new_episode_continues_exactly(tmp_path) -> None:
    options = {"window": 4, "batch_size": 5, "strategy": "epoch"}
    replay = opened(tmp_path, **options)
    for number in range(3):
        replay.extend(steps(9, base=20 * number))
    replay.sample()
    replay.extend(steps(9, base=100))
    state = replay.state_dict()
    expected = replay.sample()
    replay.load_state_dict(state)
    assert (replay.sample() == expected).all()


def test_a_state_is_gone_back_to_over_several_shards(tmp_path) -> None:
    replay = opened(tmp_path, capacity=80)
    for number in range(3):
        replay.extend(steps(9, base=20 * number))
    state = replay.state_dict()
    for number in range(3, 6):
        replay.extend(steps(9, base=20 * number))
    replay.load_state_dict(state)
    assert replay.num_episodes == 3
    replay.extend(steps(7, base=200))
    expect(replay.episode(2), 9, base=40)
    expect(replay.episode(3), 7, base=200)
    replay.close()
    assert ClipStore(replay.path).frames.tolist() == [10, 10, 10, 8]


def test_windows_may_span_episodes_only_with_is_first_between(tmp_path) -> None:
    replay = opened(tmp_path, window=8, min_length=3)
    replay.extend(steps(4, base=10))
    replay.extend(steps(5, base=50))
    batch = replay.sample()
    time = batch["pixels"][..., 0, 0, 0].int()
    jump = time.diff(dim=1) != 1
    assert bool(jump.any()) and bool(batch["is_first"][:, 0].all())
    assert bool((batch["is_first"][:, 1:, 0] | ~jump).all())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (steps(9).exclude("action"), "the data lack action"),
        (steps(9).exclude(("next", "reward")), r"the data lack \('next', 'reward'\)"),
        (("pixels", torch.zeros(9, 3, 4, 4)), r"pixels must be uint8 .* got torch.float32"),
        (("pixels", torch.zeros(9, 4, 4, 3, dtype=torch.uint8)), r"got .* \[4, 4, 3\]"),
        (("action", torch.zeros(9, 2).int()), "action must be floating point"),
        (("action", torch.full((9, 2), torch.nan)), "action is NaN .* step 0 of env"),
        ((("next", "reward"), torch.full((9, 1), torch.inf)), "reward.* is NaN or infinite"),
        (("action", torch.zeros(9, 5)), r"action has shape \[5\] per step; .* \[2\]"),
    ],
)
def test_bad_data_are_refused_and_nothing_is_lost(tmp_path, data, message) -> None:
    replay = opened(tmp_path)
    replay.extend(steps(9, base=10))
    with pytest.raises(ValueError, match=message):
        replay.extend(steps(9).set(*data) if isinstance(data, tuple) else data)
    assert replay.num_episodes == 1
    expect(replay.episode(0), 9, base=10)


def test_too_few_frames_are_named(tmp_path) -> None:
    replay = opened(tmp_path, window=50)
    with pytest.raises(RuntimeError, match=r"no finished episode of 50 frames yet \(0 episodes"):
        replay.sample()
    replay.extend(steps(20))
    assert replay.num_eligible == 0
    with pytest.raises(RuntimeError, match=r"\(1 episodes, longest 21 frames, 0 unfinished\)"):
        replay.sample()


def test_another_capacity_or_a_foreign_folder_is_refused(tmp_path) -> None:
    replay = opened(tmp_path)
    replay.extend(steps(9))
    with pytest.raises(StoreError, match="another process is writing"):
        opened(tmp_path)
    replay.close()
    with pytest.raises(ValueError, match="begun with info.capacity=60, not 80"):
        opened(tmp_path, capacity=80)
    with pytest.raises(ValueError, match="less than one window"):
        opened(tmp_path, capacity=3)
    (tmp_path / "x" / "r").mkdir(parents=True)
    (tmp_path / "x" / "r" / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="holds no replay"):
        opened(tmp_path / "x")


def test_a_full_disk_is_an_error_and_no_crash(tmp_path, monkeypatch) -> None:
    replay = opened(tmp_path)
    replay.extend(steps(9, base=10))

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("prelar_trl.data.shards.OpenShard._write", full)
    with pytest.raises(OSError, match="no space left .* 1 clips are safe"):
        replay.extend(steps(9, base=50))
    expect(replay.episode(0), 9, base=10)


def test_a_finished_replay_is_a_store_of_clips(tmp_path) -> None:
    replay = opened(tmp_path)
    replay.extend(steps(9, base=10))
    replay.close()
    batch = VideoClips(replay.path, clip_len=4, batch_size=8).sample_with_actions()
    time = batch["pixels"][..., 0, 0, 0].float()
    assert torch.equal(batch["action"][..., 0], (time - 1) * (time != 10))
    assert replay.path.joinpath("store.json").read_text().count("sha256") == 1


def first_frames(replay: EpisodeReplay) -> list[int]:
    return [int(replay.episode(i)["pixels"][0, 0, 0, 0]) for i in range(replay.num_episodes)]


def test_a_full_ring_goes_back_to_each_of_the_last_states(tmp_path) -> None:
    replay = opened(tmp_path, capacity=40)  # four episodes
    for number in range(6):
        replay.extend(steps(9, base=20 * number))
    states = []
    for number in range(6, 12):
        state = replay.state_dict()
        replay.hold(state, 3)
        states.append((state, first_frames(replay)))
        for each in (0, 100):
            replay.extend(steps(9, base=10 * number + each))
    for state, frames in reversed(states[-3:]):
        replay.load_state_dict(state)
        assert len(frames) == 4 and first_frames(replay) == frames
    size = sum(file.stat().st_size for file in (replay.path / "pixels").iterdir())
    assert size / (3 * 4 * 4) <= 40 + 3 * 20 + 20


def test_a_dropped_episode_is_forgotten_and_the_next_one_whole(tmp_path) -> None:
    replay = opened(tmp_path)
    replay.extend(steps(5, base=10, done=False))
    lost = steps(2, base=15)
    lost["next", "dropped"] = lost["next", "done"].clone()
    assert finished(replay, lost) == 0
    assert finished(replay, steps(6, base=90)) == 1
    expect(replay.episode(0), 6, base=90)
