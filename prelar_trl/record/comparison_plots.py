"""Pictures of several methods compared: curves with intervals, profiles, estimates."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from prelar_trl.record.plots import COLORS, STYLE, count_steps, new_figure, save_figure
from prelar_trl.record.statistics import Estimate

if TYPE_CHECKING:  # see plots.py
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Target = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
Styles = Mapping[str, tuple[str, str]]  # label -> color and line
LEGEND = 1.9  # inches beside the panels


class Band(NamedTuple):
    """A mean curve over runs and its interval, [n] each; few runs [runs, n] are drawn instead."""

    steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    runs: Sequence[np.ndarray] = ()


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
    styles: Styles | None = None,
    columns: int = 2,
) -> Path:
    """Draw one panel of mean curves with bands, or few runs, for each task, a legend beside them.

    Args:
        panels: title -> label -> curve.
        path: the picture, png or svg; or several.
        threshold: drawn as a line across. Default: none.
        score_name: of the vertical axis.
        limits: of the scores. Default: those drawn.
        styles: label -> color and line style. Default: the next color.
        columns: panels in a row. Default: 2.
    """
    columns = min(columns, len(panels))
    figure, axes = new_figure(panels, columns, (4.7 + LEGEND / columns, 3.4), title_size=10)
    for axis in axes:
        if threshold is not None:
            _draw_threshold(axis, threshold)
        if limits is not None:
            axis.set_ylim(*_with_margin(limits))
        axis.set_ylabel(score_name, fontsize=9)
    _draw_bands(figure, axes, panels, styles)
    for axis in axes:
        _count_steps(axis)
    return save_figure(figure, path)


def plot_steps_to_threshold(
    panels: Mapping[str, Mapping[str, Dots]],
    path: Target,
    *,
    styles: Styles | None = None,
    columns: int = 2,
) -> Path:
    """Draw one row for each label: a dot a run, hollow where it is only a bound, and the mean.

    Args:
        panels: title -> label -> steps of the runs.
        path, styles, columns: as in :func:`plot_learning_curves`.
    """
    figure, axes, colors = _new_rows(panels, styles, columns, width=6.2)
    for axis, panel in zip(axes, panels.values(), strict=True):
        for row, (label, dots) in enumerate(panel.items()):
            color = colors[label]
            spread = row - 0.16 + 0.32 * (np.arange(len(dots.values)) + 0.5) / len(dots.values)
            for x, y, censored in zip(dots.values, spread, dots.censored, strict=True):
                face = "white" if censored else color
                axis.plot(x, y, "o", ms=5, mfc=face, mec=color, mew=1.1, alpha=0.75)
            _draw_estimate(axis, row, Estimate(dots.mean, dots.low, dots.high), color)
        _count_steps(axis, "environment steps to the threshold (hollow: not reached)")
    return save_figure(figure, path)


def plot_profiles(
    panels: Mapping[str, Mapping[str, Band]],
    path: Target,
    *,
    score_name: str,
    styles: Styles | None = None,
) -> Path:
    """Draw performance profiles: the share of runs (up) that score more than a threshold (across).

    Args:
        panels: title -> label -> profile over thresholds, which stand in ``steps``.
        path, styles: as in :func:`plot_learning_curves`.
        score_name: of the horizontal axis.
    """
    width = 4.7 + LEGEND / len(panels)
    figure, axes = new_figure(panels, len(panels), (width, 3.4), title_size=10)
    _draw_bands(figure, axes, panels, styles, step="post")
    for axis in axes:
        axis.set_ylim(*_with_margin((0.0, 1.0)))
        axis.set_xlabel(score_name, fontsize=9)
        axis.set_ylabel("share of runs above", fontsize=9)
    return save_figure(figure, path)


def plot_estimates(
    panels: Mapping[str, Mapping[str, Estimate]],
    path: Target,
    *,
    limits: tuple[float, float] | None = None,
    styles: Styles | None = None,
) -> Path:
    """Draw one row for each label: a value with its interval.

    Args:
        panels: title -> label -> estimate.
        path, styles: as in :func:`plot_learning_curves`.
        limits: of the values; a line down marks their middle. Default: those drawn, no line.
    """
    figure, axes, colors = _new_rows(panels, styles, len(panels), width=5.2)
    for axis, panel in zip(axes, panels.values(), strict=True):
        if limits is not None:
            axis.set_xlim(*_with_margin(limits))
            axis.axvline(sum(limits) / 2, color="#666", lw=0.9, ls=(0, (4, 3)), zorder=1)
        for row, (label, estimate) in enumerate(panel.items()):
            _draw_estimate(axis, row, estimate, colors[label])
    return save_figure(figure, path)


def _with_margin(limits: tuple[float, float]) -> tuple[float, float]:
    low, high = limits
    return low - 0.03 * (high - low), high + 0.03 * (high - low)


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


def _draw_bands(
    figure: Figure,
    axes: Sequence[Axes],
    panels: Mapping[str, Mapping[str, Band]],
    styles: Styles | None,
    step: Literal["post"] | None = None,
) -> None:
    """Curves with intervals, and the legend beside; ``step``: where a curve jumps, if it does."""
    styles, handles = _styles(panels, styles), {}
    drawstyle = "default" if step is None else f"steps-{step}"
    for axis, bands in zip(axes, panels.values(), strict=True):
        for label, (x, mean, low, high, runs) in bands.items():
            color, line = styles[label]
            for run in runs:
                axis.plot(x, run, color=color, lw=0.8, alpha=0.45, drawstyle=drawstyle)
            if not runs:
                axis.fill_between(x, low, high, color=color, alpha=0.13, lw=0, step=step)
            handles[label], *_ = axis.plot(
                x, mean, line, color=color, lw=1.8, drawstyle=drawstyle, label=label
            )
    figure.legend(
        handles=[handles[label] for label in styles],
        loc="outside right center",
        fontsize=9,
        frameon=False,
        handlelength=2.2,
    )


def _new_rows(
    panels: Mapping[str, Mapping[str, object]], styles: Styles | None, columns: int, width: float
) -> tuple[Figure, list[Axes], dict[str, str]]:
    """A figure with a row for each label of a panel, and the labels' colors."""
    height = 0.9 + 0.32 * max(map(len, panels.values()))
    figure, axes = new_figure(panels, columns, (width, height), title_size=10)
    for axis, labels in zip(axes, panels.values(), strict=True):
        axis.set_yticks(range(len(labels)), list(labels))
        axis.tick_params(axis="y", length=0, labelsize=9)
        axis.set_ylim(len(labels) - 0.5, -0.5)
        axis.grid(False, axis="y")
    return figure, axes, {label: color for label, (color, _) in _styles(panels, styles).items()}


def _draw_estimate(axis: Axes, row: int, estimate: Estimate, color: str) -> None:
    value, low, high = estimate
    axis.plot([low, high], [row, row], color=color, lw=5, alpha=0.25, zorder=1)
    axis.plot(value, row, "|", color=color, ms=17, mew=2.2)


def _styles(panels: Mapping[str, Mapping[str, object]], styles: Styles | None) -> Styles:
    """Color and line of every label, in the order in which they come."""
    labels = dict.fromkeys(label for panel in panels.values() for label in panel)
    default = {label: (COLORS[i % 7], STYLE[i // 7 % 4]) for i, label in enumerate(labels)}
    return default | {label: style for label, style in (styles or {}).items() if label in labels}


def _count_steps(axis: Axes, label: str = "environment steps") -> None:
    count_steps(axis, 6, [1, 2, 5, 10])
    axis.set_xlim(left=0)
    axis.set_xlabel(label, fontsize=9)
