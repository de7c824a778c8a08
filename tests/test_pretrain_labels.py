"""Pre-training with the true actions of a few clips."""

from __future__ import annotations

import pytest
import torch

from prelar_trl.data import ClipWriter
from prelar_trl.recipes.pretrain import pretrain
from tests.toy_runs import (
    PRETRAIN_ARGS,
    checkpoint,
    different,
    interrupt_after,
    pretrain_config,
    rows,
)


def test_labels_add_a_loss_and_training_with_them_continues_bit_for_bit(
    clips, tmp_path, monkeypatch
) -> None:
    def config(name: str):
        options = {"labels": 0.5, "usage_every": 100, "model": {"images": "cnn"}, "prefetch": 2}
        return pretrain_config(clips, tmp_path / name, **options)

    pretrain(config("whole"))
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        with pytest.raises(SystemExit):
            pretrain(config("continued"))
    cfg = config("continued")
    cfg.resume = True
    pretrain(cfg)
    whole, continued = (checkpoint(tmp_path / name) for name in ("whole", "continued"))
    assert different(whole, continued) == []
    assert {"label_head.weight", "label_head.bias", "calls"} <= whole["update"]["loss"].keys()
    losses = [float(row["loss_action_label"]) for row in rows(tmp_path / "whole") if row["loss"]]
    assert len(losses) == 3 and all(x > 0 for x in losses)


def test_impossible_labels_are_one_line(clips, tmp_path, fails) -> None:
    def line(data, *arguments) -> str:
        start = [f"data={data}", f"run={tmp_path / 'new'}", *PRETRAIN_ARGS, "updates=1"]
        found = fails("pretrain", *start, *arguments)
        assert not (tmp_path / "new").exists()
        return found

    with ClipWriter(tmp_path / "bare", source="test", height=64, width=64) as writer:
        for i in range(4):
            writer.add(torch.zeros(9, 3, 64, 64, dtype=torch.uint8), None, name=str(i))
    found = line(tmp_path / "bare", "labels=0.5")
    assert "bare" in found and "holds no actions for labels" in found
    assert "there are 4 clips to label" in line(clips, "labels=5")  # one of five is held out
    found = line(clips, "loss.weights={action_label: 1}")
    assert "labels=0" in found and "labels=<share or number>" in found
    found = line(clips, "labels=2", "method=apv")
    assert "method=apv has no latent actions" in found and "action_label" in found
