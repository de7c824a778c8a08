"""The study: which runs there are, what its tables say, and that nothing finished is repeated.

That stopping repeats nothing is the engine's, see test_sweep.py.
"""

from __future__ import annotations

import csv
import io
import json
import runpy
import shutil
import sys
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import study_jobs
from benchmarks.study_jobs import Study, expand, load_study
from benchmarks.study_report import GOALS, QUANTITIES, SHOWN, write_report
from prelar_trl import sweep
from prelar_trl.recipes.collect_videos import env_names
from prelar_trl.recipes.command_line import as_override
from tests.files import contents
from tests.sweeps import row, run_programs_here
from tests.toy_runs import CLIPS, ROOT, TINY, configured, shorten_mlp_probe

STUDY = load_study()
MODEL = {"size": "tiny", **{f"model.{name}": value for name, value in TINY.items()}}
VIDEOS = {"env": "toy", "episodes": 6, "max_steps": 8, "after_success": None}
TRIAL = Study(
    seeds=1,
    data={
        "toy": {
            "videos": VIDEOS,
            "pretrain": {**MODEL, **CLIPS, "updates": 3},
            "probe": {"clips": 8, "batch_size": 5},
        }
    },
    variants={"soft": {"method": "prelar"}},
)
# Of the table that was published first.
OLD = (
    "PSNR, own actions (dB)",
    "PSNR, other actions (dB)",
    "PSNR, last frame (dB)",
    "SSIM, own actions",
    "R², latent action",
    "R², random encoder",
    "R², frame difference",
    "rank corr., latent and state distance",
    "rank corr., true and state distance",
    "rank corr., true and latent distance",
    "own action explains best (chance 0.2)",
)


# Which runs there are


def test_every_variant_is_probed_on_both_data_sets_before_any_gets_the_next_seed():
    runs = [job.run for job in expand(STUDY) if job.run]
    seeds = [run["seed"] for run in runs]
    assert seeds == sorted(seeds) and set(seeds) == set(range(5))
    first = {(run["data"], run["variant"]) for run in runs if run["seed"] == 0}
    assert first == {(data, v) for data in ("experts", "toy") for v in STUDY.variants}
    assert len(runs) == 5 * len(first)


def test_a_probe_reads_the_run_before_it_which_sees_the_videos_of_its_data_set():
    jobs = {job.path: job for job in expand(STUDY, data=["toy"], seeds=1, updates=7)}
    probe = jobs["toy/probe/kl_0.1-0"]
    assert probe.settings["run"] == probe.needs.path == "toy/pretrain/kl_0.1-0"
    assert probe.needs.settings["updates"] == 7
    assert probe.needs.settings["data"] == probe.needs.needs.path == "toy/collect_videos/videos"
    assert {job.suite for job in jobs.values()} == {"toy"}


def test_every_job_has_settings_that_its_recipe_takes():
    seen = []
    for job in expand(STUDY, seeds=1):
        places = ["data"] if job.recipe == "collect_videos" else ["run"]
        given = dict.fromkeys(places, "here") | dict(job.settings)
        given |= {name: "here" for name in ("data", "run") if name in given}
        if (job.recipe, given) in seen:
            continue
        seen.append((job.recipe, given))
        cfg = configured(job.recipe, *(f"{k}={as_override(x)}" for k, x in given.items()))
        if job.recipe == "collect_videos":
            assert env_names(cfg.env, cfg.tasks)
        elif job.recipe == "pretrain":
            assert cfg.size == "mini"
    assert len(seen) == 2 + 2 * len(STUDY.variants) + 1  # all probes are the same


# What its tables say


def write_run(folder: Path, data: str, variant: str, seed: int, values: dict[str, Any]) -> None:
    pretrain = {"size": "mini", "updates": 9, "batch_size": 2, "clip_len": 6}
    inputs = {"needs": {"settings": pretrain, "needs": {"settings": {"episodes": 4}}}}
    run = {"data": data, "variant": variant, "seed": seed, "inputs": inputs, "values": values}
    path = folder / "runs" / data / f"{variant}-{seed}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(run))


