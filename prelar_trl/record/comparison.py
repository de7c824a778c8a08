"""Methods compared by their learning curves: a table and two pictures for each suite of tasks."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from prelar_trl.record.comparison_plots import (
    Band,
    Dots,
    plot_learning_curves,
    plot_steps_to_threshold,
)
from prelar_trl.record.learning_curves import ALL_TASKS, at_shared_steps, group_by_task, mean_band
from prelar_trl.record.plots import Series
from prelar_trl.record.statistics import (
    bootstrap_interval,
    interquartile_mean,
    probability_of_improvement,
    ratio_of_means,
    steps_to_threshold,
)
from prelar_trl.record.table import write_csv

SUMMARY = (
    *("suite", "task", "method", "seeds", "threshold", "steps"),
    *("ratio_to_dreamerv2", "ratio_low", "ratio_high"),
)
"""The columns of ``summary.csv``."""


class MethodStyle(NamedTuple):
    """How a method is called and drawn."""

    label: str
    color: str
    line: str = "-"


@dataclass(frozen=True)
class Comparison:
    """Evaluations of several methods on the tasks of a suite.

    Args:
        suite: its name.
        score: what the evaluations measured, ``return`` or ``success``; more is better.
        threshold: a score that counts as learned.
        curves: task -> method -> the evaluations of each run.
        styles: method -> how it is shown; its order is that of tables and pictures.
        baseline: the method that the others are compared with. Default: ``dreamerv2``.
    """

    suite: str
    score: str
    threshold: float
    curves: Mapping[str, Mapping[str, Sequence[Series]]]
    styles: Mapping[str, MethodStyle]
    baseline: str = "dreamerv2"


class Row(NamedTuple):
    """One method on one task, or on all of them.

    ``final_*`` are scores of the last evaluation, ``steps*`` environment steps to the threshold,
    of which ``censored`` runs never reached it and count with a lower bound. ``*_low`` and
    ``*_high`` are 95% intervals. ``better`` and ``faster`` are the probabilities of a higher final
    score and of fewer steps than the baseline's; None for that itself, and where it has no run.
    """

    suite: str
    task: str
    method: str
    seeds: int
    final_mean: float
    final_std: float
    final_iqm: float
    final_iqm_low: float
    final_iqm_high: float
    threshold: float
    steps: float
    steps_low: float
    steps_high: float
    censored: int
    ratio_to_dreamerv2: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    better: float | None = None
    better_low: float | None = None
    better_high: float | None = None
    faster: float | None = None
    faster_low: float | None = None
    faster_high: float | None = None


class _Scores(NamedTuple):
    """Tables [runs, tasks]."""

    final: np.ndarray
    steps: np.ndarray
    censored: np.ndarray


def compare(comparison: Comparison) -> list[Row]:
    """The statistics of every method on every task, and on all if there are several.

    Where tasks have unequal numbers of runs, ``all`` takes as many of each as the fewest.
    """
    rows = []
    for task, runs in group_by_task(comparison.curves).items():
        methods = [method for method in comparison.styles if method in runs]
        scores = {method: _scores(runs[method], comparison.threshold) for method in methods}
        baseline = scores.get(comparison.baseline)
        rows += [_row(comparison, task, method, own, baseline) for method, own in scores.items()]
    return rows


def write_comparison(comparison: Comparison, folder: str | os.PathLike[str]) -> list[Row]:
    """Write ``table.csv``, ``table.md``, ``curves.png`` and ``steps.png``; returns the rows."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = compare(comparison)
    write_csv(folder / "table.csv", Row._fields, rows)
    (folder / "table.md").write_text(_markdown(comparison, rows), encoding="utf-8")

    styles = {style.label: (style.color, style.line) for style in comparison.styles.values()}
    bands: dict[str, dict[str, Band]] = {}
    dots: dict[str, dict[str, Dots]] = {}
    for row in rows:
        if row.task == ALL_TASKS:
            continue
        label = comparison.styles[row.method].label
        runs = comparison.curves[row.task][row.method]
        bands.setdefault(row.task, {})[label] = mean_band(*at_shared_steps([runs]))
        _, steps, censored = (x[:, 0].tolist() for x in _scores([runs], comparison.threshold))
        own = Dots(steps, censored, row.steps, row.steps_low, row.steps_high)
        dots.setdefault(row.task, {})[label] = own
    plot_learning_curves(
        bands,
        folder / "curves.png",
        threshold=comparison.threshold,
        score_name=f"evaluated {comparison.score}",
        styles=styles,
    )
    plot_steps_to_threshold(dots, folder / "steps.png", styles=styles)
    return rows


