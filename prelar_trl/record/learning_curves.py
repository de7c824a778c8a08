"""Learning curves of many runs as they are published: by task and aggregated, with intervals.

What is drawn is Agarwal et al.'s, see :mod:`prelar_trl.record.statistics`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
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
FEW_RUNS = 5  # of fewer the runs are drawn, and no interval
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
    """Curves of a group on a task, or on all, at the steps that all of its runs share.

    The first four are also those of a :class:`Row` and a :class:`Point`.
    """

    score: str
    task: str
    group: str
    reference: bool
    steps: np.ndarray
    values: np.ndarray  # [runs, tasks, points]
    bands: Mapping[str, Band]  # by statistic

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
        ValueError: no runs, none that share a step, an unknown baseline, or a step at which nothing
            was evaluated.
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
        pictures = _draw(score, curves, steps, baseline, styles, folder)
        sections.append(Section(score, _rows(curves, steps, baseline), pictures))
        for x in curves:
            values = (*x.bands["mean"][1:4], *x.bands["iqm"][1:4])
            for step, *numbers in zip(map(int, x.steps), *values, strict=True):
                points.append(Point(*x[:4], step, len(x.values), *numbers))
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


def group_by_task(
    curves: Mapping[str, Mapping[str, Sequence[Series]]],
) -> dict[str, dict[str, list[Sequence[Series]]]]:
    """From task -> group -> runs to the same, and ``all`` if there are several -> runs by task.

    ``all`` has the groups that have run every task, and as many runs of each as of the fewest.
    """
    names = {task: [task] for task in curves} | ({ALL_TASKS: [*curves]} if len(curves) > 1 else {})
    grouped: dict[str, dict[str, list[Sequence[Series]]]] = {}
    for name, tasks in names.items():
        grouped[name] = {}
        for group in curves[tasks[0]]:
            runs = [curves[task].get(group, ()) for task in tasks]
            if count := min(map(len, runs)):
                grouped[name][group] = [of_task[:count] for of_task in runs]
    return grouped


def at_shared_steps(runs: Sequence[Sequence[Series]]) -> tuple[np.ndarray, np.ndarray]:
    """Steps [points] at which all runs were evaluated, and values [runs, tasks, points]."""
    steps = reduce(np.intersect1d, (run.steps for task in runs for run in task))
    values = [[run.values[np.isin(run.steps, steps)] for run in task] for task in runs]
    return steps, np.array(values).swapaxes(0, 1)


def mean_band(steps: np.ndarray, curves: np.ndarray, statistic: Statistic = "mean") -> Band:
    """Mean of curves [runs, tasks, points] and its interval; of one task the runs, if few."""
    middle = aggregate_curve(curves, statistic)
    runs = list(curves[:, 0]) if curves.shape[1] == 1 and len(curves) < FEW_RUNS else ()
    return Band(steps, middle, *bootstrap_band(curves, statistic=statistic), runs)


def _collect(runs: Sequence[EvaluatedRun], score: str) -> list[_Curves]:
    """Of each task, and of ``all`` if there are several."""
    table: dict[str, dict[str, list[Series]]] = {}
    reference = {run.group for run in runs if run.reference}
    for run in sorted(runs, key=lambda run: run.reference):
        if score in run.scores and (run.task in table or not run.reference):
            table.setdefault(run.task, {}).setdefault(run.group, []).append(run.scores[score])
    curves = []
    for task, by_group in group_by_task(table).items():
        for group, series in by_group.items():
            steps, values = at_shared_steps(series)
            if len(steps):
                own = (score, task, group, group in reference)
                bands = {x: mean_band(steps, values, x) for x in STATISTICS}
                curves.append(_Curves(*own, steps, values, bands))
    return curves


def _table_steps(curves: Sequence[_Curves], at: Sequence[int] | None, score: str) -> list[int]:
    own = [x.steps for x in curves if not x.reference]
    if not own:
        raise ValueError(
            f"no step at which {score} was evaluated in all runs of a group: compare runs of one "
            "eval_every, or leave some out"
        )
    known = {int(step) for steps in own for step in steps}
    if at is None:
        shared = reduce(np.intersect1d, own).tolist() or known
        return [step for step in PUBLISHED_STEPS if step in known] or [int(max(shared))]
    missing = [step for step in at if step not in known]
    if missing:
        raise ValueError(
            f"at={missing[0]}: no {score} was evaluated then; there are steps {min(known)} to "
            f"{max(known)}"
        )
    return sorted(at)


def _rows(curves: Sequence[_Curves], steps: Sequence[int], baseline: str) -> list[Row]:
    rows, bases = [], {x.task: x for x in curves if x.group == baseline}
    for x in curves:
        base = None if x.reference or x.group == baseline else bases.get(x.task)
        for step in steps:
            place = x.at(step)
            if place is None:
                continue
            scores, better = x.values[..., place], ()
            if base is not None and (there := base.at(step)) is not None:
                better = probability_of_improvement(scores, base.values[..., there])
            std = float(scores.std(ddof=1)) if scores.size > 1 else 0.0
            iqm = (float(curve[place]) for curve in x.bands["iqm"][1:4])
            mean = float(scores.mean())
            rows.append(Row(*x[:4], step, len(scores), mean, std, *iqm, *better))
    return rows


def _draw(
    score: str,
    curves: Sequence[_Curves],
    table: Sequence[int],
    baseline: str,
    styles: Mapping[str, tuple[str, str]],
    folder: Path,
) -> dict[str, Path]:
    """The pictures of one score, by caption; profiles are of the last step in the table."""
    tasks = list(dict.fromkeys(x.task for x in curves if x.task != ALL_TASKS))
    together = [x for x in curves if x.task == ALL_TASKS]
    together = together or [x for x in curves if x.task == tasks[0]]
    name = f"evaluated {score}"
    limits = (0.0, 1.0) if score == "success" else None

    def files(kind: str) -> list[Path]:
        return [folder / f"{score}_{kind}{ending}" for ending in FORMATS]

    panels = {task: {x.group: x.bands["mean"] for x in curves if x.task == task} for task in tasks}
    options = {"score_name": name, "limits": limits, "styles": styles}
    pictures = {
        "Each task: mean": plot_learning_curves(panels, files("tasks"), columns=3, **options)
    }
    panels = {
        title: {x.group: x.bands[statistic] for x in together}
        for statistic, title in STATISTICS.items()
    }
    what = (
        f"All {len(tasks)} tasks together" if together[0].task == ALL_TASKS else f"Task {tasks[0]}"
    )
    pictures[what] = plot_learning_curves(panels, files("aggregate"), **options)

    own = [x for x in together if not x.reference]
    known = [step for step in table if any(x.at(step) is not None for x in own)]
    if not known:
        return pictures
    step = known[-1]
    scores = {x.group: x.values[..., place] for x in together if (place := x.at(step)) is not None}
    top = max(float(x.max()) for x in scores.values())
    low = min(0.0, *(float(x.min()) for x in scores.values()))
    thresholds = np.linspace(low, max(top, low + 1e-6), THRESHOLDS)
    profiles = {
        group: Band(thresholds, *performance_profile(x, thresholds)) for group, x in scores.items()
    }
    pictures[f"Performance profile at step {step:,}"] = plot_profiles(
        {f"step {step:,}": profiles}, files("profile"), score_name=name, styles=styles
    )
    compared = {x.group for x in together if x.group != baseline and not x.reference}
    improvement = {
        group: probability_of_improvement(x, scores[baseline])
        for group, x in scores.items()
        if baseline in scores and group in compared
    }
    if improvement:
        pictures[f"Probability of improvement at step {step:,}"] = plot_estimates(
            {f"P(better {score} than {baseline})": improvement},
            files("improvement"),
            limits=(0.0, 1.0),
            styles=styles,
        )
    return pictures
