"""A fine-tuning run's own replay as the video of a pre-training run."""

from __future__ import annotations

from pathlib import Path

import pytest

from prelar_trl.data import ClipStore, EpisodeReplay, StoreError
from prelar_trl.envs import make_env
from prelar_trl.recipes.finetune import finetune
from prelar_trl.recipes.pretrain import pretrain
from tests.toy_runs import checkpoint, finetune_config, pretrain_config


def test_a_run_is_pre_trained_on_what_another_has_seen(tmp_path: Path) -> None:
    finetune(finetune_config(tmp_path / "agent", method="dreamerv2", eval_episodes=0))
    assert len(ClipStore(tmp_path / "agent")) == 6
    weights = {"action_label": 1.0}  # its true actions are there to be told
    run = tmp_path / "video"
    pretrain(pretrain_config(tmp_path / "agent", run, labels=0.5, loss={"weights": weights}))
    assert checkpoint(run)["step"] == 3


def test_the_replay_of_a_run_that_has_not_ended_is_said_in_one_line(tmp_path: Path) -> None:
    replay = EpisodeReplay(tmp_path / "agent" / "replay", window=4)
    replay.extend(make_env("toy", max_steps=6).rollout(6))
    with pytest.raises(StoreError, match=r"unfinished: .*\(finetune, with resume=true\)"):
        ClipStore(tmp_path / "agent")
    replay.close()
    assert ClipStore(tmp_path / "agent").frames.tolist() == [7]