def _scores(runs: Sequence[Sequence[Series]], threshold: float) -> _Scores:
    """Of runs by task."""
    reached = [[steps_to_threshold(*run, threshold) for run in task] for task in runs]
    return _Scores(
        np.array([[run.values[-1] for run in task] for task in runs]).T,
        np.array([[run.steps for run in task] for task in reached]).T,
        np.array([[run.censored for run in task] for task in reached]).T,
    )


def _row(
    comparison: Comparison, task: str, method: str, own: _Scores, baseline: _Scores | None
) -> Row:
    versus: list[float] = []
    if method == comparison.baseline:
        versus = [1.0, 1.0, 1.0]
    elif baseline is not None:
        versus += ratio_of_means(own.steps, baseline.steps)
        versus += probability_of_improvement(own.final, baseline.final)
        versus += probability_of_improvement(-own.steps, -baseline.steps)
    return Row(
        comparison.suite,
        task,
        method,
        len(own.final),
        float(own.final.mean()),
        float(own.final.std(ddof=1)) if own.final.size > 1 else 0.0,
        interquartile_mean(own.final),
        *bootstrap_interval(own.final),
        float(comparison.threshold),
        float(own.steps.mean()),
        *bootstrap_interval(own.steps, statistic=np.mean),
        int(own.censored.sum()),
        *versus,
    )


def _markdown(comparison: Comparison, rows: Sequence[Row]) -> str:
    score, baseline, styles = comparison.score, comparison.baseline, comparison.styles
    other = styles[baseline].label if baseline in styles else baseline
    names = ["task", "method", "runs", f"final {score}", "interquartile mean"]
    names += ["steps to threshold", "not reached", f"steps / {other}'s"]
    lines = [[*names, f"P(better {score})", "P(fewer steps)"]]
    for row in rows:
        steps = _interval(row.steps, row.steps_low, row.steps_high, ",.0f")
        ratio = _interval(row.ratio_to_dreamerv2, row.ratio_low, row.ratio_high, ".2f")
        cells = [
            row.task,
            styles[row.method].label,
            str(row.seeds),
            f"{row.final_mean:.3g} ± {row.final_std:.2g}",
            _interval(row.final_iqm, row.final_iqm_low, row.final_iqm_high, ".3g"),
            f"≥ {steps}" if row.censored else steps,
            str(row.censored),
            "1" if row.method == baseline else ratio,
            _interval(row.better, row.better_low, row.better_high, ".2f"),
            _interval(row.faster, row.faster_low, row.faster_high, ".2f"),
        ]
        lines.append(cells)
    several = len({row.task for row in rows}) > 1
    if not several:
        lines = [cells[1:] for cells in lines]
    table = ["| " + " | ".join(cells) + " |" for cells in lines]
    table.insert(1, "|" + "---|" * len(lines[0]))
    over = "the runs, in the rows of all over runs and tasks" if several else "the runs"
    table += [
        "",
        f"Final: {score} of the last evaluation, mean ± standard deviation over {over}. Steps: "
        f"environment steps to the first evaluation of at least {comparison.threshold:g} that the "
        "next one confirms; a run that never gets there counts with its length and one evaluation "
        f"interval. P: probability of a better {score}, or of fewer steps, than {other}'s. "
        "In brackets: 95% stratified bootstrap interval.",
    ]
    return "\n".join(table) + "\n"


def _interval(value: float | None, low: float | None, high: float | None, form: str) -> str:
    if value is None or low is None or high is None:
        return ""
    return f"{value:{form}} [{low:{form}}, {high:{form}}]"