def probed(own: float, explains: float, linear: float, mlp: float, **more: Any) -> dict[str, Any]:
    return {
        "openloop_psnr/own_actions_mean": own,
        "openloop_psnr/other_actions_mean": 22.0,
        "openloop_psnr/last_frame_mean": 24.0,
        "action_r2/latent_action": linear,
        "action_r2_mlp/latent_action": mlp,
        "action_r2/random_encoder": 0.2,
        "action_r2_mlp/random_encoder": 0.1,
        "contrast/accuracy": explains,
        "contrast/chance": 0.2,
        "rank_correlation/latent_state": None,
        **more,
    }


@pytest.fixture(scope="module")
def reported(tmp_path_factory) -> Path:
    """Two variants on the experts' videos, one on the toy's; prelar_plus_labels is not run."""
    tmp_path = tmp_path_factory.mktemp("results")
    for seed, explains in enumerate((0.55, 0.75)):
        write_run(tmp_path, "experts", "prelar_plus", seed, probed(22.8, explains, 0.3, 0.36))
    write_run(tmp_path, "experts", "fsq", 0, probed(24.5, 0.3, 0.4, 0.1))
    moved = {"transfer_psnr/transferred": 26.5, "transfer_psnr/own": 28.0}
    write_run(tmp_path, "toy", "prelar_plus", 0, probed(23.0, 0.9, 0.6, 0.7, **moved))
    write_report(tmp_path, ["fsq", "prelar_plus"])
    return tmp_path


def table(path: Path) -> dict[tuple[str, str], list[str]]:
    with open(path, newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header == ["variant", "quantity", "mean", "deviation", "seeds"]
    return {(variant, quantity): rest for variant, quantity, *rest in rows}


def test_the_tables_have_mean_deviation_and_seeds_of_every_quantity(reported):
    experts = table(reported / "table.csv")
    explains = "own action explains best (chance 0.2)"
    assert experts["prelar_plus", explains] == ["0.65", "0.14", "2"]
    assert experts["prelar_plus", "action usage (0 ignored, 1 perfect)"][0] == "0.5625"
    assert experts["fsq", "R² (better), latent action"] == ["0.4", "0", "1"]
    assert experts["prelar_plus", "R² (better), latent action"][0] == "0.36"
    assert experts["fsq", "PSNR, own actions minus last frame (dB)"][0] == "0.5"
    assert list(experts)[0][0] == "fsq"
    toy = table(reported / "toy.csv")
    assert toy["prelar_plus", "transfer, PSNR of transferred minus own (dB)"][0] == "-1.5"
    assert not any("transfer" in quantity for _, quantity in experts)


def test_a_value_that_is_no_number_counts_for_nothing(reported):
    name = "rank corr., latent and state distance"
    assert ("fsq", name) not in table(reported / "table.csv")
    with open(reported / "runs.csv", newline="", encoding="utf-8") as file:
        runs = list(csv.DictReader(file))
    assert [line[name] for line in runs] == [""] * 4
    assert [line["seed"] for line in runs] == ["0", "0", "1", "0"]


def test_the_names_of_the_first_study_stay():
    assert set(OLD) <= set(QUANTITIES)
    assert {*SHOWN, *(goal.quantity for goal in GOALS)} <= set(QUANTITIES)


def test_goals_are_met_missed_or_not_run(reported):
    lines = (reported / "table.md").read_text(encoding="utf-8").splitlines()
    lines = [[x.strip() for x in line.split("|")[1:-1]] for line in lines[2 : 2 + len(GOALS)]]
    verdicts = {(data, text): (variant, x) for data, variant, text, _, x in lines}
    plus = "prelar_plus"
    assert verdicts == {
        ("experts", "own action explains best, at least 0.6"): (
            plus,
            "met, by less than the deviation",
        ),
        ("experts", "exchanging actions costs at least 1 dB"): (plus, "missed"),
        ("experts", "R² without labels, at least 0.15 above the random encoder's"): (plus, "met"),
        ("experts", "R² with 2% of labels, at least 0.7"): ("prelar_plus_labels", "not run"),
        ("experts", "better than repeating the last frame"): ("the best: fsq", "met"),
        ("toy", "R² without labels, at least 0.8"): (plus, "missed"),
        ("toy", "own action explains best, at least 0.8"): (plus, "met"),
        ("toy", "transferred actions at most 2 dB behind own"): (plus, "met"),
        ("toy", "better than repeating the last frame"): (f"the best: {plus}", "missed"),
    }


def test_the_report_has_one_picture_for_each_data_set(reported):
    assert {path.name for path in reported.glob("*.*")} == {
        *("table.csv", "toy.csv", "runs.csv", "table.md", "experts.png", "toy.png")
    }


# Running it


def program(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    """What the program ends with, started in this process."""
    monkeypatch.setattr(sys, "argv", ["study.py", *arguments])
    monkeypatch.setattr(sys, "path", ["", *sys.path])  # whose first it replaces
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "benchmarks" / "study.py"), run_name="__main__")
    return end.value.code


