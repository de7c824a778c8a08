"""A run that was stopped or killed goes on as if nothing had happened."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import yaml

from prelar_trl.checkpoint import save_checkpoint
from prelar_trl.config import METHODS
from prelar_trl.envs import ToyEnv
from prelar_trl.recipes import finetune as finetune_module
from prelar_trl.recipes.evaluate import evaluate
from prelar_trl.recipes.finetune import finetune
from prelar_trl.recipes.interaction import Collection, Evaluation
from prelar_trl.recipes.learner import is_moved
from prelar_trl.recipes.pretrain import pretrain
from prelar_trl.recipes.schema import EvaluateConfig
from prelar_trl.record import RunFolder
from tests.files import contents
from tests.toy_runs import (
    TINY,
    checkpoint,
    different,
    finetune_config,
    interrupt_after,
    make_clips,
    pretrain_config,
    rows,
    two_at_once,
)

# Episodes of 13 steps: none ends where an update, a checkpoint or an evaluation is due.
STEPS = {"max_steps": 13, "prefill": 15, "pretrain_updates": 3, "train_every": 4}
STEPS["model"] = {"images": "cnn"}  # the quickest; test_resume_metaworld.py has the batch norms


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing has stopped."""
    run = tmp_path_factory.mktemp("whole") / "run"
    finetune(finetune_config(run, **STEPS))
    return run


def same(run, other):
    states = [checkpoint(run), checkpoint(other)]
    for state in states:  # which tells of the saves before
        state.get("replay", {}).pop("held", None)
    assert different(*states) == []
    assert (run / "metrics.csv").read_text() == (other / "metrics.csv").read_text()


def stopped(cfg, monkeypatch, update, **options):
    """The run until the end of an update."""
    with monkeypatch.context() as patch:
        interrupt_after(patch, update)
        with pytest.raises(SystemExit, match="stopped after .* steps") as stop:
            finetune(cfg, **options)
    assert stop.value.code == 75
    assert checkpoint(cfg.run)["model_update"]["count"] == update
    cfg.resume = True


# ---------------------------------------------------------------- the same numbers


@pytest.mark.parametrize(("update", "prefetch"), [(2, 0), (5, 2), (9, 2)])
def test_interrupted_finetuning_goes_on_bit_for_bit(update, prefetch, whole, tmp_path, monkeypatch):
    cfg = finetune_config(tmp_path / "run", prefetch=prefetch, **STEPS)
    stopped(cfg, monkeypatch, update)
    finetune(cfg)
    same(tmp_path / "run", whole)


def test_a_run_whose_belief_was_kept_with_the_frame_goes_on_bit_for_bit(
    whole, tmp_path, monkeypatch
):
    cfg = finetune_config(tmp_path / "run", **STEPS)
    stopped(cfg, monkeypatch, 5)
    state = checkpoint(cfg.run)  # as an older version wrote it
    state["collection"]["now"]["belief"] = state["collection"].pop("belief")
    save_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt", state)
    finetune(cfg)
    same(tmp_path / "run", whole)


def test_a_run_that_was_stopped_within_each_evaluation_goes_on_bit_for_bit(
    whole, tmp_path, monkeypatch
):
    cfg = finetune_config(tmp_path / "run", **STEPS)
    real = Evaluation.__call__

    def cut(self, logger, step):
        self.interruption.requested = True
        return real(self, logger, step)

    def cut_at_60(self, logger, step):
        return (cut if step == 60 else real)(self, logger, step)

    for step, call in ((40, cut), (60, cut_at_60)):
        with monkeypatch.context() as patch:
            patch.setattr(Evaluation, "__call__", call)
            with pytest.raises(SystemExit, match=f"stopped after {step} steps"):
                finetune(cfg)
        cfg.resume = True
    finetune(cfg)
    same(tmp_path / "run", whole)


def test_a_full_ring_keeps_what_the_checkpoint_needs(tmp_path, monkeypatch):
    options = STEPS | {"capacity": 40, "env_steps": 120, "checkpoint_every": 50, "eval_every": 100}
    finetune(finetune_config(tmp_path / "whole", **options))
    cfg = finetune_config(tmp_path / "run", **options)
    with monkeypatch.context() as patch:
        patch.setattr(Evaluation, "__call__", killed_at(100))
        with pytest.raises(MemoryError):
            finetune(cfg)
    assert checkpoint(cfg.run)["step"] == 50
    cfg.resume = True
    finetune(cfg)
    same(tmp_path / "run", tmp_path / "whole")


