"""The published comparison: its runs, its evaluation grid, what it would take."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from prelar_trl.recipes.collect_videos import EVALUATION_TASKS
from prelar_trl.recipes.estimate import checkpoints_of, resolve, update_of, work_of
from prelar_trl.recipes.finetune import finetune
from prelar_trl.recipes.schema import FinetuneConfig, PretrainConfig
from prelar_trl.recipes.sweep import check_settings, make_jobs, sweep
from prelar_trl.record import read_metrics
from tests.sweeps import sweep_config
from tests.toy_runs import finetune_config

SYSTEMS = {"dreamerv2", "apv", "contextwm", "prelar", "prelar_no_cl", "prelar_no_al_cl"}
SYSTEMS |= {"naive", "prelar_naive"}
TINY = "{size: tiny, updates: 10, batch_size: 2, clip_len: 5}"


def test_the_paper_is_every_system_on_six_tasks_with_eight_seeds_on_both_kinds_of_video():
    jobs = make_jobs(sweep_config("experiment=prelar_paper"))
    runs = [job for job in jobs if job.run]
    variants = {job.run["variant"] for job in runs}
    assert variants == SYSTEMS | {"apv_something", "contextwm_something", "prelar_something"}
    assert {job.run["task"] for job in runs} == set(EVALUATION_TASKS)
    assert {job.run["seed"] for job in runs} == set(range(8))
    assert len(runs) == len(variants) * 6 * 8
    pretrained = {job.name: job.settings for job in jobs if job.recipe == "pretrain"}
    data = {name: given["data"] for name, given in pretrained.items()}
    assert data == {
        **dict.fromkeys(("apv-0", "contextwm-0", "prelar-0"), "videos/rlbench"),
        **dict.fromkeys(("prelar_no_cl-0", "prelar_no_al_cl-0"), "videos/rlbench"),
        **{f"{x}_something-0": "videos/something" for x in ("apv", "contextwm", "prelar")},
    }
    shared = {job.run["variant"]: job.needs and job.needs.name for job in runs}
    assert shared["naive"] == "apv-0" and shared["prelar_naive"] == "prelar-0"
    assert shared["dreamerv2"] is None and shared["prelar_something"] == "prelar_something-0"


def test_its_runs_are_the_published_commands():
    jobs = make_jobs(sweep_config("experiment=prelar_paper", "seeds=1", "tasks=[reach]"))
    check_settings(jobs)
    for job in jobs:
        cfg = resolve(job)
        assert cfg.size == "full"
        if job.recipe == "pretrain":
            assert (cfg.updates, cfg.batch_size, cfg.clip_len) == (600_000, 16, 25)
        else:
            assert cfg.env == "metaworld/reach" and cfg.eval_episodes == 10
            assert (cfg.prefill, cfg.eval_from, cfg.eval_every) == (5_000, 5_000, 10_000)
            assert cfg.env_steps == 255_000 and work_of(cfg)[1] == 255_000 + 26 * 10 * 500
            assert cfg.pretrained == (job.needs.path if job.needs else None)


def test_a_setting_that_a_recipe_does_not_take_is_refused_before_anything_is_run():
    cfg = sweep_config("experiment=prelar_paper", "finetune.nonsense=3")
    with pytest.raises(ValueError, match="prelar_paper/finetune/.*: .*nonsense"):
        check_settings(make_jobs(cfg))


def test_the_first_evaluation_comes_before_the_first_policy_step(tmp_path):
    grid = {"prefill": 20, "eval_from": 20, "eval_every": 15, "env_steps": 50, "eval_episodes": 1}
    finetune(finetune_config(tmp_path / "run", method="dreamerv2", **grid))
    evaluations = read_metrics(tmp_path / "run" / "metrics.csv")["eval/success"]
    assert evaluations.steps.tolist() == [20, 35, 50]


def test_an_evaluation_within_the_random_steps_is_refused(tmp_path):
    with pytest.raises(ValueError, match="eval_from=10 lies in the prefill of 20 steps"):
        finetune(finetune_config(tmp_path / "run", method="dreamerv2", eval_from=10))


def dry_run(capsys, tmp_path, *given: str) -> str:
    places = [f"root={tmp_path / 'root'}", f"results={tmp_path / 'results'}"]
    assert sweep(sweep_config(*given, *places, "dry_run=true")) == 0
    assert not (tmp_path / "root").exists()
    return capsys.readouterr().out


TRIAL = ("methods=[dreamerv2,apv]", "tasks=[toy]", "seeds=2", "pretrain.data=v", f"pretrain={TINY}")
TRIAL += ("finetune={size: tiny, env_steps: 1000, prefill: 500, train_every: 1, max_steps: 10}",)
TRIAL += ("finetune.batch_size=2", "finetune.batch_length=8", "finetune.horizon=3")


def test_a_dry_run_lists_runs_and_declared_hours_and_disk(capsys, tmp_path):
    out = dry_run(capsys, tmp_path, *TRIAL)
    for path in ("finetune/apv-toy-1", "finetune/dreamerv2-toy-0", "pretrain/apv-1"):
        assert f"sweep/{path}" in out
    assert "2 pre-training and 4 fine-tuning runs" in out
    assert "DECLARED, not measured: counted operations at 10 TFLOP/s" in out
    apv = next(line for line in out.splitlines() if line.startswith("apv ")).split()
    assert apv[1] == "2" and apv[3:5] == ["2", "1,200"]  # 100 + 500 updates each
    assert re.search(r"disk: \d+ GiB of checkpoints stay", out)


@pytest.mark.parametrize(
    "options", [{"model": {"frames": "flow"}}, {"labels": 0.5}], ids=["flow", "labels"]
)
def test_a_pretraining_update_with_further_entries_is_counted(options):
    plain = PretrainConfig(data="x", run="x", size="tiny", batch_size=2, clip_len=3)
    cost = update_of(replace(plain, **options))
    assert cost.flop > 0 and cost != update_of(plain)


def test_two_cameras_cost_more_than_one():
    one = FinetuneConfig(run="x", size="tiny", batch_size=2, batch_length=5)
    two = update_of(replace(one, cameras=["corner", "gripperPOV"]))
    cost = update_of(one)
    assert two.flop > cost.flop and two.state_bytes > cost.state_bytes


def test_evaluations_are_those_that_a_run_makes():
    """Every 100 steps after 500 random ones, and where the last of them is not, at the end."""
    cfg = FinetuneConfig(run="x", env_steps=1000, prefill=500, eval_every=100, eval_episodes=1)
    cfg.max_steps, cfg.action_repeat = 10, 1
    for env_steps, evaluations in ((1000, 5), (1050, 6), (550, 1)):
        cfg.env_steps = env_steps
        assert work_of(cfg)[1] == env_steps + evaluations * 10


def test_a_limit_of_steps_is_counted_after_the_repeat_an_environments_own_before():
    cfg = FinetuneConfig(run="x", env_steps=1000, prefill=500, eval_every=500, eval_episodes=1)
    cfg.action_repeat = 2
    for max_steps, episode in ((None, 500), (10, 20)):
        cfg.max_steps = max_steps
        assert work_of(cfg)[1] == 1000 + episode


def test_checkpoints_that_stay_are_counted():
    cfg = FinetuneConfig(run="x", env_steps=1000, prefill=500, checkpoint_every=100)
    assert checkpoints_of(cfg) == 2 + 1  # the newest two and the best
    for every, stay in ((50, 10), (100, 10), (300, 3)):
        cfg.keep_every = every
        assert checkpoints_of(cfg) == 2 + 1 + stay
    cfg = PretrainConfig(data="x", run="x", updates=1000, checkpoint_every=100, keep_every=500)
    assert checkpoints_of(cfg) == 2 + 2


def test_measured_updates_take_the_place_of_declared_ones(capsys, tmp_path):
    row = {"method": "apv", "phase": "pretrain", "size": "tiny", "batch": 2, "length": 5}
    row |= {"precision": "32", "world_model_ms": 3_600_000.0, "behavior_ms": 0.0}
    report = tmp_path / "report.json"
    report.write_text(json.dumps({"rows": [row], "gpu": "GPU X", "machine": "x86_64"}))
    out = dry_run(capsys, tmp_path, *TRIAL, f"update_times={report}")
    assert "measured updates of 1 runs' settings on GPU X; DECLARED" in out
    apv = next(line for line in out.splitlines() if line.startswith("apv ")).split()
    assert apv[2] == "20.0"  # two runs of ten updates of an hour
    report.write_text("[]")
    with pytest.raises(ValueError, match="is no report of make gpu .* or benchmarks/train.py"):
        dry_run(capsys, tmp_path, *TRIAL, f"update_times={report}")


def test_a_report_of_make_gpu_gives_the_hours(capsys, tmp_path):
    row = {"method": "apv", "phase": "pretrain", "size": "tiny", "batch": 2, "length": 5}
    row |= {"precision": "32", "compile": "off", "world_model_ms": 3_600_000.0, "behavior_ms": 0.0}
    failed = {name: row[name] for name in ("method", "phase")} | {"error": "out of memory"}
    device = {"device": "cuda", "name": "GPU X"}
    report = {"device": device, "times": {"results": [failed, row]}, "rendering": {"seconds": 1}}
    path = tmp_path / "gpu.json"

    def hours(*options: str) -> str:
        path.write_text(json.dumps(report))
        out = dry_run(capsys, tmp_path, *TRIAL, f"update_times={path}", *options)
        assert "measured updates of 1 runs' settings on GPU X; DECLARED" in out
        return next(line for line in out.splitlines() if line.startswith("apv ")).split()[2]

    assert hours() == "20.0"
    fast = row | {"compile": "auto", "world_model_ms": 1_800_000.0}
    report["times"] = {"results": [failed, row, fast], "error": "cut off after 9 s"}
    assert hours() == "10.0"
    assert hours("pretrain.compile=off") == "20.0"


def test_operations_grow_with_the_batch():
    jobs = make_jobs(sweep_config(*TRIAL, "seeds=1"))
    cfg = resolve(next(job for job in jobs if job.recipe == "pretrain"))
    once, bytes_once = update_of(cfg)
    cfg.batch_size *= 2
    twice, bytes_twice = update_of(cfg)
    assert twice == pytest.approx(2 * once, rel=0.02) and bytes_twice == bytes_once > 0
