"""Runs over damaged folders, kept checkpoints, and two runs at once."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import pytest
import torch

from prelar_trl.checkpoint import load_checkpoint
from prelar_trl.recipes.evaluate import evaluate, main
from prelar_trl.recipes.finetune import finetune
from prelar_trl.recipes.interaction import Evaluation
from prelar_trl.recipes.pretrain import pretrain
from prelar_trl.recipes.schema import EvaluateConfig
from prelar_trl.record import RunFolder
from tests.files import flip
from tests.toy_runs import (
    checkpoint,
    copy_run,
    different,
    finetune_config,
    pretrain_config,
)


@pytest.fixture(scope="module")
def made(clips, tmp_path_factory):
    """A clip store, and runs of pre-training and fine-tuning with several checkpoints."""
    folder = tmp_path_factory.mktemp("made")
    pretrain(pretrain_config(clips, folder / "pre", updates=4))
    finetune(finetune_config(folder / "fine", eval_episodes=0))
    return SimpleNamespace(clips=clips, pre=folder / "pre", fine=folder / "fine")


def steps(run):
    files = sorted((run / "checkpoints").iterdir())
    return {file.name: load_checkpoint(file)["step"] for file in files}


def test_two_checkpoints_are_kept(made):
    assert steps(made.pre) == {"last.pt": 4, "last_1.pt": 3}
    assert steps(made.fine) == {"last.pt": 60, "last_1.pt": 40}


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(made, tmp_path, caplog):
    run = copy_run(made.pre, tmp_path / "pre")
    flip(run / "checkpoints" / "last.pt")
    with caplog.at_level(logging.WARNING):
        pretrain(pretrain_config(made.clips, run, updates=4, resume=True))
    assert "last.pt cannot be read" in caplog.text and "taking" in caplog.text
    assert not different(checkpoint(run), checkpoint(made.pre))  # it did the last update again
    assert (run / "metrics.csv").read_text() == (made.pre / "metrics.csv").read_text()


def test_fine_tuning_goes_on_over_a_damaged_checkpoint_replay_and_metrics(made, tmp_path, caplog):
    run = copy_run(made.fine, tmp_path / "fine")
    flip(run / "checkpoints" / "last.pt")
    journal = run / "replay" / "clips" / "000000.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:3]) + lines[3][:20])  # torn: the checkpoint knows four
    with open(run / "metrics.csv", "ab") as file:
        file.write(b"\0" * 300 + b"\n")
    with caplog.at_level(logging.WARNING):
        finetune(finetune_config(run, eval_episodes=0, resume=True))
    for text in (
        "last_1.pt, the one before it",
        "ends at episode 3, the checkpoint at 4",
        "damaged",
    ):
        assert text in caplog.text
    assert checkpoint(run)["step"] == 60
    assert "\0" not in (run / "metrics.csv").read_text()


def test_every_so_many_steps_a_checkpoint_stays(made, tmp_path):
    pretrain(pretrain_config(made.clips, tmp_path / "a", updates=5, keep=1, keep_every=2))
    assert steps(tmp_path / "a") == {"last.pt": 5, "step_00000002.pt": 2, "step_00000004.pt": 4}


def test_the_best_evaluated_agent_is_kept_and_can_be_evaluated(tmp_path, monkeypatch):
    run = tmp_path / "a"
    scores = {20: [0.0, 1.0], 40: [0.5, 3.0], 60: [0.5, 2.0]}
    real = Evaluation.__call__

    def call(self, logger, step):
        real(self, logger, step)
        return scores[step]

    monkeypatch.setattr(Evaluation, "__call__", call)
    finetune(finetune_config(run, eval_every=20))
    assert steps(run) == {"best.pt": 40, "last.pt": 60, "last_1.pt": 40}
    assert checkpoint(run)["best"] == [0.5, 3.0]
    result = evaluate(EvaluateConfig(run=str(run), episodes=1, device="cpu", checkpoint="best"))
    assert result["step"] == 40
    scores[80] = [0.5, 2.5]
    finetune(finetune_config(run, eval_every=20, env_steps=80, resume=True))
    assert steps(run)["best.pt"] == 40


def test_a_checkpoint_that_stays_can_be_evaluated_by_its_step(made, tmp_path, capsys):
    run = copy_run(made.fine, tmp_path / "fine")
    (run / "checkpoints" / "last_1.pt").rename(run / "checkpoints" / "step_00000040.pt")
    cfg = EvaluateConfig(run=str(run), episodes=1, device="cpu", video_episodes=0)
    for name in ("step_40", "step_00000040"):
        cfg.checkpoint = name
        main(cfg)
        assert json.loads((run / "evaluation.json").read_text())["step"] == 40
    assert not (run / "videos" / "evaluation.mp4").exists()
    assert "evaluation.mp4" not in capsys.readouterr().out


@pytest.mark.parametrize("phase", ["pre", "fine"])
def test_a_second_run_in_a_folder_is_refused_and_changes_nothing(phase, made, tmp_path):
    run = copy_run(getattr(made, phase), tmp_path / phase)
    before = {x: x.stat().st_mtime_ns for x in run.rglob("*")}
    first = RunFolder.load(run)
    first.lock()
    with first, pytest.raises(OSError, match="another process is writing to run folder"):
        if phase == "pre":
            pretrain(pretrain_config(made.clips, run, updates=5, resume=True))
        else:
            finetune(finetune_config(run, env_steps=80, eval_episodes=0, resume=True))
    assert {x: x.stat().st_mtime_ns for x in run.rglob("*")} == before


def test_a_run_unlocks_its_folder_when_it_ends_or_fails(made, tmp_path, monkeypatch):
    run = copy_run(made.pre, tmp_path / "pre")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
        with pytest.raises(OSError, match="was not written"):
            pretrain(pretrain_config(made.clips, run, updates=5, resume=True))
    pretrain(pretrain_config(made.clips, run, updates=5, resume=True))
    RunFolder.load(run).lock()
