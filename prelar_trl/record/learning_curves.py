"""Learning curves of many runs as they are published: by task and aggregated, with intervals.

Agarwal et al., "Deep reinforcement learning at the edge of the statistical precipice", NeurIPS
2021: mean and interquartile mean with stratified bootstrap intervals, performance profiles,
probability of improvement.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from prelar_trl.record.comparison_plots import (
    Band,
    plot_estimates,
    plot_learning_curves,
    plot_profiles,
)
from prelar_trl.record.plots import COLORS, Series
from prelar_trl.record.statistics import (
    Estimate,
    aggregate_curve,
    bootstrap_band,
    performance_profile,
    probability_of_improvement,
)
from prelar_trl.record.table import write_csv

ALL_TASKS = "all"
PUBLISHED_STEPS = (105_000, 205_000, 245_000)
THRESHOLDS = 101  # points of a profile
FORMATS = (".png", ".svg")
Statistic = Literal["mean", "iqm"]
STATISTICS: dict[Statistic, str] = {"mean": "mean", "iqm": "interquartile mean"}


class EvaluatedRun(NamedTuple):
    """One run: what it is compared as, its task, and score -> evaluations.

    ``reference``: from elsewhere, drawn beside and never a baseline.
    """

    group: str
    task: str
    scores: Mapping[str, Series]
    reference: bool = False


class Row(NamedTuple):
    """A line of ``table.csv``: a group on a task, or on all, at a step.

    ``better``: probability of a better score than the baseline's at that step; empty for references
    and the baseline itself. ``*_low`` and ``*_high`` are 95% intervals.
    """

    score: str
    task: str
    group: str
    reference: bool
    step: int
    runs: int
    mean: float
    std: float
    iqm: float
    iqm_low: float
    iqm_high: float
    better: float | None = None
    better_low: float | None = None
    better_high: float | None = None


class Point(NamedTuple):
    """A line of ``curves.csv``: a group on a task, or on all, at each step."""

    score: str
    task: str
    group: str
    reference: bool
    step: int
    runs: int
    mean: float
    mean_low: float
    mean_high: float
    iqm: float
    iqm_low: float
    iqm_high: float


@dataclass
class Section:
    """What the page shows of one score."""

    score: str
    rows: list[Row]
    pictures: dict[str, Path]  # caption -> png; the svg lies beside


class _Curves(NamedTuple):
    """Curves of a group, [runs, tasks, points], at the steps that all of them share."""

    steps: np.ndarray
    values: np.ndarray
    bands: Mapping[Statistic, Band]
    reference: bool

    def at(self, step: int) -> int | None:
        """Index of a step; None if nothing was evaluated then."""
        (places,) = np.nonzero(self.steps == step)
        return int(places[0]) if len(places) else None


def write_learning_curves(
    runs: Sequence[EvaluatedRun],
    folder: str | os.PathLike[str],
    *,
    at: Sequence[int] | None = None,
    baseline: str | None = None,
) -> list[Section]:
    """Draw and tabulate runs: pictures as png and svg, ``table.csv`` and ``curves.csv``.

    Tasks are those of the runs that are no references. Where tasks have unequal numbers of runs,
    ``all`` takes as many of each as the fewest, and of groups those that have run every task.

    Args:
        runs: all of them.
        folder: for the files.
        at: steps of the table. Default: those of 105k, 205k, 245k that were evaluated, or else
            the last step that all own runs share.
        baseline: the group that ``better`` compares with. Default: ``dreamerv2`` or else the first.

    Raises:
        ValueError: no runs, an unknown baseline, or a step at which nothing was evaluated.
    """
    folder, own = Path(folder), [run for run in runs if not run.reference]
    if not own:
        raise ValueError("no run with evaluations to compare")
    groups = list(dict.fromkeys(run.group for run in own))
    if baseline is None:
        baseline = "dreamerv2" if "dreamerv2" in groups else groups[0]
    if baseline not in groups:
        raise ValueError(f"baseline={baseline} is no group; choose {', '.join(groups)}")
    folder.mkdir(parents=True, exist_ok=True)
    styles = _styles(runs, groups)
    sections, points = [], []
    for score in dict.fromkeys(name for run in own for name in run.scores):
        curves = _collect(runs, score)
        steps = _table_steps(curves, at, score)
        rows = [
            row
            for task, by_group in curves.items()
            for group, x in by_group.items()
            for row in _rows(score, task, group, x, by_group.get(baseline), steps, baseline)
        ]
        pictures = _draw(score, curves, steps[-1], baseline, styles, folder)
        sections.append(Section(score, rows, pictures))
        points += _points(score, curves)
    table = [row for section in sections for row in section.rows]
    write_csv(folder / "table.csv", Row._fields, table)
    write_csv(folder / "curves.csv", Point._fields, points)
    return sections


def _styles(runs: Sequence[EvaluatedRun], groups: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Own groups solid; a reference dotted, in the color of the group that its name starts with."""
    styles = {
        group: (COLORS[i % len(COLORS)], "--" if i >= len(COLORS) else "-")
        for i, group in enumerate(groups)
    }
    others = dict.fromkeys(run.group for run in runs if run.reference)
    for i, group in enumerate(others, start=len(groups)):
        like = [own for own in groups if group.split(" ")[0] == own]
        styles[group] = (styles[like[0]][0] if like else COLORS[i % len(COLORS)], ":")
    return styles


