"""The campaign: which runs there are, and that stopping it in any way loses and repeats nothing."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from hydra import compose, initialize_config_dir

from benchmarks.jobs import PROGRESS
from benchmarks.suites import TABLE, expand, load_suites, override
from prelar_trl.recipes.collect_videos import env_names
from prelar_trl.recipes.entry import settings
from prelar_trl.record import Progress
from tests.campaigns import campaign, command, contents, git, make_repository, row, wait_for
from tests.toy_runs import CLIPS, ROOT, STEPS, TINY

pytestmark = pytest.mark.timeout(900)  # some thirty programs are started
SUITES = load_suites(TABLE)
MODEL = {"size": "tiny", **{f"model.{name}": value for name, value in TINY.items()}}
LONG = {"env_steps": 600, "eval_every": 100, "checkpoint_every": 50}
TRIAL = {
    "trial": {
        "tasks": {"toy": {"env": "toy", "max_steps": 10}},
        "seeds": 1,
        "score": "return",
        "threshold": 1,
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
}


# Which runs there are


def test_every_variant_gets_a_seed_before_any_gets_the_next():
    for name in SUITES:
        seeds = [job.run["seed"] for job in expand(SUITES, name) if job.run]
        assert seeds == sorted(seeds) and set(seeds) == set(range(SUITES[name].seeds))


def test_jobs_come_after_what_they_need_and_once():
    for name in SUITES:
        jobs = expand(SUITES, name)
        paths = [job.path for job in jobs]
        assert len(set(paths)) == len(paths)
        for i, job in enumerate(jobs):
            assert job.needs is None or job.needs.path in paths[:i]


def test_variants_share_a_pretraining_run_of_their_seed():
    jobs = {job.name: job for job in expand(SUITES, "toy")}
    assert jobs["naive-toy-3"].needs is jobs["apv-toy-3"].needs is jobs["apv-3"]
    assert jobs["naive-toy-3"].settings["pretrained"] == "toy/pretrain/apv-3"
    assert jobs["apv-3"].settings["seed"] == jobs["naive-toy-3"].settings["seed"] == 3
    assert jobs["dreamerv2-toy-3"].needs is None
    assert {job.needs for job in jobs.values() if job.recipe == "pretrain"} == {jobs["videos"]}


def test_runs_from_scratch_serve_both_suites_and_others_see_their_own_videos():
    jobs = {job.name: job for job in expand(SUITES, "toy_shifted")}
    assert jobs["dreamerv2-toy-0"].suite == "toy"
    assert jobs["prelar-toy-0"].suite == jobs["prelar-0"].suite == "toy_shifted"
    assert jobs["videos"].settings == {**SUITES["toy"].videos, "env": "toy/shifted"}


def test_a_run_from_scratch_with_settings_of_its_own_is_not_shared(tmp_path):
    table = yaml.safe_load(TABLE.read_text())
    table["toy_shifted"]["finetune"] = {"env_steps": 9_000}
    (tmp_path / "suites.yaml").write_text(yaml.safe_dump(table))
    jobs = expand(load_suites(tmp_path / "suites.yaml"), "toy_shifted")
    assert {job.suite for job in jobs} == {"toy_shifted"}


def test_videos_of_metaworld_show_other_tasks_than_the_one_that_is_learned():
    suite = SUITES["metaworld"]
    assert not set(suite.tasks) & set(suite.videos["tasks"])


@pytest.mark.parametrize("suite", SUITES)
def test_every_job_has_settings_that_its_recipe_takes(suite):
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        for job in expand(SUITES, suite):
            if job.settings.get("seed", 0) > 0:
                continue
            given = [f"{name}={override(value)}" for name, value in job.settings.items()]
            given.append("data=here" if job.recipe == "collect_videos" else "run=here")
            cfg = settings(compose(job.recipe, given))
            if job.recipe == "collect_videos":
                assert env_names(cfg.env, cfg.tasks)
            if job.run:
                assert cfg.env_steps % cfg.eval_every == 0


def test_overrides_are_written_as_hydra_reads_them():
    value = {"reward": 10.0, "kl": None, "names": ["a", 1, True]}
    assert override(value) == "{reward:10.0,kl:null,names:[a,1,true]}"


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
    """A campaign that was paused, then killed without notice, within its first run."""
    repository = make_repository(tmp_path_factory.mktemp("repository"), "suites.yaml", TRIAL)
    # A tree that is being worked on: what is not committed must not count.
    (repository / "recipes" / "finetune.py").write_text("raise RuntimeError('half written')\n")
    root = repository / "runs" / "campaign"
    line = command(repository, "campaign.py", "trial")
    run = root / "trial" / "finetune" / "dreamerv2-toy-0"
    with open(repository / "runs.log", "w") as log:
        process = subprocess.Popen(line, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(lambda: (run / "checkpoints" / "last.pt").is_file() or process.poll() is not None)
        assert process.poll() is None, (repository / "runs.log").read_text()
        os.killpg(process.pid, signal.SIGSTOP)
        time.sleep(0.3)  # what had begun
        before = contents(root / "trial")
        second = campaign(repository, "trial")
        status = campaign(repository, "trial", "--status")
        paused = contents(root / "trial") == before
    finally:
        process.kill()
        process.wait()
        with suppress(ProcessLookupError):  # helpers of the runs end by themselves, awake
            os.killpg(process.pid, signal.SIGCONT)
    return SimpleNamespace(
        repository=repository,
        root=root,
        run=run,
        commit=git(repository, "rev-parse", "HEAD"),
        second=second,
        status=status.stdout,
        paused=paused,
        afterwards=campaign(repository, "trial", "--status").stdout,
    )


@pytest.fixture(scope="module")
def continued(killed) -> SimpleNamespace:
    """The same campaign, started again, to its end."""
    done = campaign(killed.repository, "trial")
    return SimpleNamespace(**vars(killed), done=done, results=killed.repository / "results/curves")


def test_a_stopped_process_group_pauses_all_runs(killed):
    assert killed.paused


def test_a_second_campaign_on_the_same_root_refuses(killed):
    assert killed.second.returncode == 1
    assert "another campaign is at work" in killed.second.stderr


def test_the_table_of_states_can_be_seen_at_any_time(killed):
    assert " running " in row(killed.status, "trial/finetune/dreamerv2-toy-0")
    assert " waiting" in row(killed.status, "trial/finetune/broken-toy-0")
    assert " stopped" in row(killed.afterwards, "trial/finetune/dreamerv2-toy-0")
    assert "running" not in killed.afterwards


def test_a_killed_campaign_goes_on_where_it_was(continued):
    assert "continues: trial/finetune/dreamerv2-toy-0" in continued.done.stdout
    versions = json.loads((continued.run / "versions.json").read_text())
    assert versions["continued"][0]["step"] >= 50
    runs = continued.results / "trial" / "runs"
    assert evaluated(runs / "dreamerv2-toy-0.csv") == list(range(100, 601, 100))
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


def test_finished_runs_are_not_repeated_where_only_the_results_are_left(continued, tmp_path):
    places = ["--root", str(tmp_path / "empty"), "--results", str(continued.results)]
    before = contents(continued.results)
    done = campaign(continued.repository, "trial", "--only", "dreamerv2|apv", *places)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "starts" not in done.stdout and "2 finished" in done.stdout
    assert not (tmp_path / "empty" / "trial").exists()
    assert contents(continued.results) == before


def test_a_later_commit_counts_only_when_asked_for(continued, tmp_path):
    repository = shutil.copytree(continued.repository, tmp_path / "repository", symlinks=True)
    table = repository / "benchmarks" / "suites.yaml"
    table.write_text(table.read_text().replace("prefill: 1000", "prefill: 20"))
    git(repository, "checkout", "recipes")
    git(repository, "commit", "--quiet", "--all", "-m", "mended")
    before = contents(repository / "results" / "curves" / "trial" / "runs")
    old = campaign(repository, "trial")  # tries the failed run again
    assert old.stdout.count("starts: ") == 1 and old.returncode == 1
    assert "--update-code" in old.stdout and " failed " in row(old.stdout, "trial/finetune/broken")
    new = campaign(repository, "trial", "--update-code")
    assert new.returncode == 0, new.stdout + new.stderr
    assert new.stdout.count("starts: ") == 1 and "continues" not in new.stdout
    after = contents(repository / "results" / "curves" / "trial" / "runs")
    made = json.loads(after.pop("broken-toy-0.json"))
    del after["broken-toy-0.csv"]
    assert made["commit"] == git(repository, "rev-parse", "HEAD") != continued.commit
    assert after == before
