"""Bad input to the recipes: one line that names the value, before long work, nothing lost."""

from __future__ import annotations

import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from prelar_trl.checkpoint import save_checkpoint
from prelar_trl.data import ClipWriter
from prelar_trl.recipes.entry import start
from prelar_trl.recipes.evaluate import evaluate
from prelar_trl.recipes.finetune import finetune
from prelar_trl.recipes.pretrain import pretrain
from prelar_trl.recipes.schema import EvaluateConfig
from tests.test_envs import Counter
from tests.toy_runs import (
    FINETUNE_ARGS,
    PRETRAIN_ARGS,
    checkpoint,
    different,
    finetune_config,
    interrupt_after,
    pretrain_config,
)


@pytest.fixture(scope="module")
def made(clips, tmp_path_factory):
    """A store, a pre-training run and a fine-tuning run of few updates."""
    folder = tmp_path_factory.mktemp("made")
    pretrain(pretrain_config(clips, folder / "pre", updates=1))
    finetune(finetune_config(folder / "fine", env_steps=30, eval_episodes=0))
    return SimpleNamespace(clips=clips, pre=folder / "pre", fine=folder / "fine")


@pytest.fixture
def pretrain_fails(fails, made, tmp_path):
    """As ``fails``, for pre-training with these arguments; no run folder may be left."""

    def run(*arguments):
        folder = tmp_path / "new"
        start = [f"data={made.clips}", f"run={folder}", *PRETRAIN_ARGS, "updates=2"]
        line = fails("pretrain", *start, *arguments)
        assert not folder.exists()
        return line

    return run


@pytest.fixture
def finetune_fails(fails, tmp_path):
    """The same for fine-tuning."""

    def run(*arguments):
        folder = tmp_path / "new"
        line = fails("finetune", f"run={folder}", *FINETUNE_ARGS, *arguments)
        assert not folder.exists()
        return line

    return run


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("foo=1", ["'foo'", "--cfg job"]),
        ("+foo=1", ["unknown config key foo"]),
        ("model.foo=1", ["'model.foo'", "'foo' is not in struct"]),
        ("+model.foo=1", ["unknown setting 'model.foo'", "images, actions"]),
        ("updates=abc", ["updates=abc", "Integer"]),
        ("updates", ["updates", "EQUAL"]),
        ("resume=maybe", ["resume='maybe' is unknown", "auto"]),
        ("model.depth=deep", ["model.depth='deep'", "a whole number"]),
        ("model.norm=instance", ["norm='instance'", "batch, layer, group or none"]),
        ("loss.consistency=hard", ["consistency='hard'", "soft, sign, soft_rank"]),
        ("method=dreamer", ["method='dreamer' is unknown", "prelar_no_al_cl", "dreamerv2"]),
        ("method=dreamerv2", ["method=dreamerv2", "'pretrain'"]),
        ("size=huge", ["size='huge' is unknown", "full, small, tiny or mini"]),
        ("precision=16", ["precision='16'", "32 or bf16"]),
        ("compile=yes", ["compile='yes'", "auto, on or off"]),
        ("device=quantum", ["quantum", "auto, cpu, cuda"]),
        ("device=meta", ["meta", "auto, cpu, cuda"]),
        ("logger=paper", ["'paper'", "csv, tensorboard, wandb"]),
        ("logger=[csv,paper]", ["'paper'", "csv, tensorboard, wandb"]),
        ("updates=0", ["updates=0", "at least 1"]),
        ("lr=-1", ["lr=-1", "between 0 and 1"]),
        ("heldout=1.5", ["heldout=1.5", "between 0 and 1"]),
        ("context=6", ["context=6", "clip_len=6"]),
        ("clip_len=1", ["context=2", "clip_len=1"]),
        ("clip_len=10", ["clip_len=10", "9 frames", "lower clip_len"]),
        ("model.frames=flow", ["flow", "pixels"]),
        ("resume=true", ["does not exist"]),
    ],
)
def test_pretraining_refuses(argument, parts, pretrain_fails):
    line = pretrain_fails(argument)
    assert all(part in line for part in parts), line


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("env=tetris", ["'tetris'", "metaworld/<task>", "toy"]),
        ("env=metaworld/drawer-opne", ["drawer-opne", "drawer-open"]),
        ("prefill=60", ["prefill=60", "env_steps=60"]),
        ("train_every=0", ["train_every=0", "above 0"]),
        ("horizon=1", ["horizon=1", "at least 2"]),
        ("min_length=7", ["min_length=7", "batch_length=6"]),
        ("capacity=5", ["capacity=5", "batch_length=6"]),
        ("method=prelar batch_length=4", ["batch_length=4", "window of 5"]),
        ("model.actions=imagined", ["actions='imagined'", "latent, encoded, real or none"]),
        (
            "method=dreamerv2 model.heads=[discount] loss.weights={reward:null,discount:5}",
            ["model.heads=['discount'] leaves out reward"],
        ),
        ("actor_gradient=magic", ["'magic'", "dynamics"]),
        ("env=metaworld/reach render_quality=best", ["'best'", "fast", "full"]),
    ],
)
def test_finetuning_refuses(argument, parts, finetune_fails):
    line = finetune_fails(*argument.split())
    assert all(part in line for part in parts), line


