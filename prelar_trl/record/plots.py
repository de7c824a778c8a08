"""Curves from ``metrics.csv``: smoothed, with a band, one or several runs."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from prelar_trl.record.table import read_rows

# matplotlib is imported where it draws: a run trains before it draws, and starts half a second
# sooner.
if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#333333")
"""Okabe and Ito's colors, told apart by color-blind readers; yellow left out."""
STYLE = ("-", "--", ":", "-.")
FEW_POINTS = 12  # up to here points are shown as they are, unsmoothed
PANEL = (3.6, 2.5)  # inches


class Series(NamedTuple):
    """One metric of one run: ``steps`` [n] and ``values`` [n], in the order logged."""

    steps: np.ndarray
    values: np.ndarray


def read_metrics(path: str | os.PathLike[str]) -> dict[str, Series]:
    """Every metric of a ``metrics.csv``, by name; empty cells are left out, NaN is kept.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it has no column "step".
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: the run has logged nothing yet")
    names, rows = read_rows(path)
    return to_series(rows, "step", [name for name in names if name != "step"])


def to_series(
    rows: Sequence[Mapping[str, str]], step: str, names: Iterable[str]
) -> dict[str, Series]:
    """Columns of a table over its column ``step``; empty cells and columns are left out."""
    series = {}
    for name in names:
        pairs = [(float(row[step]), float(row[name])) for row in rows if row[name]]
        if pairs:
            series[name] = Series(*np.array(pairs).T)
    return series


def smooth(values: np.ndarray, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Centred moving mean and standard deviation, [n] each; the window is cut at the ends."""
    kernel = np.ones(window)
    count = np.convolve(np.ones(len(values)), kernel, "same")
    mean = np.convolve(values, kernel, "same") / count
    shifted = values - values.mean()  # keeps the difference of squares exact enough
    second = np.convolve(shifted**2, kernel, "same") / count
    first = np.convolve(shifted, kernel, "same") / count
    return mean, np.sqrt(np.maximum(second - first**2, 0))


