"""Methods compared: the table says what the curves do, the pictures show them."""

from __future__ import annotations

import csv
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from prelar_trl.record import Comparison, MethodStyle, Series, write_comparison
from prelar_trl.record.comparison import compare

STEPS = np.arange(100.0, 1001.0, 100.0)
STYLES = {
    "dreamerv2": MethodStyle("DreamerV2", "#333333"),
    "fast": MethodStyle("fast", "#D55E00", "--"),
    "never": MethodStyle("never", "#0072B2"),
}


def run(reached: float, score: float = 10.0) -> Series:
    """Nothing before ``reached`` steps, ``score`` from there on."""
    return Series(STEPS, np.where(STEPS >= reached, score, 0.0))


def comparison(**changes) -> Comparison:
    curves = {
        "dreamerv2": [run(400), run(600)],
        "fast": [run(200), run(300, 12.0)],
        "never": [run(300, 5.0), run(2_000), run(900)],
    }
    return replace(Comparison("suite", "return", 8, {"toy": curves}, STYLES), **changes)


def test_rows_say_what_the_curves_do():
    rows = {row.method: row for row in compare(comparison())}
    assert list(rows) == list(STYLES)
    assert rows["dreamerv2"].steps == 500 and rows["dreamerv2"].ratio_to_dreamerv2 == 1
    fast, never = rows["fast"], rows["never"]
    assert (fast.seeds, fast.steps, fast.steps_low, fast.steps_high) == (2, 250, 200, 300)
    assert (fast.final_mean, fast.final_iqm, fast.censored) == (11, 11, 0)
    assert fast.final_std == pytest.approx(2**0.5)
    assert fast.ratio_to_dreamerv2 == 0.5 and fast.ratio_low < 0.5 < fast.ratio_high < 1
    assert fast.better == 0.75 and fast.faster == 1  # one draw of two
    assert (never.seeds, never.censored) == (3, 2)
    assert never.steps == pytest.approx((1100 + 1100 + 900) / 3)
    assert never.faster == 0


def test_without_a_run_of_the_baseline_nothing_is_compared():
    curves = {"toy": {"fast": [run(200)]}}
    (row,) = compare(comparison(curves=curves))
    assert row.ratio_to_dreamerv2 is row.better is row.faster is None
    assert row.final_std == 0


def test_several_tasks_are_also_taken_together():
    curves = comparison().curves["toy"]
    slower = {name: [Series(2 * x.steps, x.values) for x in runs] for name, runs in curves.items()}
    del slower["never"]
    rows = compare(comparison(curves={"a": curves, "b": slower}))
    names = [(row.task, row.method) for row in rows]
    assert names[-2:] == [("all", "dreamerv2"), ("all", "fast")]
    assert rows[-1].steps == (250 + 500) / 2 and rows[-1].ratio_to_dreamerv2 == 0.5


def test_of_all_tasks_together_each_counts_with_as_many_runs_as_the_fewest():
    curves = {"a": {"fast": [run(200), run(300), run(400)]}, "b": {"fast": [run(600), run(800)]}}
    rows = [(row.task, row.seeds, row.steps) for row in compare(comparison(curves=curves))]
    assert rows == [("a", 3, 300), ("b", 2, 700), ("all", 2, (200 + 300 + 600 + 800) / 4)]


def test_tables_and_pictures_are_written(tmp_path):
    write_comparison(comparison(), tmp_path / "out")
    with open(tmp_path / "out" / "table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == list(STYLES)
    assert (rows[1]["steps"], rows[1]["ratio_to_dreamerv2"]) == ("250", "0.5")
    lines = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert lines[2].startswith("| DreamerV2 | 2 | 10 ± 0 | 10 [10, 10] | 500 [400, 600] | 0 | 1 |")
    assert "| ≥ 1,033 [" in lines[4] and "| 0.00 [0.00, 0.00] |" in lines[4]
    assert all(line.count("|") == 10 for line in lines[:5])
    for name in ("curves.png", "steps.png"):
        pixels = np.asarray(Image.open(tmp_path / "out" / name).convert("RGB")).reshape(-1, 3)
        for color in ("#333333", "#D55E00", "#0072B2"):
            rgb = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
            assert (np.abs(pixels - np.array(rgb)).max(1) < 12).sum() > 100, (name, color)


def test_curves_are_drawn_where_all_runs_were_evaluated(tmp_path):
    short = Series(STEPS[:6], np.zeros(6))
    curves = {"toy": {"dreamerv2": [run(400), short]}}
    (row,) = write_comparison(comparison(curves=curves), tmp_path)
    assert row.censored == 1 and row.steps == (400 + 700) / 2
