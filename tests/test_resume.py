"""A run that was stopped or killed goes on as if nothing had happened."""

from __future__ import annotations

import pytest

from prelar_trl.recipes.finetune import finetune
from tests.toy_runs import checkpoint, different, finetune_config, interrupt_after

# Episodes of 13 steps: none ends where an update, a checkpoint or an evaluation is due.
STEPS = {"max_steps": 13, "prefill": 15, "pretrain_updates": 3, "train_every": 4}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing has stopped."""
    run = tmp_path_factory.mktemp("whole") / "run"
    finetune(finetune_config(run, **STEPS))
    return run


def same(run, other):
    assert different(checkpoint(run), checkpoint(other)) == []
    assert (run / "metrics.csv").read_text() == (other / "metrics.csv").read_text()


@pytest.mark.parametrize("update", [1, 2, 5, 9])
def test_interrupted_finetuning_goes_on_bit_for_bit(update, whole, tmp_path, monkeypatch):
    cfg = finetune_config(tmp_path / "run", **STEPS)
    with monkeypatch.context() as patch:
        interrupt_after(patch, update)
        with pytest.raises(SystemExit, match="stopped after .* steps"):
            finetune(cfg)
    assert checkpoint(tmp_path / "run")["model_update"]["count"] == update
    cfg.resume = True
    finetune(cfg)
    same(tmp_path / "run", whole)
