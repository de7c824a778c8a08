from __future__ import annotations

from collections import Counter

import pytest
import torch

from prelar_trl.data import WindowSampler

LENGTHS = torch.tensor([5, 9, 3, 20])  # the third is too short for a window of 4
ROWS = 20_000


def sampler(strategy: str, length: int = 4, **options: int) -> WindowSampler:
    made = WindowSampler(length, strategy=strategy, **options)
    made.set_episodes(LENGTHS)
    return made


def assert_close_to(counts: Counter, expected: dict) -> None:
    """Every frequency within five standard deviations, nothing unexpected."""
    assert set(counts) == {key for key, p in expected.items() if p > 0}
    for key, p in expected.items():
        deviation = (ROWS * p * (1 - p)) ** 0.5
        assert abs(counts[key] - ROWS * p) <= 5 * deviation, (key, counts[key], ROWS * p)


def draw(strategy: str, **options: int) -> list[tuple[int, int]]:
    windows = sampler(strategy, **options).draw(ROWS)
    return list(zip(windows.episode.tolist(), windows.start.tolist(), strict=True))


def first_in_rows(made: WindowSampler) -> tuple[torch.Tensor, ...]:
    """Episode, start and frames of the first window of each row, which no end of a row cuts."""
    windows = made.draw(ROWS)
    first = windows.offset % made.length == 0
    return windows.episode[first], windows.start[first], windows.frames[first]


@pytest.mark.parametrize("strategy", ["episodes", "frames"])
def test_episodes_are_drawn_alike_or_windows_are(strategy: str) -> None:
    number = {0: 2, 1: 6, 3: 17}  # of starts
    chance = {e: 1 / 3 / n if strategy == "episodes" else 1 / 25 for e, n in number.items()}
    expected = {(e, s): chance[e] for e, n in number.items() for s in range(n)}
    assert_close_to(Counter(draw(strategy)), expected)


def test_prioritize_ends_folds_the_last_starts_onto_the_end() -> None:
    # each episode's last start has the mass of the 4 (the window's length) behind it too
    expected = {}
    for episode, starts in ((0, 2), (1, 6), (3, 17)):
        for start in range(starts):
            expected[episode, start] = (5 if start == starts - 1 else 1) / (starts + 4) / 3
    assert_close_to(Counter(draw("prioritize_ends")), expected)


def test_prioritize_ends_lengths_lie_above_length_minus_minlen() -> None:
    made = WindowSampler(8, strategy="prioritize_ends", min_length=3)
    made.set_episodes(torch.tensor([30]))
    _, start, frames = first_in_rows(made)
    assert_close_to(Counter(frames.tolist()), dict.fromkeys((6, 7, 8), 1 / 3))  # 8 - {0, 1, 2}
    assert int((start + frames).max()) == 30


def test_rows_are_filled_by_several_windows_without_a_gap() -> None:
    made = sampler("prioritize_ends", length=10, min_length=3)
    windows = made.draw(50)
    ends = windows.offset + windows.frames
    assert windows.offset[0] == 0 and ends[-1] == 500
    assert torch.equal(windows.offset[1:], ends[:-1])
    assert set(range(0, 500, 10)) <= set(windows.offset.tolist())
    assert bool((windows.start + windows.frames <= LENGTHS[windows.episode]).all())
    assert len(windows.offset) > 50


def test_packing_takes_short_episodes_whole_and_draws_long_ones_as_before() -> None:
    made = WindowSampler(8, strategy="prioritize_ends", pack=True)
    made.set_episodes(torch.tensor([5, 1, 3, 20]))
    assert made.num_eligible == 3  # one frame holds no step
    episode, start, frames = first_in_rows(made)
    assert_close_to(Counter(episode.tolist()), {0: 1 / 3, 2: 1 / 3, 3: 1 / 3})
    for number, length in ((0, 5), (2, 3), (3, 8)):
        assert bool((frames[episode == number] == length).all())
    assert bool((start[episode != 3] == 0).all())
    windows = made.draw(50)
    ends = windows.offset + windows.frames
    assert windows.offset[0] == 0 and ends[-1] == 400
    assert torch.equal(windows.offset[1:], ends[:-1])
    packed, plain = (
        WindowSampler(8, strategy="prioritize_ends", pack=x, seed=1) for x in (True, False)
    )
    for each in (packed, plain):
        each.set_episodes(torch.tensor([8, 20]))
    assert torch.equal(packed.draw(99).start, plain.draw(99).start)


@pytest.mark.parametrize("strategy", ["episodes", "frames", "epoch", "prioritize_ends"])
def test_windows_never_leave_their_episode(strategy: str) -> None:
    windows = sampler(strategy).draw(2000)
    assert bool((windows.start >= 0).all())
    assert bool((windows.start + windows.frames <= LENGTHS[windows.episode]).all())
    assert 2 not in windows.episode


def test_epoch_law_takes_every_episode_once_before_any_twice() -> None:
    made = WindowSampler(4, strategy="epoch", seed=3)
    made.set_episodes(torch.full((10,), 6))
    orders = [made.draw(10).episode.tolist() for _ in range(3)]
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert orders[0] != orders[1]