def study(root: Path, results: Path) -> str:
    """Works through the trial in this process; what it prints."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as out:
        patch.setattr(study_jobs, "load_study", lambda: TRIAL)
        patch.setattr(sweep, "prepare_source", lambda root, **_: sweep.Source("a commit"))
        run_programs_here(patch)
        shorten_mlp_probe(patch)
        assert not program(patch, "--root", str(root), "--results", str(results))
    return out.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("study")
    out = study(folder / "root", folder / "results")
    return SimpleNamespace(folder=folder, results=folder / "results", out=out)


def test_a_run_says_what_made_it_and_holds_all_probes(finished):
    assert " finished" in row(finished.out, "toy/probe/soft-0")
    (path,) = (finished.results / "runs").rglob("*.json")
    assert path.parts[-2:] == ("toy", "soft-0.json")
    text = path.read_text(encoding="utf-8")
    made = json.loads(text)
    assert made["commit"] == made["pretraining_commit"] == "a commit"
    assert (made["data"], made["variant"], made["seed"]) == ("toy", "soft", 0)
    assert made["inputs"]["needs"]["settings"]["updates"] == 3
    assert made["inputs"]["needs"]["needs"]["settings"] == VIDEOS
    assert str(finished.folder) not in text and len(text) < 5_000
    found = table(finished.results / "toy.csv")
    missing = {name for name in QUANTITIES if ("soft", name) not in found}
    assert missing <= {name for name in QUANTITIES if name.startswith("rank corr.")}


def test_finished_runs_are_not_repeated_where_only_their_files_are_left(finished, tmp_path):
    results = tmp_path / "results"
    shutil.copytree(finished.results / "runs", results / "runs")
    out = study(tmp_path / "empty", results)
    assert "starts" not in out and "1 finished" in out
    assert not (tmp_path / "empty" / "toy").exists()
    assert contents(results) == contents(finished.results)


def test_the_state_of_all_is_shown_and_nothing_run(monkeypatch, tmp_path, capsys):
    places = ["--root", str(tmp_path / "root"), "--results", str(tmp_path / "results")]
    assert not program(monkeypatch, "toy", "--only", "kl_0.1-0", *places, "--status")
    assert " waiting" in row(capsys.readouterr().out, "toy/probe/kl_0.1-0")
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["robots"], "error: no data set 'robots' in study.yaml; choose experts, toy"),
        (["--only", "nothing"], "error: --only 'nothing' matches none of"),
    ],
)
def test_what_cannot_be_run_is_said_in_one_line(monkeypatch, arguments, message):
    said = program(monkeypatch, *arguments, "--status")
    assert said.startswith(message) and "\n" not in said


def test_a_number_that_cannot_be_is_said_in_one_line(monkeypatch, capsys):
    assert program(monkeypatch, "--seeds", "0", "--status") == 2
    assert "--seeds 0 must be at least 1" in capsys.readouterr().err
