"""The whole path on the toy environment, and what each recipe leaves in its run folder."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import yaml

from prelar_trl.config import METHODS
from prelar_trl.recipes.entry import start
from prelar_trl.recipes.evaluate import evaluate
from prelar_trl.recipes.finetune import finetune
from prelar_trl.recipes.pretrain import pretrain
from prelar_trl.recipes.schema import EvaluateConfig
from prelar_trl.record import read_video
from tests.toy_runs import (
    FINETUNE_ARGS,
    PRETRAIN_ARGS,
    ROOT,
    checkpoint,
    different,
    finetune_config,
    interrupt_after,
    make_clips,
    pretrain_config,
    rows,
    two_at_once,
)

PRETRAINED = [name for name, method in METHODS.items() if method.pretrain is not None]


@pytest.fixture(scope="module")
def path(clips, tmp_path_factory):
    """Everything once: pre-train, fine-tune, evaluate, report."""
    folder = tmp_path_factory.mktemp("path")
    pre, fine = folder / "pre", folder / "fine"
    pretrain(pretrain_config(clips, pre))
    finetune(finetune_config(fine, pretrained=str(pre)))
    result = evaluate(EvaluateConfig(run=str(fine), episodes=3, device="cpu", video_episodes=2))
    with pytest.MonkeyPatch.context() as patch:
        report = folder / "report.html"
        patch.setattr(sys, "argv", ["plot", f"runs=[{pre},{fine}]", f"out={report}"])
        start("plot")
    return SimpleNamespace(pre=pre, fine=fine, result=result, report=report)


def test_run_folders_hold_the_whole_configuration(path):
    config = yaml.safe_load((path.pre / "config.yaml").read_text())
    assert config["method"] == "prelar" and config["size"] == "tiny" and config["updates"] == 3
    assert config["lr"] == 3e-4 and config["model"]["depth"] == 4
    config = yaml.safe_load((path.fine / "config.yaml").read_text())
    assert config["pretrained"] == str(path.pre) and config["env_steps"] == 60


def test_run_folders_say_what_made_them(path):
    for run in (path.pre, path.fine):
        versions = json.loads((run / "versions.json").read_text())
        assert versions["packages"].keys() >= {"torch", "torchrl", "tensordict"}
        assert versions["seed"] == 0 and versions["command"]
        if versions["git"] is not None:  # the tests may run from an unpacked archive
            assert len(versions["git"]["commit"]) == 40
            assert isinstance(versions["git"]["dirty"], bool)


def test_pretraining_metrics_are_complete_and_finite(path):
    table = rows(path.pre)
    names = {"step", "loss", "loss_image", "loss_kl", "loss_latent_kl", "psnr_openloop"}
    names |= {"loss_action_state_consistency", "grad_norm_model", "psnr_seen"}
    assert names <= table[0].keys()
    assert sorted({int(row["step"]) for row in table}) == [1, 2, 3]
    assert all(math.isfinite(float(v)) for row in table for v in row.values() if v)
    assert sum(bool(row["psnr_openloop"]) for row in table) == 2  # the first and the last update


def test_finetuning_metrics_are_complete_and_finite(path):
    table = rows(path.fine)
    names = {"train/return", "train/success", "train/length", "eval/return", "eval/success"}
    names |= {"eval/success_low", "eval/success_high", "loss_image", "loss_reward", "loss_actor"}
    assert names | {"loss_critic", "grad_norm_actor", "grad_norm_pretrained"} <= table[0].keys()
    assert all(math.isfinite(float(v)) for row in table for v in row.values() if v)
    episodes = [row for row in table if row["train/return"]]
    assert [int(row["step"]) for row in episodes] == [10, 20, 30, 40, 50, 60]
    assert all(float(row["train/length"]) == 10 for row in episodes)
    assert [int(row["step"]) for row in table if row["eval/return"]] == [40, 60]


def test_finetuning_says_where_its_time_goes(path):
    start, *table = rows(path.fine, "times.csv")
    assert start["step"] == "0" and float(start["startup_s"]) > 0
    assert [int(row["step"]) for row in table] == [10, 20, 30, 40, 50, 60]
    shares = [{k: float(v) for k, v in row.items() if "time/" in k and v} for row in table]
    assert all(sum(share.values()) == pytest.approx(1) for share in shares)
    assert all(0 <= x <= 1 for share in shares for x in share.values())
    for row, share in zip(table, shares, strict=True):
        step = int(row["step"])
        assert {"time/env", "time/policy", "time/replay"} <= share.keys()
        assert ({"time/world_model", "time/behavior"} <= share.keys()) == (step >= 20)
        assert ("time/evaluation" in share) == (step in (40, 60))  # the last one at the end
        assert float(row["steps_per_s"]) == pytest.approx(10 / float(row["seconds"]))


def test_pretraining_leaves_predictions_to_look_at(path):
    videos = sorted(p.name for p in (path.pre / "videos").iterdir())
    assert videos == ["openloop_000001.mp4", "openloop_000003.mp4"]
    assert read_video(path.pre / "videos" / videos[0]).shape[0] == 6
    pictures = {p.name for p in (path.pre / "pictures").iterdir()}
    assert {"openloop_000001.png", "openloop_000003.png", "psnr_by_frame.png"} == pictures


def test_finetuning_leaves_episodes_to_look_at(path):
    videos = sorted(p.name for p in (path.fine / "videos").iterdir())
    assert videos == ["eval_000040.mp4", "eval_000060.mp4", "evaluation.mp4"]
    assert read_video(path.fine / "videos" / videos[0]).shape[0] == 11  # reset and ten steps


def test_evaluation_counts_its_episodes(path):
    written = json.loads((path.fine / "evaluation.json").read_text())
    assert written == path.result
    records = written["records"]
    assert written["episodes"] == len(records) == 3 and written["step"] == 60
    assert written["success"] == sum(r["success"] for r in records) / 3
    assert written["return"] == pytest.approx(sum(r["return"] for r in records) / 3)
    low, high = written["success_interval"]
    assert 0 <= low <= written["success"] <= high <= 1
    low, high = written["return_interval"]
    assert low <= written["return"] <= high
    assert read_video(path.fine / "videos" / "evaluation.mp4").shape[0] == 22  # two episodes


def test_evaluation_with_one_seed_is_reproducible(path):
    cfg = EvaluateConfig(run=str(path.fine), episodes=3, device="cpu")
    assert evaluate(cfg) == path.result
    other = evaluate(EvaluateConfig(run=str(path.fine), episodes=3, device="cpu", seed=5))
    assert other["return"] != path.result["return"]
    evaluate(cfg)  # leave what was there


def test_evaluation_of_several_environments_at_once(path):
    cfg = EvaluateConfig(run=str(path.fine), episodes=3, device="cpu")
    done = evaluate(cfg, env_factory=two_at_once)
    assert [record["worker"] for record in done["records"]] == [0, 1, 0]
    evaluate(cfg)


def test_report_shows_both_runs(path):
    html = path.report.read_text()
    assert "Pre-training" in html and "Fine-tuning" in html
    assert html.count("data:video/mp4") >= 3 and html.count("data:image/png") >= 5


def test_finetuning_starts_from_the_pretrained_weights(path, clips, tmp_path):
    cfg = finetune_config(tmp_path / "a", pretrained=str(path.pre), frozen_updates=1_000)
    finetune(cfg)
    before, after = checkpoint(path.pre)["model"], checkpoint(tmp_path / "a")["agent"]
    weights = [k for k in before if k.startswith("encoder.") and k.endswith("weight")]
    assert weights
    for name in weights:  # they stood still
        assert torch.equal(before[name], after[f"world_model.{name}"])
    thawed = checkpoint(path.fine)["agent"]
    assert any(not torch.equal(before[k], thawed[f"world_model.{k}"]) for k in weights)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(method, path, clips, tmp_path):
    suitable = METHODS[method].checkpoint
    start = None
    if method in PRETRAINED and method != "prelar":
        pretrain(pretrain_config(clips, tmp_path / "pre", method=method, updates=1))
        start = str(tmp_path / "pre")
    elif "prelar" in suitable:
        start = str(path.pre)
    cfg = finetune_config(tmp_path / "fine", method=method, pretrained=start, eval_episodes=0)
    cfg.env_steps, cfg.prefill = 30, 10
    finetune(cfg)
    state = checkpoint(tmp_path / "fine")
    assert state["method"] == method and state["model_update"]["count"] == 3
    assert all(x.isfinite().all() for x in state["agent"].values() if x.is_floating_point())


def test_same_seed_twice_gives_the_same_run(path, clips, tmp_path):
    pretrain(pretrain_config(clips, tmp_path / "pre"))
    assert different(checkpoint(path.pre), checkpoint(tmp_path / "pre")) == []
    assert (tmp_path / "pre" / "metrics.csv").read_text() == (path.pre / "metrics.csv").read_text()
    finetune(finetune_config(tmp_path / "fine", pretrained=str(tmp_path / "pre")))
    assert different(checkpoint(path.fine), checkpoint(tmp_path / "fine")) == []
    assert (tmp_path / "fine/metrics.csv").read_text() == (path.fine / "metrics.csv").read_text()


def test_another_seed_gives_another_run(path, clips, tmp_path):
    pretrain(pretrain_config(clips, tmp_path / "pre", seed=1))
    assert different(checkpoint(path.pre)["model"], checkpoint(tmp_path / "pre")["model"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_pretraining_continues_bit_for_bit(number, path, clips, tmp_path, monkeypatch):
    cfg = pretrain_config(clips, tmp_path / "pre", checkpoint_every=1_000, prefetch=2)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2, number)
        with pytest.raises(SystemExit, match="stopped after 2 updates.*resume=true"):
            pretrain(cfg)
    assert checkpoint(tmp_path / "pre")["step"] == 2
    assert [row["step"] for row in rows(tmp_path / "pre")][-1] == "2"
    cfg.resume = True
    pretrain(cfg)
    assert different(checkpoint(path.pre), checkpoint(tmp_path / "pre")) == []
    assert (tmp_path / "pre" / "metrics.csv").read_text() == (path.pre / "metrics.csv").read_text()
    versions = json.loads((tmp_path / "pre" / "versions.json").read_text())
    assert [session["step"] for session in versions["continued"]] == [2]


def test_a_continued_run_needs_its_pretrained_run_no_more(path, tmp_path):
    pretrained = shutil.copytree(path.pre, tmp_path / "pre")
    cfg = finetune_config(tmp_path / "fine", pretrained=str(pretrained), env_steps=40)
    finetune(cfg)
    shutil.rmtree(pretrained)
    cfg.resume, cfg.env_steps = True, 60
    finetune(cfg)
    assert checkpoint(tmp_path / "fine")["step"] == 60


def test_finished_run_says_so_and_stays(path, clips, capsys):
    before = checkpoint(path.pre), checkpoint(path.fine)
    pretrain(pretrain_config(clips, path.pre, resume=True))
    assert "has its 3 updates already" in capsys.readouterr().out
    finetune(finetune_config(path.fine, pretrained=str(path.pre), resume=True))
    assert "has its 60 steps already" in capsys.readouterr().out
    assert different(before, (checkpoint(path.pre), checkpoint(path.fine))) == []


def test_terminated_process_leaves_a_loadable_checkpoint(clips, tmp_path):
    run = tmp_path / "pre"
    command = [sys.executable, str(ROOT / "recipes" / "pretrain.py"), *PRETRAIN_ARGS]
    command += [f"data={clips}", f"run={run}", "updates=100000", "log_every=1", "video_every=99999"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not ((run / "metrics.csv").exists() and len(rows(run)) > 3):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75 and "Traceback" not in errors
    assert "to continue: the same command with resume=true" in errors.splitlines()[-1]
    assert checkpoint(run)["step"] >= 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pre"]  # Hydra wrote nothing itself


@pytest.mark.slow
def test_ctrl_c_reaches_only_the_parent_of_several_environments(tmp_path):
    run = tmp_path / "fine"
    command = [sys.executable, str(ROOT / "recipes" / "finetune.py"), *FINETUNE_ARGS]
    command += [f"run={run}", "num_workers=2", "env_steps=1000000", "eval_episodes=2"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while process.poll() is None and not list(run.glob("videos/eval_*.mp4")):
        time.sleep(0.2)  # until there are workers for the evaluation too
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75 and "Traceback" not in errors
    assert "to continue: the same command with resume=true" in errors.splitlines()[-1]
    assert checkpoint(run)["step"] >= 40
    with pytest.raises(ProcessLookupError):  # nothing of its group is left, soon
        for _ in range(50):
            os.killpg(process.pid, 0)
            time.sleep(0.2)


def test_half_precision(clips, tmp_path):
    pretrain(pretrain_config(clips, tmp_path / "pre", precision="bf16", updates=1))
    cfg = finetune_config(
        tmp_path / "fine", precision="bf16", pretrained=str(tmp_path / "pre"), eval_episodes=0
    )
    finetune(cfg)
    assert all(float(row["loss_image"]) > 0 for row in rows(tmp_path / "fine") if row["loss_image"])


def test_tensorboard_and_wandb_write_files(clips, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    cfg = pretrain_config(clips, tmp_path / "pre", logger=["tensorboard", "wandb"], updates=1)
    pretrain(cfg)
    assert list((tmp_path / "pre" / "tensorboard").glob("events.*"))
    assert list((tmp_path / "pre" / "wandb").glob("offline-run-*/*.wandb"))
    assert rows(tmp_path / "pre")


def test_clips_of_several_stores(clips, tmp_path):
    other = make_clips(tmp_path / "other", seed=3)
    for data in ([str(clips), str(other)], {str(clips): 1.0, str(other): 3.0}):
        cfg = pretrain_config(clips, tmp_path / type(data).__name__, updates=1)
        cfg.data = data
        pretrain(cfg)
        config = yaml.safe_load((tmp_path / type(data).__name__ / "config.yaml").read_text())
        assert config["data"] == data


def test_evaluate_prints_one_line(path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evaluate", f"run={path.fine}", "episodes=3", "device=cpu"])
    start("evaluate")
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and out.startswith("toy: success ") and "3 episodes" in out