def killed(*_):
    raise MemoryError  # nothing is saved


def killed_at(step):
    real = Evaluation.__call__

    def call(self, logger, now):
        if now == step:
            killed()
        return real(self, logger, now)

    return call


# ---------------------------------------------------------------- what cannot be repeated


def test_an_environment_that_cannot_be_repeated_loses_the_episode_and_says_so(
    tmp_path, monkeypatch, capsys
):
    cfg = finetune_config(tmp_path / "run", **STEPS)
    stopped(cfg, monkeypatch, 5)
    drift = iter(range(1, 1000))
    real = ToyEnv._reset

    def reset(self, tensordict, **kwargs):
        out = real(self, tensordict, **kwargs)
        self._position = self._position * 0.9 ** next(drift)
        return out.update(self._observe())

    monkeypatch.setattr(ToyEnv, "_reset", reset)
    finetune(cfg)
    said = capsys.readouterr().err
    assert "episode of environment 0 (" in said and "its frame 0 is another one" in said
    assert checkpoint(cfg.run)["collection"]["dropped"] == 1


def test_environments_with_a_batch_size_lose_their_episodes_and_say_so(
    tmp_path, monkeypatch, capsys
):
    cfg = finetune_config(tmp_path / "run", **STEPS)
    stopped(cfg, monkeypatch, 5, env_factory=two_at_once)
    finetune(cfg, env_factory=two_at_once)
    said = capsys.readouterr().err
    assert said.count("cannot be rebuilt") == 2
    assert checkpoint(cfg.run)["collection"]["dropped"] == 2


# ---------------------------------------------------------------- one command


def test_auto_starts_continues_and_says_finished(whole, tmp_path, monkeypatch, capsys):
    cfg = finetune_config(tmp_path / "run", **STEPS, resume="auto")
    stopped(cfg, monkeypatch, 5)
    cfg.resume = "auto"
    finetune(cfg)
    same(tmp_path / "run", whole)
    finetune(cfg)
    assert "finished: " in capsys.readouterr().out
    cfg.env_steps += 10
    finetune(cfg)  # nothing of the run is still open in this process
    assert rows(tmp_path / "run", "times.csv")[-1]["step"] == str(cfg.env_steps)


def test_auto_starts_anew_what_was_killed_before_its_first_checkpoint(whole, tmp_path, monkeypatch):
    cfg = finetune_config(tmp_path / "run", **STEPS, resume="auto")
    with monkeypatch.context() as patch:
        patch.setattr(Collection, "sample", killed)
        with pytest.raises(MemoryError):
            finetune(cfg)
    assert (tmp_path / "run" / "metrics.csv").exists()
    (tmp_path / "run" / "job.out").write_text("a scheduler's")
    cfg.resume = True
    with pytest.raises(FileNotFoundError, match="before its first checkpoint.*resume=auto"):
        finetune(cfg)
    other = finetune_config(tmp_path / "run", **STEPS | {"prefill": 16}, resume="auto")
    with pytest.raises(ValueError, match="prefill=16.*prefill=15; repeat .* resume=auto"):
        finetune(other)
    cfg.resume = "auto"
    finetune(cfg)
    same(tmp_path / "run", whole)
    assert (tmp_path / "run" / "job.out").read_text() == "a scheduler's"


def test_auto_goes_on_at_the_one_before_a_checkpoint_that_is_gone(whole, tmp_path, monkeypatch):
    cfg = finetune_config(tmp_path / "run", **STEPS, checkpoint_every=10)
    stopped(cfg, monkeypatch, 9)
    (tmp_path / "run" / "checkpoints" / "last.pt").unlink()
    cfg.resume = "auto"
    finetune(cfg)
    versions = json.loads((tmp_path / "run" / "versions.json").read_text())
    assert [session["step"] for session in versions["continued"]] == [30]
    same(tmp_path / "run", whole)


def test_auto_starts_nothing_anew_where_an_older_checkpoint_is_left(clips, tmp_path):
    cfg = pretrain_config(clips, tmp_path / "run", updates=1, keep_every=1, resume="auto")
    pretrain(cfg)
    (tmp_path / "run" / "checkpoints" / "last.pt").unlink()
    with pytest.raises(FileExistsError, match="copy step_00000001.pt to checkpoints/last.pt"):
        pretrain(cfg)
    assert (tmp_path / "run" / "checkpoints" / "step_00000001.pt").is_file()


