"""Curves of many runs: what the tables say of them, whose they are, what is drawn."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from prelar_trl.recipes.plot import main as plot
from prelar_trl.recipes.schema import PlotConfig
from prelar_trl.record import (
    EvaluatedRun,
    Series,
    aggregate_curve,
    bootstrap_band,
    bootstrap_interval,
    comparison_plots,
    interquartile_mean,
    performance_profile,
    plot_learning_curves,
    read_reference,
    read_runs,
    write_learning_curves,
)
from prelar_trl.record.learning_curves import mean_band

STEPS = np.arange(5_000.0, 246_000.0, 10_000.0)  # the authors' grid


def evaluated(group: str, task: str, level: float, reference: bool = False) -> EvaluatedRun:
    """Rises in a line to ``level`` at the last step; ten times as much return."""
    success = level * STEPS / STEPS[-1]
    scores = {"success": Series(STEPS, success), "return": Series(STEPS, 10 * success)}
    return EvaluatedRun(group, task, scores, reference)


RUNS = [
    evaluated(group, task, level + 0.1 * seed)
    for group, level in (("dreamerv2", 0.2), ("prelar", 0.5))
    for task in ("reach", "door-lock")
    for seed in range(4)
]


def lines(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def find(rows: list[dict[str, str]], **wanted: str) -> dict[str, str]:
    (row,) = [row for row in rows if wanted.items() <= row.items()]
    return row


# Statistics


@pytest.mark.parametrize(("runs", "tasks", "drawn"), [(4, 1, 4), (5, 1, 0), (4, 2, 0)])
def test_few_runs_of_one_task_are_drawn_instead_of_their_interval(
    monkeypatch, tmp_path, runs, tasks, drawn
):
    monkeypatch.setattr(comparison_plots, "save_figure", lambda figure, path: figure)
    curves = np.random.default_rng(0).random((runs, tasks, 3))
    band = mean_band(np.arange(3.0), curves)
    figure = plot_learning_curves({"a task": {"mine": band}}, tmp_path / "a.png", score_name="x")
    (axis,) = figure.axes
    thin = [line.get_ydata() for line in axis.lines if line.get_linewidth() < 1]
    assert len(thin) == drawn and len(axis.collections) == (not drawn)
    assert all(np.array_equal(line, run) for line, run in zip(thin, curves[:, 0], strict=False))


def test_an_aggregated_band_is_the_interval_of_each_of_its_points():
    curves = np.random.default_rng(0).normal(size=(8, 3, 4))
    low, high = bootstrap_band(curves, statistic="iqm")
    for point in range(4):
        interval = bootstrap_interval(curves[..., point])
        assert (low[point], high[point]) == pytest.approx(interval, abs=1e-12)
    expected = [interquartile_mean(curves[..., point]) for point in range(4)]
    assert aggregate_curve(curves, "iqm") == pytest.approx(expected)
    assert aggregate_curve(curves) == pytest.approx(curves.mean(axis=(0, 1)))


def test_a_profile_is_the_share_of_runs_above_each_threshold():
    profile, low, high = performance_profile([[0.1, 0.9], [0.5, 0.9]], [0.0, 0.1, 0.5, 0.9])
    assert profile.tolist() == [1, 0.75, 0.5, 0]
    assert low[0] == high[0] == 1 and low[3] == high[3] == 0
    assert low[1] == 0.5 and high[1] == 1  # the first task's runs differ, the second's do not


# Tables and pictures


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """What is written of :data:`RUNS`."""
    folder = tmp_path_factory.mktemp("curves")
    write_learning_curves(RUNS, folder)
    return folder


def test_the_table_compares_at_the_published_steps_and_over_all_tasks(written):
    rows = lines(written / "table.csv")
    assert {row["step"] for row in rows} == {"105000", "205000", "245000"}
    assert {row["task"] for row in rows} == {"reach", "door-lock", "all"}
    last = find(rows, score="success", task="all", group="prelar", step="245000")
    assert float(last["mean"]) == pytest.approx(0.65) and last["runs"] == "4"
    assert float(last["iqm_low"]) < 0.65 < float(last["iqm_high"])
    # Of 16 pairs a task, prelar's 0.5 0.6 ... wins all but 0.5 against 0.5.
    assert float(last["better"]) == pytest.approx(15.5 / 16, abs=1e-4)
    assert (
        find(rows, score="return", task="reach", group="dreamerv2", step="105000")["better"] == ""
    )


def test_curves_hold_every_step_with_mean_and_interquartile_mean(written):
    rows = lines(written / "curves.csv")
    assert len(rows) == 2 * 3 * 2 * len(STEPS)
    row = find(rows, score="return", task="all", group="prelar", step="245000")
    assert float(row["mean"]) == pytest.approx(6.5) and float(row["iqm"]) == pytest.approx(6.5)
    assert float(row["mean_low"]) < 6.5 < float(row["mean_high"])


def test_every_picture_is_there_as_png_and_svg(written):
    kinds = [f"{score}_{kind}" for score in ("success", "return") for kind in
             ("tasks", "aggregate", "profile", "improvement")]  # fmt: skip
    for kind in kinds:
        with Image.open(written / f"{kind}.png") as picture:
            assert picture.width > 500 and np.unique(np.asarray(picture)).size > 20
        drawing = (written / f"{kind}.svg").read_text(encoding="utf-8")
        assert drawing.count("<path") > 5 and "dc:date" not in drawing


def test_a_reference_is_labelled_and_is_no_baseline(tmp_path):
    others = [evaluated("dreamerv2 (paper)", "reach", 0.9, reference=True)]
    others.append(evaluated("dreamerv2 (paper)", "elsewhere", 0.9, reference=True))
    write_learning_curves(RUNS[::4] + others, tmp_path)
    rows = lines(tmp_path / "table.csv")
    row = find(rows, score="success", task="reach", group="dreamerv2 (paper)", step="245000")
    assert row["reference"] == "True" and row["better"] == ""
    assert not [row for row in rows if row["task"] == "elsewhere"]
    assert not [row for row in rows if row["task"] == "all" and row["reference"] == "True"]


def test_runs_of_another_grid_are_compared_at_their_last_step(tmp_path):
    short = Series(np.array([10.0, 20.0]), np.array([0.0, 1.0]))
    runs = [
        EvaluatedRun("a", "toy", {"return": short}),
        EvaluatedRun("b", "toy", {"return": short}),
    ]
    (section,) = write_learning_curves(runs, tmp_path)
    assert {row.step for row in section.rows} == {20} and {row.task for row in section.rows} == {
        "toy"
    }
    with pytest.raises(ValueError, match="at=15: no return was evaluated then"):
        write_learning_curves(runs, tmp_path, at=[15])
    with pytest.raises(ValueError, match="baseline=c is no group; choose a, b"):
        write_learning_curves(runs, tmp_path, baseline="c")


def test_tasks_of_other_lengths_are_compared_where_they_were_evaluated(tmp_path):
    """A step that one task alone knows is in the table, and pictures of all take an earlier one."""
    long = [evaluated("a", "long", 0.5), evaluated("b", "long", 0.7)]
    for name, last in (("half", 105_000), ("short", 20_000)):
        short = [
            EvaluatedRun(run.group, name, {"success": Series(*(x[STEPS <= last] for x in s))})
            for run in long
            for s in (run.scores["success"],)
        ]
        (first, *_) = write_learning_curves(long + short, tmp_path / name)
        assert first.score == "success"
        steps = {(row.task, row.step) for row in first.rows}
        assert ("long", 245_000) in steps and (name, 245_000) not in steps
        captions = [caption for caption in first.pictures if caption.startswith("Performance")]
        expected = ["Performance profile at step 105,000"] if name == "half" else []
        assert captions == expected


def test_without_a_group_that_has_run_all_tasks_one_is_shown_and_named(tmp_path):
    (section, _) = write_learning_curves(
        [evaluated("a", "reach", 0.5), evaluated("b", "push", 0.5)], tmp_path
    )
    assert "Task reach" in section.pictures
    assert not [caption for caption in section.pictures if "together" in caption]


def test_runs_that_share_no_step_are_named(tmp_path):
    runs = [
        EvaluatedRun("a", "toy", {"return": Series(np.array([step]), np.array([1.0]))})
        for step in (10.0, 20.0)
    ]
    with pytest.raises(ValueError, match="no step at which return was evaluated in all runs"):
        write_learning_curves(runs, tmp_path)


# From disk


def write_run(folder: Path, method: str, seed: int, level: float, latent: str = "gaussian") -> None:
    folder.mkdir(parents=True)
    config = {"method": method, "env": "metaworld/reach", "seed": seed}
    config["model"] = {"latent_action": latent}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    values = level * STEPS / STEPS[-1]
    rows = [f"{int(s)},{x:.4f},{100 * x:.2f}" for s, x in zip(STEPS, values, strict=True)]
    (folder / "metrics.csv").write_text("\n".join(["step,eval/success,eval/return", *rows]))


@pytest.fixture
def folders(tmp_path) -> Path:
    root = tmp_path / "runs"
    for seed in range(2):
        write_run(root / f"dreamerv2-{seed}", "dreamerv2", seed, 0.3 + 0.1 * seed)
        write_run(root / "deep" / f"prelar-{seed}", "prelar", seed, 0.6 + 0.1 * seed, "fsq")
    (root / "pretrain").mkdir()
    (root / "pretrain" / "config.yaml").write_text("method: prelar\n")
    return root


def test_runs_are_found_in_folders_and_grouped_by_any_key(folders):
    runs = read_runs([folders], "method")
    assert [run.group for run in runs] == ["prelar", "prelar", "dreamerv2", "dreamerv2"]
    assert {run.task for run in runs} == {"reach"} and set(runs[0].scores) == {"success", "return"}
    nested = read_runs([folders / "deep"], "model.latent_action")
    assert [run.group for run in nested] == ["fsq", "fsq"]
    assert [run.group for run in read_runs([folders / "deep"], "seed")] == ["seed=0", "seed=1"]
    with pytest.raises(ValueError, match="has no config key model.nonsense"):
        read_runs([folders], "model.nonsense")
    with pytest.raises(ValueError, match="no evaluated run in"):
        read_runs([folders / "pretrain"], "method")


def test_what_a_sweep_keeps_of_its_runs_is_read_too(tmp_path):
    (tmp_path / "apv-toy-0.csv").write_text("step,return,success\n10,1.5,0\n20,2.5,1\n")
    made = {"variant": "apv", "config": {"method": "apv", "env": "toy"}}
    (tmp_path / "apv-toy-0.json").write_text(json.dumps(made))
    (tmp_path / "table.csv").write_text("a,b\n1,2\n")
    (run,) = read_runs([tmp_path], "variant")
    assert (run.group, run.task) == ("apv", "toy")
    assert run.scores["return"].values.tolist() == [1.5, 2.5]


def test_probed_runs_and_checkouts_of_code_are_no_runs_to_compare(folders):
    (folders / "pretrain" / "probe.csv").write_text("probe,name,horizon,value\npsnr,own,1,20.0\n")
    (folders / "pretrain" / "probe.json").write_text('{"method": "prelar", "values": {}}')
    (folders / "source" / ".git").mkdir(parents=True)  # a sweep's, which holds published results
    write_run(folders / "source" / "runs" / "apv-0", "apv", 0, 0.5)
    assert {run.group for run in read_runs([folders], "method")} == {"prelar", "dreamerv2"}


def test_a_run_that_is_named_twice_counts_once(folders):
    twice = [folders, folders / "dreamerv2-0", folders / "deep" / ".." / "dreamerv2-0"]
    assert len(read_runs(twice, "method")) == len(read_runs([folders], "method")) == 4


REFERENCE = "method,task,seed,env_step,success\napv,reach,0,15000,0.5\napv,reach,0,5000,0.1\n"


def test_a_reference_file_gives_runs_under_the_name_of_their_source(tmp_path):
    file = tmp_path / "reference.csv"
    file.write_text(REFERENCE + "apv,reach,1,5000,0.2\napv,reach,2,,\napv,reach,3\n")
    runs = read_reference(file, "Meta-world v2")
    assert [run.group for run in runs] == ["apv (Meta-world v2)"] * 2
    assert all(run.reference for run in runs)
    assert runs[0].scores["success"].steps.tolist() == [5_000, 15_000]
    file.write_text(REFERENCE.replace("env_step", "step"))
    with pytest.raises(ValueError, match="has no column env_step"):
        read_reference(file, "x")
    file.write_text(REFERENCE.replace("0.5", "half"))
    with pytest.raises(ValueError, match="reference .*: .*half"):
        read_reference(file, "x")


def test_the_page_holds_everything_and_says_whose_the_reference_is(folders, tmp_path, capsys):
    file = tmp_path / "reference.csv"
    file.write_text(REFERENCE)
    given = {"compare": "method", "reference": str(file), "reference_name": "Meta-world v2"}
    out = tmp_path / "page" / "curves.html"
    plot(PlotConfig(runs=str(folders), out=str(out), title="A <title>", at=[105_000], **given))
    assert str(out) in capsys.readouterr().out
    page = out.read_text(encoding="utf-8")
    assert "A &lt;title&gt;" in page and page.count("data:image/png;base64,") == 8
    assert "from elsewhere: apv (Meta-world v2)" in page and "P(better than dreamerv2)" in page
    assert (out.parent / "curves_curves" / "success_tasks.svg").is_file()


def test_options_of_a_comparison_need_one(folders, tmp_path):
    with pytest.raises(ValueError, match="baseline=apv needs compare="):
        plot(PlotConfig(runs=str(folders), out=str(tmp_path / "x.html"), baseline="apv"))
