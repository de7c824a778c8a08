"""Methods compared by their learning curves: a table and two pictures for each suite of tasks."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np

from prelar_trl.record.comparison_plots import (
    Band,
    Dots,
    plot_learning_curves,
    plot_steps_to_threshold,
)
from prelar_trl.record.plots import Series
from prelar_trl.record.statistics import (
    Estimate,
    bootstrap_band,
    bootstrap_interval,
    interquartile_mean,
    probability_of_improvement,
    ratio_of_means,
    steps_to_threshold,
)
from prelar_trl.record.table import write_csv

ALL_TASKS = "all"
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


@dataclass(frozen=True)
class Row:
    """One method on one task, or on all of them; None where there is no run of the baseline.

    ``final_*`` are scores of the last evaluation, ``steps*`` environment steps to the threshold,
    of which ``censored`` runs never reached it and count with a lower bound. ``*_low`` and
    ``*_high`` are 95% intervals. ``better`` and ``faster`` are the probabilities of a higher final
    score and of fewer steps than the baseline's.
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
    tasks = list(comparison.curves)
    groups = {task: [task] for task in tasks} | ({ALL_TASKS: tasks} if len(tasks) > 1 else {})
    rows = []
    for name, group in groups.items():
        methods = [m for m in comparison.styles if all(comparison.curves[t].get(m) for t in group)]
        scores = {method: _scores(comparison, method, group) for method in methods}
        baseline = scores.get(comparison.baseline)
        for method, own in scores.items():
            rows.append(_row(comparison, name, method, own, baseline))
    return rows


def write_comparison(comparison: Comparison, folder: str | os.PathLike[str]) -> list[Row]:
    """Write ``table.csv``, ``table.md``, ``curves.png`` and ``steps.png``; returns the rows."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = compare(comparison)
    columns = [field.name for field in fields(Row)]
    write_csv(folder / "table.csv", columns, [astuple(row) for row in rows])
    (folder / "table.md").write_text(_markdown(comparison, rows), encoding="utf-8")

    styles = {style.label: (style.color, style.line) for style in comparison.styles.values()}
    bands: dict[str, dict[str, Band]] = {}
    dots: dict[str, dict[str, Dots]] = {}
    for row in rows:
        if row.task == ALL_TASKS:
            continue
        label = comparison.styles[row.method].label
        bands.setdefault(row.task, {})[label] = _band(comparison.curves[row.task][row.method])
        scores = _scores(comparison, row.method, [row.task])
        runs = scores.steps[:, 0].tolist(), scores.censored[:, 0].tolist()
        dots.setdefault(row.task, {})[label] = Dots(*runs, row.steps, row.steps_low, row.steps_high)
    plot_learning_curves(
        bands,
        folder / "curves.png",
        threshold=comparison.threshold,
        score_name=f"evaluated {comparison.score}",
        styles=styles,
    )
    plot_steps_to_threshold(dots, folder / "steps.png", styles=styles)
    return rows


def _scores(comparison: Comparison, method: str, tasks: Sequence[str]) -> _Scores:
    count = min(len(comparison.curves[task][method]) for task in tasks)
    runs = [comparison.curves[task][method][:count] for task in tasks]
    reached = [
        [steps_to_threshold(run.steps, run.values, comparison.threshold) for run in task]
        for task in runs
    ]
    return _Scores(
        np.array([[run.values[-1] for run in task] for task in runs]).T,
        np.array([[run.steps for run in task] for task in reached]).T,
        np.array([[run.censored for run in task] for task in reached]).T,
    )


def _row(
    comparison: Comparison, task: str, method: str, own: _Scores, baseline: _Scores | None
) -> Row:
    single = own.final.size == 1
    versus: dict[str, float] = {}
    if method == comparison.baseline:
        versus = {"ratio_to_dreamerv2": 1.0, "ratio_low": 1.0, "ratio_high": 1.0}
    elif baseline is not None:
        ratio = ratio_of_means(own.steps, baseline.steps)
        versus = _estimate("ratio", ratio) | {"ratio_to_dreamerv2": ratio.value}
        del versus["ratio"]
        versus |= _estimate("better", probability_of_improvement(own.final, baseline.final))
        versus |= _estimate("faster", probability_of_improvement(-own.steps, -baseline.steps))
    iqm = Estimate(interquartile_mean(own.final), *bootstrap_interval(own.final))
    steps = Estimate(own.steps.mean(), *bootstrap_interval(own.steps, statistic=np.mean))
    return Row(
        suite=comparison.suite,
        task=task,
        method=method,
        seeds=len(own.final),
        final_mean=float(own.final.mean()),
        final_std=0.0 if single else float(own.final.std(ddof=1)),
        threshold=float(comparison.threshold),
        censored=int(own.censored.sum()),
        **_estimate("final_iqm", iqm),
        **_estimate("steps", steps),
        **versus,
    )


def _estimate(name: str, estimate: Estimate) -> dict[str, float]:
    names = (name, f"{name}_low", f"{name}_high")
    return dict(zip(names, map(float, estimate), strict=True))


def _band(runs: Sequence[Series]) -> Band:
    """Mean and interval at the steps at which all runs were evaluated."""
    steps = runs[0].steps
    for run in runs[1:]:
        steps = np.intersect1d(steps, run.steps)
    curves = np.stack([run.values[np.isin(run.steps, steps)] for run in runs])
    return Band(steps, curves.mean(axis=0), *bootstrap_band(curves))


def _markdown(comparison: Comparison, rows: Sequence[Row]) -> str:
    score, baseline = comparison.score, comparison.baseline
    if baseline in comparison.styles:
        baseline = comparison.styles[baseline].label
    several = len({row.task for row in rows}) > 1
    names = ["task"] if several else []
    names += ["method", "runs", f"final {score}", "interquartile mean", "steps to threshold"]
    names += ["not reached", f"steps / {baseline}'s", f"P(better {score})", "P(fewer steps)"]
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in rows:
        label = comparison.styles[row.method].label
        bound = "≥ " if row.censored else ""
        cells = [row.task] if several else []
        cells += [
            label,
            str(row.seeds),
            f"{row.final_mean:.3g} ± {row.final_std:.2g}",
            _interval(row.final_iqm, row.final_iqm_low, row.final_iqm_high),
            bound + _interval(row.steps, row.steps_low, row.steps_high, ",.0f"),
            str(row.censored),
        ]
        if row.method == comparison.baseline:
            cells += ["1", "", ""]
        else:
            cells += [
                _interval(row.ratio_to_dreamerv2, row.ratio_low, row.ratio_high, ".2f"),
                _interval(row.better, row.better_low, row.better_high, ".2f"),
                _interval(row.faster, row.faster_low, row.faster_high, ".2f"),
            ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        f"Final: {score} of the last evaluation, mean ± standard deviation over the runs. Steps: "
        f"environment steps to the first evaluation of at least {comparison.threshold:g} that the "
        "next one confirms; a run that never gets there counts with its length and one evaluation "
        f"interval. P: probability of a better {score}, or of fewer steps, than {baseline}'s. "
        "In brackets: 95% stratified bootstrap interval.",
    ]
    return "\n".join(lines) + "\n"


def _interval(value: float | None, low: float | None, high: float | None, form: str = ".3g") -> str:
    if value is None or low is None or high is None:
        return ""
    return f"{value:{form}} [{low:{form}}, {high:{form}}]"