def test_missing_values_are_named(fails, made, tmp_path):
    assert "data is not given" in fails("pretrain", f"run={tmp_path / 'a'}")
    assert "run is not given" in fails("pretrain", f"data={made.clips}")
    assert "env is not given" in fails("finetune", f"run={tmp_path / 'a'}")
    assert "run is not given" in fails("evaluate")
    assert "runs is not given" in fails("plot")
    assert "data is not given" in fails("collect_videos", "env=toy")
    assert "source is not given" in fails("prepare_videos", f"data={tmp_path / 'a'}")


def test_missing_clip_store(pretrain_fails, tmp_path):
    line = pretrain_fails(f"data={tmp_path / 'nowhere'}")
    assert "nowhere" in line and "collect_videos" in line


def test_damaged_clip_store(pretrain_fails, made, tmp_path):
    copy = shutil.copytree(made.clips, tmp_path / "copy")
    (pixels,) = (copy / "pixels").iterdir()
    pixels.write_bytes(pixels.read_bytes()[:-100])
    assert "copy" in pretrain_fails(f"data={copy}")
    (copy / "store.json").write_text("{")
    assert "damaged" in pretrain_fails(f"data={copy}")


def test_clips_of_the_wrong_size(pretrain_fails, tmp_path):
    with ClipWriter(tmp_path / "small", source="test", height=32, width=32) as writer:
        for i in range(4):
            writer.add(np.zeros((9, 3, 32, 32), np.uint8), None, name=str(i))
    line = pretrain_fails(f"data={tmp_path / 'small'}")
    assert "32" in line and "64" in line


def test_used_run_folder_is_left_alone(fails, made):
    before = checkpoint(made.pre)
    line = fails("pretrain", f"data={made.clips}", f"run={made.pre}", *PRETRAIN_ARGS)
    assert "already holds a run" in line and "resume=true" in line
    assert different(before, checkpoint(made.pre)) == []


