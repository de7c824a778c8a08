"""A Meta-world run that was stopped within an episode goes on bit for bit."""

from __future__ import annotations

import torch
from torchrl.envs.utils import step_mdp

from prelar_trl.envs import make_env
from prelar_trl.envs.episodes import begin_episode, repeat_episode
from prelar_trl.recipes.finetune import finetune
from tests.test_resume import same, stopped
from tests.toy_runs import finetune_config

STEPS = {"env": "metaworld/drawer-open", "max_steps": 35, "prefill": 40, "env_steps": 80}


def test_an_episode_is_repeated_exactly_in_another_environment():
    first = make_env("metaworld/drawer-open", seed=0)
    for seed in (1, 2):  # nothing of an episode stays for the next
        now = begin_episode(first, seed)
        for _ in range(20):
            now = step_mdp(first.step(first.rand_action(now)))
    actions = torch.rand(60, 4) * 2 - 1
    now, frames = repeat_episode(first, 3, actions)
    again, other = repeat_episode(make_env("metaworld/drawer-open", seed=9), 3, actions)
    assert torch.equal(frames, other) and torch.equal(now["state"], again["state"])
    assert (frames[0] != frames[-1]).any()


def test_finetuning_goes_on_bit_for_bit(tmp_path, monkeypatch):
    finetune(finetune_config(tmp_path / "whole", **STEPS))
    cfg = finetune_config(tmp_path / "run", **STEPS)
    stopped(cfg, monkeypatch, 3)
    finetune(cfg)
    same(tmp_path / "run", tmp_path / "whole")
