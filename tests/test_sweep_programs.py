"""The programs of a sweep: where they go on, and what they are given."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from prelar_trl.recipes.command_line import as_typed
from prelar_trl.recipes.schema import PretrainConfig
from prelar_trl.recipes.sweep import command, make_jobs
from prelar_trl.sweep import Engine, Job, Source
from prelar_trl.sweep.launchers import Program
from prelar_trl.sweep.results import CurveResults
from tests.sweeps import sweep_config
from tests.toy_runs import ROOT, configured


def test_a_program_goes_on_at_the_one_before_a_checkpoint_that_is_gone(tmp_path):
    before = tmp_path / "run" / "checkpoints" / "last_1.pt"
    before.parent.mkdir(parents=True)
    before.touch()
    program = Program(["echo"], tmp_path / "run", tmp_path, tmp_path / "run.log")
    assert program.start().wait() == 0
    assert (tmp_path / "run.log").read_text() == "resume=true\n" and before.is_file()


def test_a_program_deletes_no_checkpoint_that_is_kept(tmp_path):
    kept = tmp_path / "run" / "checkpoints" / "step_00000040.pt"
    kept.parent.mkdir(parents=True)
    kept.touch()
    program = Program(["echo"], tmp_path / "run", tmp_path, tmp_path / "run.log")
    assert program.start().wait() == 0 and kept.is_file()
    assert (tmp_path / "run.log").read_text() == "resume=auto\n"  # which refuses to start anew


def test_a_program_that_was_killed_before_its_first_checkpoint_starts_with_any_settings(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text("precision: bf16")
    program = Program(["echo"], tmp_path / "run", tmp_path, tmp_path / "run.log")
    assert program.start().wait() == 0 and not (tmp_path / "run").exists()


def test_a_sweep_needs_no_torch():
    code = "import sys, prelar_trl.sweep; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def programs(root: Path, *given: str, source: Source | None = None) -> dict[str, Program]:
    """The programs of a sweep's command line, by their jobs."""
    jobs = make_jobs(sweep_config(*given, "tasks=[toy]"))
    engine = Engine(root, CurveResults(root), jobs, command, source=source)
    return {job.recipe: engine._program(job) for job in jobs}


def setting(program: Program, name: str) -> str:
    (argument,) = [x for x in program.command if x.startswith(f"{name}=")]
    return argument.removeprefix(f"{name}=")


@pytest.mark.parametrize(
    ("given", "data"),
    [
        ("videos/a", "{here}/videos/a"),
        ('"~/a (1)"', "{home}/a (1)"),
        ('[a,"~/b (1)"]', ["{here}/a", "{home}/b (1)"]),
        ("{a: 1, /b: 2.5}", {"{here}/a": 1, "/b": 2.5}),
    ],
)
def test_the_users_videos_are_found_from_where_the_sweep_was_started(
    given, data, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    program = programs(tmp_path / "root", "methods=[apv]", f"pretrain.data={given}")["pretrain"]
    given = as_typed([x for x in program.command if "=" in x], PretrainConfig, [])
    places = {"here": str(tmp_path), "home": str(tmp_path / "home")}
    expected = re.sub("{(here|home)}", lambda name: places[name[1]], json.dumps(data))
    assert json.dumps(configured("pretrain", *given).data) == expected


@pytest.mark.parametrize(
    ("given", "found"),
    [("models/x", "{here}/models/x"), ("hf://me/model", "hf://me/model"), (None, None)],
)
def test_the_users_model_is_found_too(given, found, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    more = [] if given is None else [f"finetune.pretrained={given}"]
    made = programs(tmp_path / "root", "methods=[dreamerv2]", *more)
    command = made["finetune"].command
    names = [x for x in command if x.startswith("pretrained=")]
    expected = [] if found is None else [f"pretrained={found.format(here=tmp_path)}"]
    assert names == expected


def test_a_run_of_the_sweep_is_found_in_its_root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = programs(tmp_path / "root", "methods=[apv]", "pretrain.data=a")
    assert setting(made["finetune"], "pretrained") == "sweep/pretrain/apv-0"


def test_modules_beside_the_sweep_are_found_after_the_code_and_before_other_ones(
    tmp_path, monkeypatch
):
    """As ``tasks=[my_envs:make]`` needs them, in the programs that run in another folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    given = ["methods=[dreamerv2]"]
    code = tmp_path / "root" / "source"
    program = programs(tmp_path / "root", *given, source=Source("abc", code))["finetune"]
    expected = os.pathsep.join([str(code), str(tmp_path), "/elsewhere"])
    assert program.environment["PYTHONPATH"] == expected
    (tmp_path / "my_envs.py").touch()
    (tmp_path / "root").mkdir()
    program.command = [sys.executable, "-P", "-c", "import my_envs"]
    program.resumes = False
    assert program.start().wait() == 0, program.log.read_text()


def test_another_checkout_in_the_current_folder_is_not_what_runs(tmp_path, monkeypatch):
    (tmp_path / "prelar_trl").mkdir()
    (tmp_path / "prelar_trl" / "__init__.py").touch()
    monkeypatch.chdir(tmp_path)
    program = programs(tmp_path / "root", "methods=[dreamerv2]")["finetune"]
    assert program.environment["PYTHONPATH"].split(os.pathsep)[:2] == [str(ROOT), str(tmp_path)]
    shutil.rmtree(tmp_path / "prelar_trl")
    program = programs(tmp_path / "root", "methods=[dreamerv2]")["finetune"]
    assert program.environment["PYTHONPATH"].split(os.pathsep)[0] == str(tmp_path)


def test_jobs_say_the_same_wherever_they_are_started(tmp_path, monkeypatch):
    given = ["methods=[apv]", "tasks=[toy]", "pretrain.data=[a,b]"]
    monkeypatch.chdir(tmp_path)
    (pretraining, run) = make_jobs(sweep_config(*given))
    assert isinstance(run, Job) and run.inputs["needs"] == pretraining.inputs
    assert pretraining.inputs["settings"]["data"] == ["a", "b"]