def plot_curves(
    runs: Mapping[str, Mapping[str, Series]],
    path: str | os.PathLike[str],
    metrics: Sequence[str],
    *,
    columns: int = 3,
    step_name: str = "step",
) -> Path:
    """Draw one panel a metric with one line a run: moving mean, a band of one deviation.

    Args:
        runs: label -> metrics, as :func:`read_metrics` returns them.
        path: the picture, png or svg.
        metrics: what to draw; a run without one is left out of its panel.
        columns: panels in a row. Default: 3.
        step_name: what the horizontal axis counts. Default: "step".

    Raises:
        ValueError: a metric that no run has.
    """
    for metric in metrics:
        if not any(metric in run for run in runs.values()):
            known = sorted({name for run in runs.values() for name in run})
            raise ValueError(f"no run has the metric {metric!r}: there are {', '.join(known)}")
    figure, axes = new_figure(metrics, columns)
    for axis, metric in zip(axes, metrics, strict=True):
        for i, (label, run) in enumerate(runs.items()):
            if metric in run:
                _draw(axis, run[metric], label, COLORS[i % 7], STYLE[i // 7 % 4])
        _scale(axis, metric, [run[metric].values for run in runs.values() if metric in run])
        count_steps(axis, 5)
        axis.set_xlabel(step_name, fontsize=8)
        if len(runs) > 1:
            axis.legend(fontsize=7, frameon=False)
    return save_figure(figure, path)


def plot_psnr_by_step(
    curves: Mapping[str, Sequence[float]],
    path: str | os.PathLike[str],
    *,
    context: int,
    label: str = "PSNR (dB)",
) -> Path:
    """Draw PSNR, or another quality, over the frames of an open-loop prediction.

    Args:
        curves: label -> dB of each frame [T].
        path: the picture, png or svg.
        context: number of frames seen; the rest is imagined.
        label: of the vertical axis. Default: ``PSNR (dB)``.
    """
    figure, (axis,) = new_figure([""], panel=(5.4, 3.0))
    axis.axvspan(0.5, context + 0.5, color="#eef2f4", lw=0)
    for i, (name, values) in enumerate(curves.items()):
        frames = np.arange(1, len(values) + 1)
        axis.plot(frames, values, label=name, color=COLORS[i % 7], marker="o", ms=3, lw=1.5)
    axis.set_xlim(0.5, max(len(values) for values in curves.values()) + 0.5)
    count_steps(axis, 10)
    for x, text in ((0.7, "seen"), (context + 0.7, "imagined")):
        axis.text(x, 1.02, text, transform=axis.get_xaxis_transform(), fontsize=8, color="#555")
    axis.set_xlabel("frame", fontsize=8)
    axis.set_ylabel(label, fontsize=8)
    if len(curves) > 1:
        axis.legend(fontsize=8, frameon=False)
    return save_figure(figure, path)


def plot_bars(
    panels: Mapping[str, Mapping[str, Sequence[float]]],
    path: str | os.PathLike[str],
    *,
    columns: int = 3,
    colors: Mapping[str, str] | None = None,
    lines: Mapping[str, float] | None = None,
) -> Path:
    """Draw one panel of horizontal bars for each quantity: means, and every value as a dot.

    Panels with the labels of the one to their left do not repeat them.

    Args:
        panels: title -> label -> values, of several seeds or one.
        path: the picture, png or svg.
        columns: panels in a row. Default: 3.
        colors: label -> color. Default: :data:`COLORS` in turn.
        lines: title -> value that a dashed line marks, say that of chance. Default: none.
    """
    colors, lines = colors or {}, lines or {}
    height = 0.7 + 0.25 * max(map(len, panels.values()))
    titles = [textwrap.fill(title, 44) for title in panels]
    figure, axes = new_figure(titles, columns, panel=(PANEL[0], height))
    left: list[str] = []
    for i, (axis, (title, panel)) in enumerate(zip(axes, panels.items(), strict=True)):
        for row, (label, values) in enumerate(panel.items()):
            color = colors.get(label, COLORS[row % len(COLORS)])
            axis.barh(row, np.mean(values), color=color, alpha=0.45, height=0.7)
            axis.plot(values, [row] * len(values), "o", color=color, ms=3)
        labels = list(panel)
        axis.set_yticks(range(len(labels)), labels)
        if i % columns and labels == left:
            axis.tick_params(labelleft=False)
        axis.set_ylim(len(labels) - 0.5, -0.5)
        axis.axvline(0, color="#444", lw=0.8)
        if title in lines:
            axis.axvline(lines[title], color="#666", lw=0.9, ls=(0, (4, 3)))
        left = labels
    return save_figure(figure, path)


def plot_scatter(
    points: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    path: str | os.PathLike[str],
    *,
    x_label: str,
    y_label: str,
) -> Path:
    """Draw one panel of points for each title: ``title -> (x, y)``."""
    figure, axes = new_figure(points, len(points))
    for axis, (x, y) in zip(axes, points.values(), strict=True):
        axis.plot(x, y, "o", color=COLORS[0], ms=2, alpha=0.3, mew=0)
        axis.set_xlabel(x_label, fontsize=8)
        axis.set_ylabel(y_label, fontsize=8)
    return save_figure(figure, path)


def new_figure(
    titles: Collection[str],
    columns: int = 1,
    panel: tuple[float, float] = PANEL,
    title_size: float = 9,
) -> tuple[Figure, list[Axes]]:
    """A figure with an axis for each title, at most ``columns`` in a row, ``panel`` inches each.

    Without pyplot: no global state, no display.
    """
    from matplotlib.figure import Figure

    columns = min(columns, len(titles))
    rows = math.ceil(len(titles) / columns)
    figure = Figure(figsize=(panel[0] * columns, panel[1] * rows), layout="constrained", dpi=150)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[len(titles) :]:
        axis.set_axis_off()
    for axis, title in zip(axes, titles, strict=False):
        axis.set_title(title, fontsize=title_size, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#e4e7ea", lw=0.6)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=8, colors="#444", length=2)
    return figure, axes[: len(titles)]


def count_steps(axis: Axes, ticks: int, steps: Sequence[int] | None = None) -> None:
    """Whole numbers across, at most ``ticks`` of them, multiples of ``steps``; 20000 is 20k."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.xaxis.set_major_locator(MaxNLocator(ticks, integer=True, steps=steps))


def _draw(axis: Axes, series: Series, label: str, color: str, style: str) -> None:
    finite = np.isfinite(series.values)
    steps, values = series.steps[finite], series.values[finite]
    if len(values) <= FEW_POINTS:
        axis.plot(steps, values, style, label=label, color=color, marker="o", ms=3.5, lw=1.5)
        return
    mean, deviation = smooth(values, max(3, len(values) // 20) | 1)
    axis.fill_between(steps, mean - deviation, mean + deviation, color=color, alpha=0.18, lw=0)
    axis.plot(steps, mean, style, label=label, color=color, lw=1.5)


def _scale(axis: Axes, metric: str, values: Sequence[np.ndarray]) -> None:
    """A logarithmic axis where positive values span so much that a linear one hides the end."""
    together = np.concatenate(values)
    together = together[np.isfinite(together)]
    if "success" in metric or "accuracy" in metric:
        axis.set_ylim(-0.03, 1.03)
    elif len(together) and together.min() > 0 and together.max() > 20 * np.median(together):
        axis.set_yscale("log")


def save_figure(
    figure: Figure, path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
) -> Path:
    """Write a figure to a file, or to several of different formats; returns the first."""
    paths = [Path(x) for x in ([path] if isinstance(path, str | os.PathLike) else path)]
    for file in paths:
        file.parent.mkdir(parents=True, exist_ok=True)
        made = {"Date": None} if file.suffix == ".svg" else None  # an svg would hold the time
        figure.savefig(file, facecolor="white", metadata=made)
    return paths[0]
