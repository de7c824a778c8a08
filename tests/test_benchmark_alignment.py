"""benchmarks/alignment.py: what alignment explains, on known episodes and on those of a run."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from benchmarks import alignment
from prelar_trl.recipes.finetune import finetune
from prelar_trl.recipes.pretrain import pretrain
from tests.toy_runs import finetune_config, pretrain_config


class Times(nn.Module):
    """An action encoder that multiplies."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, action: Tensor, sample: bool, is_first: Tensor) -> tuple[Tensor, None]:
        assert not sample and is_first[:, 0].all() and not is_first[:, 1:].any()
        return self.factor * action, None


@pytest.mark.parametrize(("factor", "share"), [(2.0, 1.0), (0.0, 0.0), (1.0, 0.75)])
def test_r2_is_the_explained_share_of_the_variance_around_the_given_mean(factor, share) -> None:
    actions = torch.randn(1, 9, 3)
    latent = 2 * actions
    latent[:, 0] = 1e3  # nothing led to a first frame
    found = alignment.r2(Times(factor), [(actions, latent)] * 2, torch.zeros(3))
    assert found == pytest.approx(share, abs=1e-6)


def test_windows_keep_actions_and_latent_actions_together() -> None:
    episodes = [(x, 10 * x) for x in (torch.arange(7.0)[None, :, None], torch.ones(1, 5, 1))]
    actions, latents = alignment.windows(episodes, 20, 5)
    assert actions.shape == latents.shape == (20, 5, 1) and latents.equal(10 * actions)
    assert {float(row[0]) for row in actions} == {0.0, 1.0, 2.0}


def test_a_runs_alignment_is_repeated_on_four_fifths_of_its_prefill(
    clips, tmp_path, monkeypatch, capsys
) -> None:
    video, run, scratch = (tmp_path / name for name in ("video", "run", "scratch"))
    method = {"method": "prelar_plus"}
    pretrain(pretrain_config(clips, video, updates=1, **method))
    steps = {**method, "eval_episodes": 0, "align_updates": 1}
    finetune(finetune_config(run, pretrained=str(video), prefill=60, env_steps=70, **steps))
    monkeypatch.setattr("sys.argv", ["alignment.py", str(run), "--updates", "2"])
    alignment.main()
    lines = capsys.readouterr().out.splitlines()[-2:]
    for line, part in zip(lines, ("learned from", "held out"), strict=True):
        assert re.fullmatch(rf"episodes {part}: R² \S+ \((\S+ ){{4}}\S+\)", line)

    finetune(finetune_config(scratch, **{**steps, "align_updates": 0}))
    for folder, why in ((scratch, "trained from scratch"), (run, "2 random episodes")):
        monkeypatch.setattr("sys.argv", ["alignment.py", str(folder)])
        monkeypatch.setattr(alignment, "prefill", lambda *_: [()] * 2)
        with pytest.raises(SystemExit):
            alignment.main()
        assert why in capsys.readouterr().err
