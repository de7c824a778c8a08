"""Pictures of several methods compared: curves with intervals, profiles, estimates."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from prelar_trl.record.plots import COLORS, STYLE, count_steps, new_figure, save_figure
from prelar_trl.record.statistics import Estimate

if TYPE_CHECKING:  # see plots.py
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

Target = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


class Band(NamedTuple):
    """A mean curve over runs and its interval, [n] each."""

    steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


class Dots(NamedTuple):
    """One value a run [n], which of them are only lower bounds [n], and their mean's interval."""

    values: Sequence[float]
    censored: Sequence[bool]
    mean: float
    low: float
    high: float


def plot_learning_curves(
    panels: Mapping[str, Mapping[str, Band]],
    path: Target,
    *,
    threshold: float | None = None,
    score_name: str,
    limits: tuple[float, float] | None = None,
    styles: Mapping[str, tuple[str, str]] | None = None,
    columns: int = 2,
) -> Path:
    """Draw one panel of mean curves and bands for each task, a legend beside them.

    Args:
        panels: title -> label -> curve.
        path: the picture, png or svg; or several.
        threshold: drawn as a line across. Default: none.
        score_name: of the vertical axis.
        limits: of the scores. Default: those drawn.
        styles: label -> color and line style. Default: the next color.
        columns: panels in a row. Default: 2.
    """
    styles = _styles(panels, styles)
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    legend = 1.9 / columns  # inches of each panel
    figure, axes = new_figure(rows, columns, panel=(4.7 + legend, 3.4))
    handles = {}
    for axis, (title, curves) in zip(axes, panels.items(), strict=False):
        axis.set_title(title, fontsize=10, loc="left")
        if threshold is not None:
            _draw_threshold(axis, threshold)
        for label, curve in curves.items():
            color, line = styles[label]
            axis.fill_between(curve.steps, curve.low, curve.high, color=color, alpha=0.13, lw=0)
            (handles[label],) = axis.plot(curve.steps, curve.mean, line, color=color, lw=1.8)
        _count_steps(axis)
        axis.set_ylabel(score_name, fontsize=9)
        if limits is not None:
            axis.set_ylim(*_with_margin(limits))
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    _legend_beside(figure, {label: handles[label] for label in styles})
    return save_figure(figure, path)


def plot_steps_to_threshold(
    panels: Mapping[str, Mapping[str, Dots]],
    path: Target,
    *,
    styles: Mapping[str, tuple[str, str]] | None = None,
    columns: int = 2,
) -> Path:
    """Draw one row for each label: a dot a run, hollow where it is only a bound, and the mean.

    Args:
        panels: title -> label -> steps of the runs.
        path: the picture, png or svg; or several.
        styles: label -> color and line style. Default: the next color.
        columns: panels in a row. Default: 2.
    """
    styles = _styles(panels, styles)
    columns = min(columns, len(panels))
    height = 0.9 + 0.32 * max(len(panel) for panel in panels.values())
    figure, axes = new_figure(math.ceil(len(panels) / columns), columns, panel=(6.2, height))
    for axis, (title, panel) in zip(axes, panels.items(), strict=False):
        axis.set_title(title, fontsize=10, loc="left")
        for row, (label, dots) in enumerate(panel.items()):
            color = styles[label][0]
            spread = row - 0.16 + 0.32 * (np.arange(len(dots.values)) + 0.5) / len(dots.values)
            for x, y, censored in zip(dots.values, spread, dots.censored, strict=True):
                face = "white" if censored else color
                axis.plot(x, y, "o", ms=5, mfc=face, mec=color, mew=1.1, alpha=0.75)
            axis.plot([dots.low, dots.high], [row, row], color=color, lw=5, alpha=0.25, zorder=1)
            axis.plot(dots.mean, row, "|", color=color, ms=17, mew=2.2)
        _label_rows(axis, panel)
        _count_steps(axis, "environment steps to the threshold (hollow: not reached)")
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    return save_figure(figure, path)


