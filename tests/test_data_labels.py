"""`VideoClips(labels=...)`: the true actions of a few clips, and of no other."""

from __future__ import annotations

import pytest
import torch

from prelar_trl.data import VideoClips
from tests.test_data_clips import write

LENGTHS = (7,) * 10


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Ten clips; frame t of clip c shows the number 20 c + t, and that is its action, twice."""
    return write(tmp_path_factory.mktemp("labels") / "s", LENGTHS)


def number(batch):
    return batch["pixels"][..., 0, 0, 0].int()  # [B, T]


def labeled_clips(clips: VideoClips, batches: int = 12) -> set[int]:
    """The clips whose actions are told, by what the batches hold."""
    seen = set()
    for _ in range(batches):
        batch = clips.sample()
        known = batch["labeled"].all(1).squeeze(-1)
        assert torch.equal(batch["labeled"].any(1).squeeze(-1), known)  # whole windows
        seen |= set((number(batch)[known, 0] // 20).tolist())
    return seen


@pytest.mark.parametrize(("labels", "count"), [(0.3, 3), (3, 3), (0.001, 1), (10, 10)])
def test_labels_are_a_share_or_a_number_of_clips(store, labels, count) -> None:
    clips = VideoClips(store, clip_len=4, batch_size=10, labels=labels)
    assert len(labeled_clips(clips)) == count
    assert clips.action_dim == 2
    assert clips.sample()["labeled"][: min(count, 3)].all()  # a row of every batch
    assert count < 10 or clips.sample()["labeled"].all()


def test_which_clips_are_labeled_depends_on_the_seed_alone(store) -> None:
    def chosen(seed: int, clip_len: int = 4) -> set[int]:
        return labeled_clips(VideoClips(store, clip_len, 10, seed=seed, labels=3))

    assert chosen(0) == chosen(0, clip_len=5)
    assert len({frozenset(chosen(seed)) for seed in range(4)}) > 1


def test_only_labeled_actions_appear_and_the_first_rows_have_them(store) -> None:
    clips = VideoClips(store, clip_len=4, batch_size=10, labels=3)
    others = 0
    for _ in range(10):
        batch = clips.sample()
        assert batch["action"].shape == (10, 4, 2) and batch["action"].dtype == torch.float32
        assert batch["labeled"].shape == (10, 4, 1) and batch["labeled"].dtype == torch.bool
        assert batch["labeled"][:3].all()
        true = number(batch).float().unsqueeze(-1).expand(-1, -1, 2)
        assert torch.equal(batch["action"], true * batch["labeled"])
        others += int((~batch["labeled"][3:]).sum())
    assert others > 0
    assert len(set((number(batch)[3:, 0] // 20).tolist())) > 3  # the rest: of all clips


@pytest.mark.parametrize("labels", [0.4, 10])
def test_a_mixture_follows_its_weights_in_labeled_rows_too(tmp_path, labels) -> None:
    one = write(tmp_path / "a", LENGTHS[:5])
    other = write(tmp_path / "b", LENGTHS, start=5)
    for weight in (9, 1):
        clips = VideoClips({one: weight, other: 10 - weight}, 4, 4000, labels=labels)
        batch = clips.sample()
        of_one = (number(batch)[:, 0] < 100).float()
        for rows in (slice(0, 1600), slice(1600, None)):
            assert abs(of_one[rows].mean() - weight / 10) < 0.04


def test_without_labels_nothing_changes(store) -> None:
    plain, probed = (VideoClips(store, clip_len=4, labels=n) for n in (0, 2))
    assert set(plain.sample().keys()) == {"pixels", "is_first"}
    assert "labeled" not in probed.sample_with_actions().keys()


@pytest.mark.parametrize("prefetch", [0, 2])
def test_draws_with_labels_continue_from_a_state(store, prefetch: int) -> None:
    clips, again = (
        VideoClips(store, clip_len=4, batch_size=6, labels=2, prefetch=prefetch) for _ in "ab"
    )
    for _ in range(3):
        clips.sample()
    again.load_state_dict(clips.state_dict())
    for _ in range(3):
        ours, theirs = clips.sample(), again.sample()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours.keys())


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (11, "labels=11: there are 10 clips to label"),
        (-0.1, "labels=-0.1"),
        (2.5, "labels=2.5 is neither a share below 1 nor a number of clips"),
    ],
)
def test_impossible_labels_are_named(store, labels, message) -> None:
    with pytest.raises(ValueError, match=message):
        VideoClips(store, clip_len=4, labels=labels)


def test_labels_need_a_store_with_actions_of_one_size(store, tmp_path) -> None:
    bare = write(tmp_path / "bare", actions=False)
    with pytest.raises(ValueError, match=r"clip store '.*bare' holds no actions for labels"):
        VideoClips([store, bare], clip_len=4, labels=0.5)