def test_full_disk_is_noticed_before_anything_is_written(pretrain_fails, monkeypatch):
    usage = SimpleNamespace(total=2**30, used=2**30, free=2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert "not enough space" in pretrain_fails()


def test_space_for_the_replay_is_asked_for(finetune_fails, monkeypatch):
    usage = SimpleNamespace(total=2**40, used=0, free=10 * 2**30)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    line = finetune_fails("env_steps=1000000", "capacity=1000000")
    assert "not enough space" in line and "10240 MiB" in line


def test_resume_with_other_settings_names_them(fails, made):
    start = [f"data={made.clips}", f"run={made.pre}", *PRETRAIN_ARGS, "updates=5", "resume=true"]
    start += ["log_every=1", "checkpoint_every=1"]
    assert "seed=7" in fails("pretrain", *start, "seed=7")
    assert "method=prelar_no_cl" in fails("pretrain", *start, "method=prelar_no_cl")
    assert checkpoint(made.pre)["step"] == 1


def test_damaged_checkpoint(fails, made, finetune_fails, tmp_path):
    pre = shutil.copytree(made.pre, tmp_path / "pre")
    fine = shutil.copytree(made.fine, tmp_path / "fine")
    for run in (pre, fine):
        file = run / "checkpoints" / "last.pt"
        file.write_bytes(file.read_bytes()[:1_000])
    assert "damaged" in finetune_fails(f"pretrained={pre}")
    assert "damaged" in fails("evaluate", f"run={fine}")
    (fine / "checkpoints" / "last.pt").unlink()
    assert "no checkpoint" in fails("evaluate", f"run={fine}")


def test_evaluation_refuses(fails, made, tmp_path):
    assert "is a pretrain run" in fails("evaluate", f"run={made.pre}")
    assert "does not exist" in fails("evaluate", f"run={tmp_path / 'nowhere'}")
    assert "not a run folder" in fails("evaluate", f"run={tmp_path}")
    assert "episodes=0" in fails("evaluate", f"run={made.fine}", "episodes=0")
    assert "'tetris'" in fails("evaluate", f"run={made.fine}", "env=tetris")
    assert "num_workers" in fails("evaluate", f"run={made.fine}", "num_workers=0")
    assert not (made.fine / "evaluation.json").exists()


def test_evaluation_in_an_environment_with_other_actions(made):
    cfg = EvaluateConfig(run=str(made.fine), episodes=1, device="cpu")
    with pytest.raises(ValueError, match="env=toy has 3 action dimensions, .* has 2"):
        evaluate(cfg, env_factory=lambda: Counter(actions=3))


def test_collecting_from_an_unknown_environment(fails, tmp_path):
    assert "'tetris'" in fails("collect_videos", f"data={tmp_path / 'v'}", "env=tetris")


@pytest.mark.parametrize(
    ("recipe", "argument", "part"),
    [
        ("collect_videos", "episodes=many", "episodes=many"),
        ("collect_videos", "tasks=3", "unknown Meta-world task '3'"),
        ("collect_videos", "tasks=[]", "tasks=[] must be text, or a list of at least one"),
        ("collect_videos", "frames=3", "'frames'"),
        ("prepare_videos", "stride=half", "stride=half"),
        ("prepare_videos", "shard_mib=null", "shard_mib=null"),
        ("prepare_videos", "shard_mib=0", "shard_mib=0"),
        ("prepare_videos", "workers=-1", "workers=-1"),
        ("prepare_videos", "lists=train.txt", "lists='train.txt' must be {train: <file>"),
        ("prepare_videos", "labels=3", "labels=3"),
        ("plot", "runs=[]", "runs=[] must be text, or a list of at least one"),
        ("plot", "runs=null", "run folder null does not exist"),
        ("plot", "runs=3", "run folder 3 does not exist"),
    ],
)
def test_wrong_values_are_named(recipe, argument, part, fails, tmp_path, monkeypatch):
    given = {
        "collect_videos": ("data=store",),
        "prepare_videos": ("data=store", f"source={tmp_path}"),
        "plot": (),
    }
    monkeypatch.chdir(tmp_path)
    assert part in fails(recipe, *given[recipe], argument)
    assert not list(tmp_path.iterdir())


def test_pretrained_run_of_another_method(finetune_fails, made):
    line = finetune_fails(f"pretrained={made.pre}", "method=apv")
    assert "pretrain run of prelar" in line and "method=apv takes runs of apv" in line
    line = finetune_fails(f"pretrained={made.pre}", "method=dreamerv2")
    assert "no pre-training run" in line


def test_pretrained_run_of_another_size_or_phase(finetune_fails, made, tmp_path):
    line = finetune_fails(f"pretrained={made.pre}", "size=small")
    assert "size=tiny" in line and "size=small" in line
    line = finetune_fails(f"pretrained={made.fine}")
    assert "finetune run" in line
    assert "does not exist" in finetune_fails(f"pretrained={tmp_path / 'nowhere'}")


def test_pretrained_run_with_other_model_options_names_the_tensors(finetune_fails, made):
    line = finetune_fails(f"pretrained={made.pre}", "model.deter=24")
    assert "tensors differ" in line and "rssm." in line
    assert "(256, 32) there and (256, 40) here" in line
    line = finetune_fails(f"pretrained={made.pre}", "model.depth=6")
    assert "tensors differ" in line and "coder." in line


def test_an_agent_of_nan_is_not_evaluated(fails, made, tmp_path):
    run = shutil.copytree(made.fine, tmp_path / "fine")
    state = checkpoint(run)
    for name, x in state["agent"].items():
        if name.startswith("actor."):
            x.fill_(float("nan"))
    save_checkpoint(run / "checkpoints" / "last.pt", state, finite=False)
    line = fails("evaluate", f"run={run}", "device=cpu")
    assert "action is NaN or infinite at step 1 of an episode" in line
    assert not (run / "evaluation.json").exists()


def test_no_episode_at_all_is_an_error(tmp_path):
    cfg = finetune_config(tmp_path / "a", max_steps=100)
    with pytest.raises(ValueError, match="no episode was finished in 60 steps"):
        finetune(cfg)


def test_ctrl_c_twice_stops_at_once_with_one_line(made, tmp_path, monkeypatch, capsys):
    interrupt_after(monkeypatch, 1)
    interrupt_after(monkeypatch, 1)
    arguments = [f"data={made.clips}", f"run={tmp_path / 'a'}", *PRETRAIN_ARGS]
    monkeypatch.setattr(sys, "argv", ["recipe", *arguments])
    with pytest.raises(SystemExit) as stop:
        start("pretrain")
    assert stop.value.code == 75
    assert capsys.readouterr().err.splitlines()[-1].startswith("stopped at once")


def test_full_error_shows_where_it_came_from(made, tmp_path, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(sys, "argv", ["recipe", f"run={tmp_path / 'nowhere'}"])
    with pytest.raises(FileNotFoundError):
        start("evaluate")
