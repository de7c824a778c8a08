"""NaN in a recipe: updates are skipped, then the run stops; what was saved before is kept."""

from __future__ import annotations

import pytest

from prelar_trl.checkpoint import load_checkpoint, set_rng_state
from prelar_trl.envs import ToyEnv, make_env
from prelar_trl.recipes.finetune import finetune
from prelar_trl.recipes.pretrain import pretrain
from prelar_trl.updates import WorldModelUpdate
from tests.toy_runs import (
    FINETUNE_ARGS,
    PRETRAIN_ARGS,
    checkpoint,
    finetune_config,
    pretrain_config,
    rows,
)


def spoil(monkeypatch, first, last=10**9):
    """The world model's image loss, and with it the gradient, is NaN in updates first to last."""
    real = WorldModelUpdate.losses

    def losses(self, *inputs):
        losses = real(self, *inputs)
        if first <= self.count + 1 <= last:
            losses["loss_image"] = losses["loss_image"] * float("nan")
        return losses

    monkeypatch.setattr(WorldModelUpdate, "losses", losses)


@pytest.mark.parametrize("log_every", [1, 100])
def test_divergence_in_pretraining_keeps_the_checkpoint_before(
    log_every, fails, clips, tmp_path, monkeypatch
):
    spoil(monkeypatch, 3)
    arguments = [f"data={clips}", f"run={tmp_path / 'a'}", *PRETRAIN_ARGS, "updates=4"]
    arguments += [f"log_every={log_every}", "checkpoint_every=2", "video_every=100"]
    arguments += ["max_skipped=1"]
    line = fails("pretrain", *arguments)
    assert "loss_image is nan" in line and "checkpoint saved before is kept" in line
    state = checkpoint(tmp_path / "a")
    assert state["step"] == 2
    assert all(x.isfinite().all() for x in state["model"].values() if x.is_floating_point())


def test_divergence_in_finetuning_keeps_the_checkpoint_before(fails, tmp_path, monkeypatch):
    spoil(monkeypatch, 3)
    arguments = [f"run={tmp_path / 'a'}", *FINETUNE_ARGS, "eval_episodes=0", "max_skipped=1"]
    line = fails("finetune", *arguments)
    assert "loss_image is nan" in line
    assert checkpoint(tmp_path / "a")["step"] == 20


def finite(state):
    return all(x.isfinite().all() for x in state.values() if x.is_floating_point())


def test_one_update_that_is_not_finite_is_skipped_counted_and_shown(
    clips, tmp_path, monkeypatch, capsys
):
    spoil(monkeypatch, 2, 3)
    run = tmp_path / "a"
    pretrain(pretrain_config(clips, run, updates=4, max_skipped=3))
    table = [row for row in rows(run) if row["skipped_updates"]]
    assert [float(row["skipped_updates"]) for row in table] == [0, 1, 2, 2]
    assert [row["loss_image"] == "nan" for row in table] == [False, True, True, False]
    assert "skipped 2" in capsys.readouterr().err
    state = checkpoint(run)
    assert state["step"] == 4 and state["update"]["skipped"] == 2 and finite(state["model"])
    assert not (run / "not_finite.pt").exists()
    pretrain(pretrain_config(clips, run, updates=5, max_skipped=3, resume=True))
    assert float(rows(run)[-1]["skipped_updates"] or 2) == 2


def test_too_many_in_a_row_leave_the_batch_and_the_random_state(clips, tmp_path, monkeypatch):
    spoil(monkeypatch, 2)
    run = tmp_path / "a"
    with pytest.raises(RuntimeError, match=r"loss_image is nan at step 3, and the last 2 updates"):
        pretrain(pretrain_config(clips, run, updates=9, max_skipped=2))
    assert finite(checkpoint(run)["model"])
    seen = load_checkpoint(run / "not_finite.pt")
    assert seen["step"] == 3 and seen["batches"][0]["pixels"].shape == (2, 6, 3, 64, 64)
    set_rng_state(seen["rng"])


def test_a_run_whose_last_update_was_skipped_fails(fails, clips, tmp_path, monkeypatch):
    spoil(monkeypatch, 4)
    arguments = [f"data={clips}", f"run={tmp_path / 'a'}", *PRETRAIN_ARGS, "updates=4"]
    assert "loss_image is nan at step 4" in fails("pretrain", *arguments)
    state = checkpoint(tmp_path / "a")
    assert state["step"] == 4 and finite(state["model"])


def test_fine_tuning_skips_too(tmp_path, monkeypatch):
    spoil(monkeypatch, 3, 3)
    finetune(finetune_config(tmp_path / "a", log_every=1))
    state = checkpoint(tmp_path / "a")
    # The states of a loss that is NaN are finite here: the behavior learns from them.
    assert state["model_update"]["skipped"] == 1 and state["behavior_update"]["skipped"] == 0
    assert finite(state["agent"])
    assert float(rows(tmp_path / "a")[-2]["skipped_updates"] or 1) == 1


class NaNReward(ToyEnv):
    """The toy, with a NaN reward in its 33rd step."""

    steps = 0

    def _step(self, tensordict):
        out = super()._step(tensordict)
        self.steps += 1
        if self.steps == 33:
            out["reward"] = out["reward"] * float("nan")
        return out


def test_nan_reward_stops_and_keeps_the_checkpoint_before(tmp_path):
    cfg = finetune_config(tmp_path / "a", eval_episodes=0)
    with pytest.raises(ValueError, match=r"reward.* is NaN or infinite"):
        finetune(cfg, env_factory=lambda name, **options: make_env(NaNReward, **options))
    assert checkpoint(tmp_path / "a")["step"] == 20
    cfg.resume = True
    finetune(cfg)  # with the toy itself
    assert checkpoint(tmp_path / "a")["step"] == 60