def test_auto_after_a_kill_within_the_first_write(whole, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    finetune(finetune_config(tmp_path / "run", **STEPS, resume="auto"))
    same(tmp_path / "run", whole)


def test_a_moved_run_continues_with_settings_that_change_no_number(whole, tmp_path, monkeypatch):
    cfg = finetune_config(tmp_path / "run", **STEPS)
    stopped(cfg, monkeypatch, 5)
    shutil.move(tmp_path / "run", tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    changes = {"checkpoint_every": 7, "eval_episodes": 2, "eval_every": 35, "log_every": 5}
    logged, open_logger = [], finetune_module.open_logger

    def note(run, *rest):
        logged.append(run.config["log_every"])
        return open_logger(run, *rest)

    monkeypatch.setattr(finetune_module, "open_logger", note)
    finetune(finetune_config("elsewhere", **STEPS | changes, resume="auto"))
    names = ("agent", "model_update", "behavior_update", "collection", "rng")
    ours, theirs = checkpoint(tmp_path / "elsewhere"), checkpoint(whole)
    assert different({k: ours[k] for k in names}, {k: theirs[k] for k in names}) == []
    assert yaml.safe_load((tmp_path / "elsewhere/config.yaml").read_text())["log_every"] == 5
    assert logged == [5]  # wandb gets the settings of now, too


def test_a_run_keeps_its_settings_when_its_method_has_changed(clips, tmp_path, monkeypatch):
    """As after an update of the package: the run goes on bit for bit, and is evaluated."""
    options = {"method": "prelar_plus", "shift_by_motion": 3, "updates": 2}
    pretrain(pretrain_config(clips, tmp_path / "whole", **options))
    pretrain(pretrain_config(clips, tmp_path / "pre", **options | {"updates": 1}))
    fine = {"method": "prelar_plus", "pretrained": str(tmp_path / "pre"), "align_updates": 1}
    finetune(finetune_config(tmp_path / "fine", **fine))
    older = METHODS["prelar_plus"]
    newer = {"align_updates": 5, "loss": {"latent_free_nats": 100.0}, "shift_by_motion": 1.0}
    newer |= {"pretrain": {"actions": "latent"}, "finetune": {**older.finetune, "action_window": 3}}
    monkeypatch.setitem(METHODS, "prelar_plus", replace(older, **newer))
    pretrain(pretrain_config(clips, tmp_path / "pre", **options, resume=True))
    assert different(checkpoint(tmp_path / "pre"), checkpoint(tmp_path / "whole")) == []
    finetune(finetune_config(tmp_path / "fine", **fine, env_steps=80, resume=True))
    evaluate(EvaluateConfig(run=str(tmp_path / "fine"), device="cpu", episodes=1, video_episodes=0))


def test_auto_starts_anew_with_the_settings_that_a_run_began_with(clips, tmp_path, monkeypatch):
    options = {"method": "prelar_plus", "shift_by_motion": 3, "updates": 1, "resume": "auto"}
    pretrain(pretrain_config(clips, tmp_path / "run", **options))
    (tmp_path / "run" / "checkpoints" / "last.pt").unlink()  # as if killed before it
    newer = replace(METHODS["prelar_plus"], loss={"latent_free_nats": 100.0})
    monkeypatch.setitem(METHODS, "prelar_plus", newer)
    pretrain(pretrain_config(clips, tmp_path / "run", **options))
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["loss"]["latent_free_nats"] == 8.0


def test_what_a_folder_says_of_another_run_or_wrongly_is_one_line(clips, tmp_path):
    run = tmp_path / "run"
    cfg = pretrain_config(clips, run, updates=1)
    pretrain(cfg)
    cfg.resume, cfg.updates = True, 2
    good = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(good | {"gone_option": 1}))
    pretrain(cfg)  # of a version that knew more
    for config, message in (
        (good | {"method": "dreamerv2"}, "resume: method=prelar but .* with method=dreamerv2"),
        (good | {"env_steps": 5}, "resume: the run in .* is of the other phase"),
        (good | {"model": "hi"}, "config.yaml .* is damaged: model is 'hi'"),
        (good | {"loss": {"weights": 5}}, "config.yaml .* is damaged: loss is"),
        ({}, "resume: method=prelar but"),
    ):
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        with pytest.raises(ValueError, match=message):
            pretrain(cfg)


def test_a_null_that_a_run_began_with_is_kept(clips, tmp_path, monkeypatch):
    cfg = pretrain_config(clips, tmp_path / "run", updates=1)
    pretrain(cfg)
    older = METHODS["prelar"]
    newer = replace(older, pretrain={**older.pretrain, "action_width": 9})
    monkeypatch.setitem(METHODS, "prelar", newer)
    cfg.resume, cfg.updates = True, 2
    pretrain(cfg)
    assert checkpoint(tmp_path / "run")["overrides"]["action_width"] is None


def test_a_run_that_does_not_say_its_settings_is_refused_by_name(tmp_path, monkeypatch):
    finetune(finetune_config(tmp_path / "run", method="prelar_plus", eval_episodes=0))
    state = checkpoint(tmp_path / "run")  # as an older version wrote it
    state["overrides"] = TINY
    save_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt", state)
    older = METHODS["prelar_plus"]
    newer = replace(older, finetune={**older.finetune, "action_window": 3})
    monkeypatch.setitem(METHODS, "prelar_plus", newer)
    cfg = EvaluateConfig(run=str(tmp_path / "run"), device="cpu")
    with pytest.raises(ValueError, match="run does not fit this version's model: 1 tensors differ"):
        evaluate(cfg)


def test_a_finished_run_that_is_asked_for_less_stays_as_it_is(clips, tmp_path, capsys):
    cfg = pretrain_config(clips, tmp_path / "run", updates=2, resume="auto")
    pretrain(cfg)
    before = contents(tmp_path / "run")
    cfg.updates, cfg.log_every = 1, 7
    pretrain(cfg)
    assert "has its 2 updates already" in capsys.readouterr().out
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize("needed", [True, False], ids=["needed", "not-needed"])
def test_moved_pretrained_weights_are_known_and_others_refused(needed, clips, tmp_path):
    for seed in (0, 1):
        pretrain(pretrain_config(clips, tmp_path / f"pre-{seed}", updates=1, seed=seed))
    options = {"env_steps": 30, "eval_episodes": 0, "rehearse": 0.5 if needed else 0.0}

    def run(pretrained, **changes):
        given = {**options, "pretrained": str(pretrained), **changes}
        finetune(finetune_config(tmp_path / "run", **given))

    run(tmp_path / "pre-0")
    state, last = checkpoint(tmp_path / "run"), tmp_path / "run" / "checkpoints" / "last.pt"
    moved = shutil.move(tmp_path / "pre-0", tmp_path / "moved")
    run(moved, env_steps=40, resume=True)
    for _ in range(2):
        with pytest.raises(ValueError, match="weights of pretrained=.*pre-1 are others than"):
            run(tmp_path / "pre-1", env_steps=50, resume=True)
    run(moved, env_steps=50, resume=True)
    assert checkpoint(tmp_path / "run")["pretrained"] == state.pop("pretrained")
    save_checkpoint(last, state)  # as an older version wrote it
    run(tmp_path / "pre-1", env_steps=60, resume=True)


@pytest.mark.parametrize(
    ("before", "now", "moved"),
    [
        ("~/a", "{home}/a", False),
        ("a", "{here}/a", False),
        ("hf://me/a", "hf://me/a", False),
        ("a", "b", True),
        ("a", None, True),
    ],
)
def test_another_spelling_of_a_pretrained_run_is_no_other_place(
    before, now, moved, tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    now = now and now.format(home=tmp_path / "home", here=tmp_path)
    RunFolder.create(tmp_path / "run", {"pretrained": before}).unlock()
    assert is_moved(SimpleNamespace(run=str(tmp_path / "run"), pretrained=now)) == moved


def test_moved_data_is_known_and_other_data_refused(clips, tmp_path, monkeypatch):
    pretrain(pretrain_config(clips, tmp_path / "whole"))
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        with pytest.raises(SystemExit, match="stopped after 2 updates"):
            pretrain(pretrain_config(clips, tmp_path / "run", resume="auto"))
    moved = shutil.copytree(clips, tmp_path / "moved")
    other = make_clips(tmp_path / "other", seed=1)
    cfg = pretrain_config(other, tmp_path / "run", resume="auto")
    with pytest.raises(ValueError, match="clips in .*other.* are others than when"):
        pretrain(cfg)
    pretrain(pretrain_config(moved, tmp_path / "run", resume="auto"))
    same(tmp_path / "run", tmp_path / "whole")
