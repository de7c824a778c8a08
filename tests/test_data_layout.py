"""The shift from TorchRL's layout to that of the losses."""

from __future__ import annotations

import pytest
import torch

from prelar_trl.data import EpisodeReplay, to_frames
from tests.test_replay import steps


def test_frames_are_those_that_the_replay_stores(tmp_path) -> None:
    data = steps(4)
    replay = EpisodeReplay(tmp_path / "r", window=2, batch_size=1, capacity=50)
    replay.extend(data)
    frames, stored = to_frames(data), replay.episode(0)
    assert frames.shape == (5,) and len(stored) == 5
    for key in ("pixels", "action", "reward", "terminated"):
        assert torch.equal(frames[key], stored[key]), key
    assert frames["is_first"].flatten().tolist() == [True] + [False] * 4


def test_each_row_of_a_batch_is_shifted_by_itself() -> None:
    data = torch.stack([steps(4, base=10 * row) for row in range(3)])
    before = data.clone()
    frames = to_frames(data)
    assert frames.shape == (3, 5)
    for row in range(3):
        assert (frames[row] == to_frames(data[row])).all()
    assert torch.equal(frames["action"][:, 1:], data["action"])
    assert frames["action"][:, 0].eq(0).all() and frames["reward"][:, 0].eq(0).all()
    assert (data == before).all()


def test_an_end_within_the_steps_is_refused() -> None:
    data = steps(4)
    data["next", "done"][1] = True
    with pytest.raises(ValueError, match="cut them after each done"):
        to_frames(data)