def _collect(runs: Sequence[EvaluatedRun], score: str) -> dict[str, dict[str, _Curves]]:
    """Task, and ``all`` if there are several -> group -> curves."""
    table: dict[str, dict[str, list[Series]]] = {}
    reference = {run.group for run in runs if run.reference}
    for run in sorted(runs, key=lambda run: run.reference):
        if score in run.scores and (run.task in table or not run.reference):
            table.setdefault(run.task, {}).setdefault(run.group, []).append(run.scores[score])
    tasks = {task: [task] for task in table} | ({ALL_TASKS: list(table)} if len(table) > 1 else {})
    curves: dict[str, dict[str, _Curves]] = {}
    for name, members in tasks.items():
        for group in dict.fromkeys(group for task in members for group in table[task]):
            if not all(group in table[task] for task in members):
                continue
            count = min(len(table[task][group]) for task in members)
            series = [table[task][group][:count] for task in members]
            steps = series[0][0].steps
            for one in (x for task in series for x in task):
                steps = np.intersect1d(steps, one.steps)
            if len(steps):
                values = [[x.values[np.isin(x.steps, steps)] for x in task] for task in series]
                shared = np.array(values).swapaxes(0, 1)
                bands: dict[Statistic, Band] = {x: _band(steps, shared, x) for x in STATISTICS}
                own = _Curves(steps, shared, bands, group in reference)
                curves.setdefault(name, {})[group] = own
    return curves


def _table_steps(
    curves: Mapping[str, Mapping[str, _Curves]], at: Sequence[int] | None, score: str
) -> list[int]:
    own = [x.steps for by_group in curves.values() for x in by_group.values() if not x.reference]
    known = {int(step) for steps in own for step in steps}
    if at is None:
        found = [step for step in PUBLISHED_STEPS if step in known]
        return found or [int(min(steps[-1] for steps in own))]
    missing = [step for step in at if step not in known]
    if missing:
        raise ValueError(
            f"at={missing[0]}: no {score} was evaluated then; there are steps {min(known)} to "
            f"{max(known)}"
        )
    return sorted(at)


def _rows(
    score: str,
    task: str,
    group: str,
    curves: _Curves,
    baseline: _Curves | None,
    steps: Sequence[int],
    baseline_name: str,
) -> list[Row]:
    rows = []
    for step in steps:
        place = curves.at(step)
        if place is None:
            continue
        scores, iqm = curves.values[..., place], curves.bands["iqm"]
        versus: list[float] = []
        other = None if baseline is None else baseline.at(step)
        if baseline is not None and other is not None:
            if group != baseline_name and not curves.reference:
                better = probability_of_improvement(scores, baseline.values[..., other])
                versus = [float(x) for x in better]
        rows.append(
            Row(
                score,
                task,
                group,
                curves.reference,
                step,
                len(scores),
                float(scores.mean()),
                float(scores.std(ddof=1)) if scores.size > 1 else 0.0,
                *(float(x[place]) for x in (iqm.mean, iqm.low, iqm.high)),
                *versus,
            )
        )
    return rows


def _band(steps: np.ndarray, curves: np.ndarray, statistic: Statistic) -> Band:
    middle = aggregate_curve(curves, statistic)
    return Band(steps, middle, *bootstrap_band(curves, statistic=statistic))


def _draw(
    score: str,
    curves: Mapping[str, Mapping[str, _Curves]],
    step: int,
    baseline: str,
    styles: Mapping[str, tuple[str, str]],
    folder: Path,
) -> dict[str, Path]:
    """The pictures of one score, by caption."""
    tasks = {task: by_group for task, by_group in curves.items() if task != ALL_TASKS}
    together = curves.get(ALL_TASKS) or next(iter(tasks.values()))
    name = f"evaluated {score}"
    limits = (0.0, 1.0) if score == "success" else None

    def files(kind: str) -> list[Path]:
        return [folder / f"{score}_{kind}{ending}" for ending in FORMATS]

    panels = {
        task: {group: x.bands["mean"] for group, x in by_group.items()}
        for task, by_group in tasks.items()
    }
    columns = min(3, len(panels))
    pictures = {
        "Each task: mean": plot_learning_curves(
            panels,
            files("tasks"),
            score_name=name,
            limits=limits,
            styles=styles,
            columns=columns,
        )
    }
    panels = {
        title: {group: x.bands[statistic] for group, x in together.items()}
        for statistic, title in STATISTICS.items()
    }
    what = f"All {len(tasks)} tasks together" if len(tasks) > 1 else "The task"
    pictures[what] = plot_learning_curves(
        panels, files("aggregate"), score_name=name, limits=limits, styles=styles
    )
    scores = {
        group: x.values[..., place]
        for group, x in together.items()
        if (place := x.at(step)) is not None
    }
    top = max(float(x.max()) for x in scores.values())
    low = min(0.0, *(float(x.min()) for x in scores.values()))
    thresholds = np.linspace(low, max(top, low + 1e-6), THRESHOLDS)
    profiles = {
        group: Band(thresholds, *performance_profile(x, thresholds)) for group, x in scores.items()
    }
    pictures[f"Performance profile at step {step:,}"] = plot_profiles(
        {f"step {step:,}": profiles}, files("profile"), score_name=name, styles=styles
    )
    improvement: dict[str, Estimate] = {
        group: probability_of_improvement(x, scores[baseline])
        for group, x in scores.items()
        if baseline in scores and group != baseline and not together[group].reference
    }
    if improvement:
        pictures[f"Probability of improvement at step {step:,}"] = plot_estimates(
            {f"P(better {score} than {baseline})": improvement},
            files("improvement"),
            limits=(0.0, 1.0),
            styles=styles,
        )
    return pictures


def _points(score: str, curves: Mapping[str, Mapping[str, _Curves]]) -> list[Point]:
    points = []
    for task, by_group in curves.items():
        for group, x in by_group.items():
            values = (y for band in ("mean", "iqm") for y in x.bands[band][1:])
            for step, *bands in zip(x.steps, *values, strict=True):
                points.append(
                    Point(score, task, group, x.reference, int(step), len(x.values), *bands)
                )
    return points