@pytest.mark.parametrize("loaded", [False, True])
def test_an_epoch_begins_anew_where_a_ring_holds_other_episodes(loaded: bool) -> None:
    ring = torch.tensor([9, 4, 8, 5, 7, 6, 9, 4, 8, 5, 7, 6])
    starts = ring.cumsum(0) - ring
    made = WindowSampler(4, strategy="epoch")
    made.set_episodes(ring[:10], starts=starts[:10])
    made.draw(3)
    state = made.state_dict()
    made.set_episodes(ring[1:11], starts=starts[1:11])  # the oldest is forgotten, one has come
    if loaded:
        made.load_state_dict(state)
    windows = made.draw(10)
    assert sorted(windows.episode.tolist()) == list(range(10))
    assert bool((windows.start >= 0).all())
    assert bool((windows.start + 4 <= ring[1:11][windows.episode]).all())


def test_an_epoch_goes_on_where_episodes_come_and_go_that_are_never_drawn() -> None:
    ring = torch.tensor([3, 9, 4, 8, 5, 7, 2])
    starts = ring.cumsum(0) - ring
    made = WindowSampler(4, strategy="epoch")
    made.set_episodes(ring[:6], starts=starts[:6])
    drawn = made.draw(2).episode.tolist()
    made.set_episodes(ring[1:], starts=starts[1:])
    drawn += (made.draw(3).episode + 1).tolist()
    assert sorted(drawn) == [1, 2, 3, 4, 5]


def test_group_weights_decide_how_often_a_group_is_drawn() -> None:
    made = WindowSampler(4, strategy="frames")
    groups = torch.tensor([0, 0, 1, 1])
    made.set_episodes(LENGTHS, groups=groups, group_weights=torch.tensor([3.0, 1.0]))
    counts = Counter(made.draw(ROWS).episode.tolist())
    assert_close_to(counts, {0: 0.75 * 2 / 8, 1: 0.75 * 6 / 8, 3: 0.25})


@pytest.mark.parametrize("strategy", ["episodes", "frames", "epoch", "prioritize_ends"])
def test_same_seed_same_draws_and_state_continues_mid_epoch(strategy: str, tmp_path) -> None:
    def assert_same(first: WindowSampler, second: WindowSampler, draws: int) -> None:
        for _ in range(draws):
            a, b = first.draw(2), second.draw(2)
            assert torch.equal(a.episode, b.episode) and torch.equal(a.start, b.start)

    one = sampler(strategy, seed=5)
    assert_same(one, sampler(strategy, seed=5), 4)
    resumed = sampler(strategy, seed=99)
    resumed.load_state_dict(one.state_dict())
    assert_same(one, resumed, 7)
    one.dumps(tmp_path)  # survives a file
    other = sampler(strategy, seed=2)
    other.loads(tmp_path)
    assert_same(one, other, 5)


@pytest.mark.parametrize("strategy", ["episodes", "epoch", "prioritize_ends"])
def test_processes_read_disjoint_rows_of_one_stream(strategy: str) -> None:
    whole = sampler(strategy, seed=4).draw(12)
    for rank in range(3):
        share = sampler(strategy, seed=4, rank=rank, world_size=3).draw(4)
        assert torch.equal(share.episode, whole.episode[rank::3])
        assert torch.equal(share.start, whole.start[rank::3])
        assert torch.equal(share.offset, torch.arange(4) * 4)


def test_processes_share_rows_of_several_windows_too() -> None:
    options = {"length": 10, "min_length": 3, "seed": 4}
    whole = sampler("prioritize_ends", **options).draw(6)
    share = sampler("prioritize_ends", rank=1, world_size=2, **options).draw(3)
    own = (whole.offset // 10) % 2 == 1
    assert torch.equal(share.start, whole.start[own])
    assert int(share.frames.sum()) == 30


def test_sample_wraps_around_the_ring() -> None:
    made = WindowSampler(4)
    made.set_episodes(torch.tensor([4]), starts=torch.tensor([18]), capacity=20)
    index, info = made.sample(None, 8)
    assert index.tolist() == [18, 19, 0, 1] * 2
    assert info["is_first"].squeeze(-1).tolist() == [True, False, False, False] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 4, "strategy": "weird"}, "strategy='weird' is unknown"),
        ({"length": 0}, "window length 0"),
        ({"length": 4, "min_length": 2}, "belong to prioritize_ends"),
        ({"length": 4, "pack": True}, "belong to prioritize_ends"),
        ({"length": 4, "strategy": "prioritize_ends", "min_length": 9}, "min_length=9"),
        ({"length": 4, "rank": 2, "world_size": 2}, "rank=2"),
    ],
)
def test_impossible_settings_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WindowSampler(**options)


def test_no_episode_long_enough_says_the_longest() -> None:
    made = WindowSampler(50)
    made.set_episodes(LENGTHS)
    with pytest.raises(RuntimeError, match="50 frames: 4 episodes, longest 20"):
        made.draw(1)


def test_a_group_without_a_long_enough_episode_is_never_drawn_however_heavy() -> None:
    sampler = WindowSampler(8)
    lengths, groups = torch.tensor([3, 4, 9]), torch.tensor([0, 0, 1])
    for weights in ([1e30, 1.0], [1e30, 0.0]):
        sampler.set_episodes(lengths, groups=groups, group_weights=torch.tensor(weights).double())
        assert sampler.num_eligible == (weights[1] > 0)
    with pytest.raises(RuntimeError, match="no episode has 8 frames"):
        sampler.draw(4)
