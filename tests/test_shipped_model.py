"""The pre-trained world model that lies in the repository."""

from __future__ import annotations

import pytest
import torch

from prelar_trl.data import VideoClips
from prelar_trl.hub import load_pretrained
from prelar_trl.probes import action_usage
from prelar_trl.recipes.collect_videos import collect
from prelar_trl.recipes.finetune import finetune
from prelar_trl.recipes.schema import CollectVideosConfig, FinetuneConfig
from tests.toy_runs import ROOT

MODEL = ROOT / "models" / "toy_prelar_plus"


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    store = tmp_path_factory.mktemp("toy") / "videos"
    settings = {"episodes": 16, "random_fraction": 0.5, "noise": 0.5, "max_steps": 12}
    collect(CollectVideosConfig(data=str(store), env="toy", seed=7, after_success=None, **settings))
    return store


def test_its_dynamics_uses_the_latent_actions(videos) -> None:
    torch.manual_seed(0)
    batch = VideoClips(videos, clip_len=12, batch_size=16, seed=0).sample()
    usage = action_usage(load_pretrained(MODEL).eval(), batch, context=5)
    assert usage["action_usage"] > 0.4 and usage["action_psnr_gap"] > 1.0


def test_fine_tuning_starts_from_it(tmp_path) -> None:
    options = {"method": "prelar_plus", "size": "mini", "env": "toy", "max_steps": 10}
    lengths = {"env_steps": 40, "prefill": 20, "pretrain_updates": 1, "batch_size": 2}
    lengths |= {"batch_length": 6, "align_updates": 1, "eval_episodes": 0}
    finetune(FinetuneConfig(pretrained=str(MODEL), run=str(tmp_path / "run"), **options, **lengths))
    assert (tmp_path / "run" / "checkpoints" / "last.pt").is_file()
