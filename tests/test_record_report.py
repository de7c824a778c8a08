"""Curves, the HTML report, and the recipe that makes them."""

from __future__ import annotations

import base64
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.image import imread

from prelar_trl.recipes.entry import start
from prelar_trl.record import (
    Logger,
    RunFolder,
    html_report,
    plot_curves,
    plot_psnr_by_step,
    plots,
    read_metrics,
    read_video,
    write_picture,
)
from prelar_trl.record.plots import Series, smooth

ROOT = Path(__file__).parents[1]


@pytest.fixture
def runs(tmp_path):
    """A pre-training and a fine-tuning run with metrics, videos and an evaluation."""
    clips = tmp_path / "clips"
    write_picture(clips / "contact_sheet.png", torch.zeros(3, 8, 8, dtype=torch.uint8))
    config = {"method": "prelar", "updates": 40, "seed": 0, "data": str(clips), "model": {"a": 1}}
    pretrain = RunFolder.create(tmp_path / "pretrain", config)
    with Logger(pretrain) as logger:
        for step in range(40):
            logger.log({"loss_image": 9000 / (1 + step) ** 2, "loss_<kl>": float(step % 7)}, step)
        for step, level in ((1, 14.5), (40, 21.25)):
            logger.log({"psnr_openloop": level}, step)
            frames = torch.full((2, 3, 64, 64), step, dtype=torch.uint8)
            logger.log_video("openloop", frames, step)
            logger.log_video("reconstruction", frames, step)
    finetune = RunFolder.create(tmp_path / "finetune", {"env": "toy", "env_steps": 30, "seed": 0})
    with Logger(finetune) as logger:
        logger.log({"loss_image": 80.0, "eval/success": 0.0}, 10)
        logger.log({"loss_image": float("nan"), "eval/success": 1.0}, 30)
    (finetune.path / "evaluation.json").write_text(
        json.dumps({"episodes": 10, "success": 0.9, "success_interval": [0.59, 0.98]})
    )
    return [pretrain.path, finetune.path]


def test_metrics_are_read_without_the_empty_cells(runs):
    metrics = read_metrics(runs[1] / "metrics.csv")
    assert set(metrics) == {"loss_image", "eval/success"}
    assert metrics["eval/success"].steps.tolist() == [10, 30]
    assert np.isnan(metrics["loss_image"].values[1])


def test_missing_metrics_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="has logged nothing"):
        read_metrics(tmp_path / "metrics.csv")
    with pytest.raises(ValueError, match="no run has the metric 'los': there are loss"):
        plot_curves({"a": {"loss": Series(np.ones(1), np.ones(1))}}, tmp_path / "a.png", ["los"])


def test_smoothing_is_the_mean_and_deviation_of_the_values_in_reach():
    values = np.random.default_rng(0).normal(1000, 1, 50)
    mean, deviation = smooth(values, 5)
    for i in (0, 1, 20, 49):
        near = values[max(0, i - 2) : i + 3]
        np.testing.assert_allclose([mean[i], deviation[i]], [near.mean(), near.std()], rtol=1e-8)


def test_curves_of_several_runs_have_their_own_colors(tmp_path):
    steps = np.arange(100.0)
    runs = {name: {"loss": Series(steps, steps * k)} for name, k in (("one", 1), ("two", 2))}
    runs["never finite"] = {"loss": Series(steps, steps * np.nan)}
    picture = imread(plot_curves(runs, tmp_path / "curves.png", ["loss"]))
    pixels = set(map(tuple, (picture[..., :3] * 255).round().astype(int).reshape(-1, 3)))
    assert {(0, 114, 178), (213, 94, 0)} <= pixels
    path = plot_psnr_by_step({"a": [30, 20, 19], "b": [31, 25, 24]}, tmp_path / "p.png", context=1)
    assert imread(path).shape[2] == 4


def test_bars_name_their_labels_once_a_row(monkeypatch, tmp_path):
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figure)
    seeds = {"one": [1.0, 3.0], "two": [2.0]}
    panels = {"a": seeds, "b": seeds, "c": {"other": [1.0]}, "d": {"other": [1.0]}}
    figure = plots.plot_bars(panels, tmp_path / "a.png", colors={"two": "#123456"}, lines={"b": 2})
    named = [
        [x.get_text() for x in axis.get_yticklabels() if x.get_visible()]
        for axis in figure.axes[:4]
    ]
    assert named == [["one", "two"], [], ["other"], ["other"]]  # d begins the next row
    assert [bar.get_width() for bar in figure.axes[0].patches] == [2, 2]
    assert to_hex(figure.axes[0].patches[1].get_facecolor()) == "#123456"
    dashed = [[x.get_xdata()[0] for x in a.lines if x.is_dashed()] for a in figure.axes[:4]]
    assert dashed == [[], [2], [], []]