def plot_profiles(
    panels: Mapping[str, Mapping[str, Band]],
    path: Target,
    *,
    score_name: str,
    styles: Mapping[str, tuple[str, str]] | None = None,
) -> Path:
    """Draw performance profiles: the share of runs (up) that score more than a threshold (across).

    Args:
        panels: title -> label -> profile over thresholds, which stand in ``steps``.
        path: the picture, png or svg; or several.
        score_name: of the horizontal axis.
        styles: label -> color and line style. Default: the next color.
    """
    styles = _styles(panels, styles)
    figure, axes = new_figure(1, len(panels), panel=(4.7 + 1.9 / len(panels), 3.4))
    handles = {}
    for axis, (title, profiles) in zip(axes, panels.items(), strict=True):
        axis.set_title(title, fontsize=10, loc="left")
        for label, profile in profiles.items():
            color, line = styles[label]
            ends = (profile.low, profile.high)
            axis.fill_between(profile.steps, *ends, color=color, alpha=0.13, lw=0, step="post")
            (handles[label],) = axis.step(
                profile.steps, profile.mean, line, color=color, lw=1.8, where="post"
            )
        axis.set_ylim(*_with_margin((0.0, 1.0)))
        axis.set_xlabel(score_name, fontsize=9)
        axis.set_ylabel("share of runs above", fontsize=9)
    _legend_beside(figure, {label: handles[label] for label in styles})
    return save_figure(figure, path)


def plot_estimates(
    panels: Mapping[str, Mapping[str, Estimate]],
    path: Target,
    *,
    limits: tuple[float, float] | None = None,
    styles: Mapping[str, tuple[str, str]] | None = None,
) -> Path:
    """Draw one row for each label: a value with its interval.

    Args:
        panels: title -> label -> estimate.
        path: the picture, png or svg; or several.
        limits: of the values; a line down marks their middle. Default: those drawn, no line.
        styles: label -> color and line style. Default: the next color.
    """
    styles = _styles(panels, styles)
    height = 0.9 + 0.32 * max(len(panel) for panel in panels.values())
    figure, axes = new_figure(1, len(panels), panel=(5.2, height))
    for axis, (title, panel) in zip(axes, panels.items(), strict=True):
        axis.set_title(title, fontsize=10, loc="left")
        if limits is not None:
            axis.set_xlim(*_with_margin(limits))
            axis.axvline(sum(limits) / 2, color="#666", lw=0.9, ls=(0, (4, 3)), zorder=1)
        for row, (label, x) in enumerate(panel.items()):
            color = styles[label][0]
            axis.plot([x.low, x.high], [row, row], color=color, lw=5, alpha=0.3, zorder=2)
            axis.plot(x.value, row, "|", color=color, ms=15, mew=2.2)
        _label_rows(axis, panel)
    return save_figure(figure, path)


def _with_margin(limits: tuple[float, float]) -> tuple[float, float]:
    low, high = limits
    return low - 0.03 * (high - low), high + 0.03 * (high - low)


def _label_rows(axis: Axes, labels: Collection[str]) -> None:
    axis.set_yticks(range(len(labels)), list(labels))
    axis.tick_params(axis="y", length=0, labelsize=9)
    axis.set_ylim(len(labels) - 0.5, -0.5)
    axis.grid(False, axis="y")


def _draw_threshold(axis: Axes, threshold: float) -> None:
    from matplotlib.patheffects import withStroke

    axis.axhline(threshold, color="#666", lw=0.9, ls=(0, (4, 3)), zorder=1)
    axis.annotate(
        f"threshold {threshold:g}",
        (0, threshold),
        xycoords=axis.get_yaxis_transform(),
        xytext=(4, 3),
        textcoords="offset points",
        fontsize=8,
        color="#666",
        path_effects=[withStroke(linewidth=2.5, foreground="white")],
        zorder=3,
    )


def _legend_beside(figure: Figure, handles: Mapping[str, Line2D]) -> None:
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside right center",
        fontsize=9,
        frameon=False,
        handlelength=2.2,
    )


def _styles(
    panels: Mapping[str, Mapping[str, object]], styles: Mapping[str, tuple[str, str]] | None
) -> dict[str, tuple[str, str]]:
    """Color and line of every label, in the order in which they come."""
    labels = dict.fromkeys(label for panel in panels.values() for label in panel)
    default = {label: (COLORS[i % 7], STYLE[i // 7 % 4]) for i, label in enumerate(labels)}
    return default | {label: style for label, style in (styles or {}).items() if label in labels}


def _count_steps(axis: Axes, label: str = "environment steps") -> None:
    count_steps(axis, 6, [1, 2, 5, 10])
    axis.set_xlim(left=0)
    axis.set_xlabel(label, fontsize=9)
