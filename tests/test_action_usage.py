"""The guard against unused latent actions: two metrics, one warning, and no trace in training."""

from __future__ import annotations

import itertools

import pytest
import torch

from prelar_trl import probes
from prelar_trl.recipes import pretrain as pretrain_recipe
from prelar_trl.recipes.pretrain import UsageGuard, pretrain
from tests.tiny import batch, tiny_world_model
from tests.toy_runs import checkpoint, different, pretrain_config, rows

NAMES = {"action_usage", "action_psnr_gap"}


def test_usage_is_counted_from_chance_and_the_gap_over_predicted_frames(monkeypatch) -> None:
    explained = torch.tensor([True, True, True, False, False])
    monkeypatch.setattr(probes, "action_effects", lambda *_: {"explained": explained})
    curves = {"own_actions": torch.tensor([[9.0, 20.0, 22.0]])}
    curves["other_actions"] = torch.tensor([[1.0, 19.0, 21.0]])
    monkeypatch.setattr(probes, "openloop_quality", lambda *_: {"psnr": curves})
    found = probes.action_usage(tiny_world_model(), batch(), context=1)
    assert found == {
        "action_usage": pytest.approx((0.6 - 0.2) / 0.8),
        "action_psnr_gap": pytest.approx(1.0),
    }


def test_dynamics_that_cannot_see_the_actions_have_no_use_and_no_gap() -> None:
    model = tiny_world_model(images="cnn", sample=False).eval()
    model.rssm.input_layer.weight.data[:, -4:] = 0  # stoch and action in, the action last
    found = probes.action_usage(model, batch(6, 5), context=2)
    assert found["action_usage"] <= 0 and found["action_psnr_gap"] == 0


def test_both_are_logged_and_looking_leaves_no_trace(clips, tmp_path) -> None:
    pretrain(pretrain_config(clips, tmp_path / "often", usage_every=1))
    pretrain(pretrain_config(clips, tmp_path / "rarely", usage_every=1_000))
    often, rarely = (rows(tmp_path / name) for name in ("often", "rarely"))
    assert rarely[0].keys() == often[0].keys() >= NAMES
    for table, steps in ((often, {"1", "2", "3"}), (rarely, {"3"})):  # the last one always
        for name in NAMES:
            assert {row["step"] for row in table if row[name]} == steps
    first, second = (checkpoint(tmp_path / name) for name in ("often", "rarely"))
    assert different(first, second) == []


def test_methods_without_latent_actions_are_not_looked_at(clips, tmp_path) -> None:
    pretrain(pretrain_config(clips, tmp_path / "a", method="apv", usage_every=1, log_every=2))
    assert not NAMES & rows(tmp_path / "a")[0].keys()


def guard(
    monkeypatch, *usages: float, updates: int = 100, warmup: int | None = None, clips: int = 50
) -> UsageGuard:
    """Sees the usages one after the other, and then the last one again and again."""
    seen = itertools.chain(usages, itertools.repeat(usages[-1]))

    def look(*_) -> dict[str, float]:
        return {"action_usage": next(seen), "action_psnr_gap": 0.1}

    monkeypatch.setattr(pretrain_recipe, "action_usage", look)
    loss = {"latent_warmup": warmup}
    cfg = pretrain_config("none", "none", updates=updates, loss=loss)
    return UsageGuard(cfg, tiny_world_model(images="cnn"), batch(), clips)


@pytest.mark.parametrize(("warmup", "first"), [(None, 15), (50, 55)])
def test_one_warning_once_the_warm_up_is_over(monkeypatch, capsys, warmup, first) -> None:
    look = guard(monkeypatch, 0.05, warmup=warmup)
    said = {}
    for step in range(5, 101, 5):
        look(step)
        said[step] = capsys.readouterr().err
    assert [step for step, text in said.items() if text] == [first]
    line = said[first].strip()
    assert line.startswith(f"warning: after {first} updates") and "\n" not in line
    assert "action_usage 0.05" in line and "loss.weights.latent_kl" in line
    assert "method=prelar_plus" in line
    assert look.latest == {"usage": 0.05}  # on the progress bar


def test_no_warning_where_the_actions_are_used(monkeypatch, capsys) -> None:
    look = guard(monkeypatch, 0.3)
    assert [look(step)["action_usage"] for step in (10, 50, 100)] == [0.3] * 3
    assert capsys.readouterr().err == ""


def test_one_low_look_is_noise_unless_it_is_the_last(monkeypatch, capsys) -> None:
    look = guard(monkeypatch, 0.05, 0.3, 0.05, 0.3, 0.05)
    for step in (20, 40, 60, 80):
        look(step)
        assert capsys.readouterr().err == ""
    look(100)
    assert capsys.readouterr().err.startswith("warning: after 100 updates")


def test_no_warning_where_few_clips_are_exchanged_for_themselves(monkeypatch, capsys) -> None:
    look = guard(monkeypatch, 0.0, clips=2)
    assert [look(step)["action_usage"] for step in (50, 100)] == [0.0, 0.0]
    assert capsys.readouterr().err == ""