def test_report_holds_figures_videos_settings_and_nothing_from_outside(runs, tmp_path):
    html = html_report(tmp_path / "out" / "report.html", runs, title="A <demo>").read_text()
    assert "A &lt;demo&gt;" in html and "loss_&lt;kl&gt;" in html and "loss_<kl>" not in html
    assert "14.5 → 21.2" in html  # open-loop PSNR, first and last
    assert "10 episodes (95%: 0.59 to 0.98)" in html
    assert "model.a" in html and "torchrl" in html
    assert "not drawn where not finite: loss_image" in html
    assert "Videos it learned from" in html
    sources = re.findall(r'src="([^"]*)"', html)
    assert sources and all(source.startswith("data:") for source in sources)
    assert not re.search(r"https?://|<script|<link", html)
    assert (tmp_path / "out" / "report_curves" / "pre_training_loss_image.png").is_file()


def test_report_shows_the_newest_videos_and_the_first_prediction(runs, tmp_path):
    html = html_report(tmp_path / "report.html", runs).read_text()
    videos = re.findall(r"data:video/mp4;base64,([^\"]*)", html)
    captions = re.findall(r"</video><figcaption>([^<]*)", html)
    assert captions == [
        "Open-loop prediction, step 1",
        "Open-loop prediction, step 40",
        "Reconstruction, step 40",
    ]
    (tmp_path / "copy.mp4").write_bytes(base64.b64decode(videos[1]))
    assert read_video(tmp_path / "copy.mp4").shape == (2, 3, 256, 256)


def test_a_number_that_is_no_step_tells_pictures_apart(tmp_path):
    run = RunFolder.create(tmp_path / "run", {"method": "prelar", "updates": 2})
    for name in ("probe_transfer_0", "probe_transfer_1", "strip_000001", "strip_1000000"):
        write_picture(run.pictures / f"{name}.png", torch.zeros(3, 8, 8, dtype=torch.uint8))
    html = html_report(tmp_path / "report.html", [run.path]).read_text()
    captions = re.findall(r"<figcaption>([^<]*)", html)
    assert captions == ["Probe transfer 0", "Probe transfer 1", "Strip, step 1,000,000"]


def test_runs_of_one_phase_are_compared_and_told_apart_by_their_parents(tmp_path):
    paths = [tmp_path / f"seed{seed}" / "finetune" for seed in (1, 2)]
    for path in paths:
        with Logger(RunFolder.create(path, {"env_steps": 5})) as logger:
            logger.log({"eval/success": 0.5}, 5)
    RunFolder.create(tmp_path / "new", {"env_steps": 5})  # has logged nothing yet
    html = html_report(tmp_path / "report.html", [*paths, tmp_path / "new"]).read_text()
    assert html.count("<h2>") == 1 and html.count('alt="eval/success"') == 1
    assert "seed1/finetune" in html and "seed2/finetune" in html


def test_plot_recipe_prints_where_the_report_is(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["prelar-plot", "runs=[pretrain,finetune]", "out=docs/report.html"]
    monkeypatch.setattr(sys, "argv", arguments)
    start("plot")
    assert capsys.readouterr().out.strip() == f"report: {tmp_path / 'docs' / 'report.html'}"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clips", "docs", "finetune", "pretrain"]


def test_the_use_of_latent_actions_is_drawn_after_the_psnr(runs, tmp_path):
    run = RunFolder.create(tmp_path / "used", {"method": "prelar", "updates": 2})
    with Logger(run) as logger:
        for step in (1, 2):
            values = {"action_usage": 0.125 * step, "action_psnr_gap": 0.5, "psnr_openloop": 20.0}
            logger.log({**values, "loss_image": 3.0}, step)
    html = html_report(tmp_path / "used.html", [run.path]).read_text()
    drawn = re.findall(r'<img alt="([^"]+)"', html)
    assert drawn == ["psnr_openloop", "action_usage", "action_psnr_gap", "loss_image"]
    assert "0.125 → 0.25</b><span>Use of latent actions" in html
    assert "Use of latent actions" not in html_report(tmp_path / "r.html", runs).read_text()
