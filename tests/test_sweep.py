"""Sweeps: which runs there are, and that stopping one in any way loses and repeats nothing."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import time
from contextlib import redirect_stdout, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

from prelar_trl.recipes.collect_videos import env_names
from prelar_trl.recipes.command_line import as_override
from prelar_trl.recipes.sweep import make_jobs, make_suite, sweep
from prelar_trl.record import SUMMARY, Progress
from prelar_trl.sweep import Job, Suite, Variant
from prelar_trl.sweep.engine import PROGRESS
from prelar_trl.sweep.results import CurveResults
from tests.files import contents
from tests.sweeps import (
    command,
    environment,
    git,
    make_repository,
    row,
    run,
    sweep_config,
    wait_for,
)
from tests.toy_runs import CLIPS, STEPS, TINY, configured

pytestmark = pytest.mark.timeout(900)  # some ten programs are started
EXPERIMENTS = ("toy", "toy_shifted", "metaworld")
MODEL = {"size": "tiny", **{f"model.{name}": value for name, value in TINY.items()}}
LONG = {"env_steps": 400, "eval_every": 100, "checkpoint_every": 50}
TRIAL = {
    "name": "trial",
    "environments": {"toy": {"env": "toy", "max_steps": 10}},
    "seeds": 1,
    "score": "return",
    "threshold": 1,
    "runtime": {"device": "cpu", "threads": 1},
    "videos": {"env": "toy", "episodes": 5, "max_steps": 8, "after_success": None},
    "pretrain": {**MODEL, **CLIPS, "updates": 3},
    "finetune": {**MODEL, **STEPS},
    "variants": {
        "dreamerv2": {"label": "D", "color": "k", "finetune": {"method": "dreamerv2", **LONG}},
        "apv": {
            "label": "A",
            "color": "r",
            "pretrain": {"method": "apv"},
            "finetune": {"method": "apv"},
        },
        "broken": {
            "label": "B",
            "color": "g",
            "finetune": {"method": "dreamerv2", "prefill": 1000},
        },
    },
}
TABLE = "configs/experiment/trial.yaml"
EXPERIMENT = "# @package _global_\n# sweep.py: a trial\n" + yaml.safe_dump(TRIAL, sort_keys=False)


def jobs_of(*given: str) -> list[Job]:
    return make_jobs(sweep_config(*given))


def sweep_program(repository: Path, *arguments: str) -> subprocess.CompletedProcess:
    return run(repository, "recipes/sweep.py", "experiment=trial", *arguments)


def sweep_here(repository: Path, *arguments: str, root: Path | None = None) -> str:
    """What the sweep prints, in this process: where it starts no program of its own."""
    places = [f"root={root or repository / 'runs/sweep'}", f"results={repository}/results/curves"]
    given = ["experiment=trial", *places, "copy_code=false", *arguments]
    with redirect_stdout(io.StringIO()) as out:
        assert sweep(sweep_config(*given, repository=repository)) == 0
    return out.getvalue()


# Which runs there are


def test_every_variant_gets_a_seed_before_any_gets_the_next():
    for name in EXPERIMENTS:
        cfg = sweep_config(f"experiment={name}")
        seeds = [job.run["seed"] for job in make_jobs(cfg) if job.run]
        assert seeds == sorted(seeds) and set(seeds) == set(range(cfg.seeds))


def test_jobs_come_after_what_they_need_and_once():
    for name in EXPERIMENTS:
        jobs = jobs_of(f"experiment={name}")
        paths = [job.path for job in jobs]
        assert len(set(paths)) == len(paths)
        for i, job in enumerate(jobs):
            assert job.needs is None or job.needs.path in paths[:i]


def test_variants_share_a_pretraining_run_of_their_seed():
    jobs = {job.name: job for job in jobs_of("experiment=toy")}
    assert jobs["naive-toy-3"].needs is jobs["apv-toy-3"].needs is jobs["apv-3"]
    assert jobs["naive-toy-3"].settings["pretrained"] == "toy/pretrain/apv-3"
    assert jobs["apv-3"].settings["seed"] == jobs["naive-toy-3"].settings["seed"] == 3
    assert jobs["dreamerv2-toy-3"].needs is None
    assert {job.needs for job in jobs.values() if job.recipe == "pretrain"} == {jobs["videos"]}


def test_one_pretraining_run_can_serve_all_seeds():
    jobs = {job.name: job for job in jobs_of("experiment=toy", "pretrain_seeds=2")}
    assert {name for name in jobs if name.startswith("apv-") and "toy" not in name} == {
        *("apv-0", "apv-1")
    }
    assert jobs["naive-toy-5"].needs is jobs["apv-toy-3"].needs is jobs["apv-1"]
    assert jobs["naive-toy-5"].settings["seed"] == 5


def test_runs_from_scratch_serve_both_suites_and_others_see_their_own_videos():
    jobs = {job.name: job for job in jobs_of("experiment=toy_shifted")}
    toy = {job.name: job for job in jobs_of("experiment=toy")}
    assert jobs["dreamerv2-toy-0"].path == toy["dreamerv2-toy-0"].path
    assert jobs["dreamerv2-toy-0"].inputs == toy["dreamerv2-toy-0"].inputs
    assert jobs["prelar-toy-0"].suite == jobs["prelar-0"].suite == "toy_shifted"
    assert jobs["videos"].settings == {**toy["videos"].settings, "env": "toy/shifted"}


def test_methods_and_tasks_choose_from_an_experiment():
    jobs = jobs_of("experiment=toy", "methods=[naive,dreamerv2]", "seeds=1")
    assert [job.name for job in jobs] == ["videos", "apv-0", "naive-toy-0", "dreamerv2-toy-0"]
    with pytest.raises(ValueError, match="methods: 'nonsense' is unknown; choose dreamerv2, "):
        jobs_of("experiment=toy", "methods=[nonsense]")
    with pytest.raises(ValueError, match="tasks: 'reach' is unknown; choose toy"):
        jobs_of("experiment=toy", "tasks=[reach]")


def test_without_an_experiment_methods_are_presets_and_tasks_environments():
    given = ["methods=[dreamerv2,naive]", "tasks=[metaworld/reach,toy]", "seeds=2"]
    jobs = {job.path: job for job in jobs_of(*given, "pretrain.data=mine", "finetune.size=tiny")}
    assert len(jobs) == 2 + 2 * 2 * 2  # two pre-training runs of APV
    run = jobs["sweep/finetune/naive-reach-1"]
    assert run.needs.settings == {"data": "mine", "method": "apv", "seed": 1}
    assert run.settings["env"] == "metaworld/reach" and run.settings["size"] == "tiny"
    for missing, message in (
        (["tasks=[toy]"], "no methods"),
        (["methods=[prelar]"], "no tasks"),
        (["methods=[prelar]", "tasks=[toy]"], "prelar has nothing to pre-train on"),
    ):
        with pytest.raises(ValueError, match=message):
            jobs_of(*missing)


def test_videos_of_metaworld_show_other_tasks_than_the_one_that_is_learned():
    cfg = sweep_config("experiment=metaworld")
    assert cfg.environments and not set(cfg.environments) & set(cfg.videos["tasks"])


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_job_has_settings_that_its_recipe_takes(experiment):
    for job in jobs_of(f"experiment={experiment}", "seeds=1"):
        given = [f"{name}={as_override(value)}" for name, value in job.settings.items()]
        given.append("data=here" if job.recipe == "collect_videos" else "run=here")
        cfg = configured(job.recipe, *given)
        if job.recipe == "collect_videos":
            assert env_names(cfg.env, cfg.tasks)
        if job.run:
            assert cfg.env_steps % cfg.eval_every == 0


def test_two_runs_of_one_name_are_refused():
    variants = {"prelar": Variant(), "prelar-door": Variant()}
    suite = Suite("suite", variants, {"close": {}, "door-close": {}}, seeds=2)
    assert len(suite.jobs(["prelar"])) == 4
    with pytest.raises(ValueError, match="two runs would be suite/finetune/prelar-door-close-0: "):
        suite.jobs()


def test_a_variant_with_an_unknown_setting_is_refused():
    cfg = sweep_config("experiment=toy", "variants.apv.colour=red")
    with pytest.raises(ValueError, match="variants.apv is no mapping of label, color, line"):
        make_suite(cfg)


def test_overrides_are_written_as_hydra_reads_them():
    value = {"reward": 10.0, "kl": None, "names": ["a", 1, True]}
    assert as_override(value) == "{reward:10.0,kl:null,names:[a,1,true]}"
    assert as_override(["~/a", "3", "b (1)", "c/d"]) == "['~/a','3','b (1)',c/d]"


@pytest.mark.parametrize(
    "value",
    [
        {"Videos (1)": 1, "a,b": 2, "c:d": 3, "e=f": 4, "{g}": 5, "h\\i": 6},
        ["", "a", "b\\", "c\\,d", "e'f", "null", "1e3", "~"],
        {"names": ["Videos (1)", ""], "more": {"x y": None}},
        "",
        "a\\",
    ],
)
def test_overrides_are_read_by_hydra_as_they_were(value):
    override = OverridesParser.create().parse_override(f"key={as_override(value)}")
    assert override.value() == value


@pytest.mark.parametrize("key", ["a~b", "2024", "true", "\u00e4"])
def test_a_key_that_hydra_cannot_read_is_named(key):
    with pytest.raises(ValueError, match=f"'{key}' cannot be a key on a command line: rename it"):
        as_override({key: 1})


def test_progress_and_speed_are_read_from_the_log_of_a_run():
    log = io.StringIO()
    with Progress(5_000, initial=250, name="finetune", unit="steps", every=0, stream=log) as bar:
        bar.update(250, frames=99, metrics={"updates": 3, "image": 12.5})
    running, ended = log.getvalue().splitlines()
    for line in (running, ended):
        ((step, total, unit, rate),) = PROGRESS.findall(line)
        assert (step, total, unit) == ("500", "5000", "steps") and float(rate) > 0


# Stopping and going on


def evaluated(path: Path) -> list[int]:
    with open(path, newline="") as file:
        return [int(line["step"]) for line in csv.DictReader(file)]


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> SimpleNamespace:
    """A sweep that was paused, then killed without notice, within its first run."""
    repository = make_repository(tmp_path_factory.mktemp("repository"), TABLE, EXPERIMENT)
    # A tree that is being worked on: what is not committed must not count.
    (repository / "recipes" / "finetune.py").write_text("raise RuntimeError('half written')\n")
    root = repository / "runs" / "sweep"
    line = command(repository, "recipes/sweep.py", "experiment=trial")
    folder = root / "trial" / "finetune" / "dreamerv2-toy-0"
    with open(repository / "runs.log", "w") as log:
        process = subprocess.Popen(
            line,
            cwd=repository,
            env=environment(repository),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    last = folder / "checkpoints" / "last.pt"
    try:
        wait_for(lambda: last.is_file() or process.poll() is not None)
        assert process.poll() is None, (repository / "runs.log").read_text()
        os.killpg(process.pid, signal.SIGSTOP)
        time.sleep(0.3)  # what had begun
        before = contents(root / "trial")
        with pytest.raises(RuntimeError) as refused:
            sweep_here(repository)
        status = sweep_here(repository, "status=true")
        paused = contents(root / "trial") == before
    finally:
        process.kill()
        process.wait()
        with suppress(ProcessLookupError):  # helpers of the runs end by themselves, awake
            os.killpg(process.pid, signal.SIGCONT)
    wait_for(lambda: " running " not in sweep_here(repository, "status=true"))  # runs end with it
    return SimpleNamespace(
        repository=repository,
        root=root,
        run=folder,
        commit=git(repository, "rev-parse", "HEAD"),
        refused=str(refused.value),
        status=status,
        paused=paused,
        afterwards=sweep_here(repository, "status=true"),
    )


@pytest.fixture(scope="module")
def continued(killed) -> SimpleNamespace:
    """The same sweep, started again, to its end."""
    done = sweep_program(killed.repository)
    return SimpleNamespace(**vars(killed), done=done, results=killed.repository / "results/curves")


def test_a_stopped_process_group_pauses_all_runs(killed):
    assert killed.paused


def test_a_second_sweep_on_the_same_root_refuses(killed):
    assert killed.refused.startswith("another sweep is at work")


def test_the_table_of_states_can_be_seen_at_any_time(killed):
    assert " running " in row(killed.status, "trial/finetune/dreamerv2-toy-0")
    assert " waiting" in row(killed.status, "trial/finetune/broken-toy-0")
    assert " stopped" in row(killed.afterwards, "trial/finetune/dreamerv2-toy-0")
    assert "running" not in killed.afterwards


def test_a_killed_sweep_goes_on_where_it_was(continued):
    assert "continues: trial/finetune/dreamerv2-toy-0" in continued.done.stdout
    versions = json.loads((continued.run / "versions.json").read_text())
    assert versions["continued"][0]["step"] >= 50
    runs = continued.results / "trial" / "runs"
    assert evaluated(runs / "dreamerv2-toy-0.csv") == list(range(100, 401, 100))
    assert evaluated(runs / "apv-toy-0.csv") == [40, 60]


def test_a_run_says_what_made_it_and_names_no_place_on_this_machine(continued):
    text = (continued.results / "trial" / "runs" / "apv-toy-0.json").read_text()
    made = json.loads(text)
    assert made["commit"] == made["pretraining_commit"] == continued.commit
    assert (made["variant"], made["task"], made["seed"]) == ("apv", "toy", 0)
    assert made["config"]["env_steps"] == 60 and made["inputs"]["settings"]["method"] == "apv"
    assert made["inputs"]["needs"]["settings"]["updates"] == 3
    assert made["minutes"] > 0 and "torch" in made["versions"]["packages"]
    assert str(continued.repository) not in text
    git_state = json.loads((continued.run / "versions.json").read_text())["git"]
    assert git_state == {"commit": continued.commit, "dirty": False}


def test_the_manifest_lists_every_job_with_its_state_and_settings(continued):
    manifest = json.loads((continued.root / "trial" / "manifest.json").read_text())
    assert manifest["commit"] == continued.commit
    states = {path: job["state"] for path, job in manifest["jobs"].items()}
    assert states.pop("trial/finetune/broken-toy-0") == "failed"
    assert set(states.values()) == {"finished"} and len(states) == 4
    apv = manifest["jobs"]["trial/finetune/apv-toy-0"]
    assert apv["needs"] == "trial/pretrain/apv-0" and apv["settings"]["method"] == "apv"


def test_a_failed_run_does_not_stop_the_others(continued):
    assert continued.done.returncode == 1
    line = row(continued.done.stdout, "trial/finetune/broken-toy-0")
    assert " failed " in line and "prefill=1000 leaves nothing" in line


def test_the_report_compares_what_is_finished(continued):
    assert {path.name for path in (continued.results / "trial").iterdir()} == {
        *("curves.png", "steps.png", "table.csv", "table.md", "runs")
    }
    with open(continued.results / "summary.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    columns = "suite,task,method,seeds,threshold,steps,ratio_to_dreamerv2,ratio_low,ratio_high"
    assert list(rows[0]) == columns.split(",")
    assert [line["method"] for line in rows] == ["dreamerv2", "apv"]
    assert (continued.results / "trial" / "table.md").read_text().startswith("| method | runs |")


def test_a_table_that_is_no_suites_is_left_out_of_the_summary(tmp_path):
    for folder, text in (
        ("toy", ",".join(SUMMARY) + "\ntoy,toy,apv,8,20,5,1,1,1\n"),
        ("own", "a\n1\n"),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "table.csv").write_text(text)
    CurveResults(tmp_path)._summarize()
    with open(tmp_path / "summary.csv", newline="") as file:
        assert [row["method"] for row in csv.DictReader(file)] == ["apv"]


def test_finished_runs_are_not_repeated_where_only_the_results_are_left(continued, tmp_path):
    before = contents(continued.results)
    chosen = "methods=[dreamerv2,apv]"
    out = sweep_here(continued.repository, chosen, root=tmp_path / "empty")
    assert "starts" not in out and "2 finished" in out
    assert not (tmp_path / "empty" / "trial" / "finetune").exists()
    assert contents(continued.results) == before


def test_runs_from_scratch_with_other_settings_are_not_shared(continued):
    shared = ["name=other", "from_scratch=trial", "methods=[dreamerv2]", "status=true"]
    out = sweep_here(continued.repository, *shared)
    assert " finished" in row(out, "trial/finetune/dreamerv2-toy-0")
    message = (
        "from_scratch=trial: trial/finetune/dreamerv2-toy-0 was run with other settings; leave"
    )
    with pytest.raises(ValueError, match=message):
        sweep_here(continued.repository, *shared, "finetune.lr=0.5")


def test_a_later_commit_counts_only_when_asked_for(continued, tmp_path):
    repository = shutil.copytree(continued.repository, tmp_path / "repository", symlinks=True)
    table = repository / TABLE
    table.write_text(table.read_text().replace("prefill: 1000", "prefill: 20"))
    recipe = repository / "recipes" / "finetune.py"
    git(repository, "checkout", "recipes")
    call = "finetune(cfg, processes=processes)"
    assert call in recipe.read_text()
    recipe.write_text(recipe.read_text().replace(call, f"{call}; print('new')"))
    git(repository, "commit", "--quiet", "--all", "-m", "mended")
    log = repository / "runs" / "sweep" / "trial" / "finetune" / "broken-toy-0.log"
    before = contents(repository / "results" / "curves" / "trial" / "runs")
    old = sweep_program(repository, "only=nothing|apv")  # takes what is there
    assert old.returncode == 0 and "update_code=true" in old.stdout
    new = sweep_program(repository, "update_code=true")
    assert new.returncode == 0, new.stdout + new.stderr
    assert new.stdout.count("starts: ") == 1 and "continues" not in new.stdout
    assert log.read_text().splitlines()[-1] == "new"
    after = contents(repository / "results" / "curves" / "trial" / "runs")
    made = json.loads(after.pop("broken-toy-0.json"))
    del after["broken-toy-0.csv"]
    assert made["commit"] == git(repository, "rev-parse", "HEAD") != continued.commit
    assert after == before
