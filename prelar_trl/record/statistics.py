"""Statistics of few runs: interquartile mean, steps to a threshold, comparisons, intervals.

Intervals of several runs are percentile intervals of a stratified bootstrap (Agarwal et al., "Deep
reinforcement learning at the edge of the statistical precipice", NeurIPS 2021): the runs of each
task are drawn anew with replacement, independently of the other tasks and of the other methods.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import scipy  # which imports scipy.stats when it is used
from numpy.typing import ArrayLike

from prelar_trl.utils import check_choice, check_integers, check_range

SAMPLES = 2000  # redrawn tables of a bootstrap
CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """A value and the ends of its interval."""

    value: float
    low: float
    high: float


class StepsToThreshold(NamedTuple):
    """``steps`` until a threshold was reached; ``censored``: it never was, ``steps`` is a bound."""

    steps: float
    censored: bool


def interquartile_mean(scores: ArrayLike) -> float:
    """Mean of the middle half of all scores; ``floor(n / 4)`` are cut at either end."""
    scores = np.asarray(scores, dtype=float).reshape(-1)
    if scores.size == 0 or not np.isfinite(scores).all():
        raise ValueError(f"interquartile mean: finite scores are needed, got {scores.tolist()}")
    return float(scipy.stats.trim_mean(scores, 0.25))


def bootstrap_interval(
    scores: ArrayLike,
    *,
    statistic: Callable[[np.ndarray], float] = interquartile_mean,
    confidence: float = CONFIDENCE,
    samples: int = SAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of a statistic by stratified bootstrap.

    Args:
        scores: [runs, tasks], or [runs] for one task.
        statistic: from [runs, tasks] to a number. Default: :func:`interquartile_mean`.
        confidence: default 0.95.
        samples: number of redrawn tables. Default: 2000.
        seed: of the draws. Default: 0.
    """
    _check_bootstrap(confidence, samples)
    (redrawn,) = _redraw(samples, seed, _table(scores))
    low, high = _interval(np.array([statistic(table) for table in redrawn]), confidence).tolist()
    return low, high


def bootstrap_band(
    curves: ArrayLike,
    *,
    statistic: Literal["mean", "iqm"] = "mean",
    confidence: float = CONFIDENCE,
    samples: int = SAMPLES,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Pointwise interval of an aggregated curve, [points] each; whole runs are redrawn by task.

    Args:
        curves: [runs, points] of one task, or [runs, tasks, points].
        statistic: over runs and tasks: their mean, or interquartile mean. Default: ``mean``.
        confidence, samples, seed: as in :func:`bootstrap_interval`.
    """
    curves = _curves(curves)
    _check_bootstrap(confidence, samples)
    tasks = curves[:, None] if curves.ndim == 2 else curves
    rows = np.random.default_rng(seed).integers(len(tasks), size=(samples, *tasks.shape[:2]))
    values = np.empty((samples, tasks.shape[2]))
    for point in range(tasks.shape[2]):
        redrawn = np.take_along_axis(tasks[None, ..., point], rows, axis=1)
        values[:, point] = _aggregate(redrawn.reshape(samples, -1), statistic)
    low, high = _interval(values, confidence)
    return low, high


def aggregate_curve(curves: ArrayLike, statistic: Literal["mean", "iqm"] = "mean") -> np.ndarray:
    """Mean or interquartile mean over runs and tasks at each point, [points].

    Args:
        curves: [runs, points] or [runs, tasks, points].
        statistic: default ``mean``.
    """
    curves = _curves(curves)
    return _aggregate(curves.reshape(-1, curves.shape[-1]).T, statistic)


def performance_profile(
    scores: ArrayLike,
    thresholds: ArrayLike,
    *,
    confidence: float = CONFIDENCE,
    samples: int = SAMPLES,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Share of runs that score more than each threshold, over all tasks.

        F(tau) = 1/M sum_m 1/N sum_n 1[x_nm > tau]

    Agarwal et al. 2021, section 4.2: the score distribution. A method whose profile lies above
    another's everywhere is stochastically better. Returned with the ends of its pointwise interval,
    [points] each.

    Args:
        scores: ``x`` [N, M], runs and tasks, or [N] for one task.
        thresholds: ``tau`` [points].
        confidence, samples, seed: as in :func:`bootstrap_interval`.
    """
    table, thresholds = _table(scores), np.asarray(thresholds, dtype=float)
    if thresholds.ndim != 1 or not np.isfinite(thresholds).all() or not thresholds.size:
        raise ValueError(
            f"profile: finite thresholds [points] are needed, got {thresholds.tolist()}"
        )
    above = table[..., None] > thresholds
    low, high = bootstrap_band(above, confidence=confidence, samples=samples, seed=seed)
    return above.mean(axis=(0, 1)), low, high


def steps_to_threshold(
    steps: ArrayLike, scores: ArrayLike, threshold: float, *, confirm: int = 2
) -> StepsToThreshold:
    """Environment steps until the evaluated score stays at the threshold.

        min { steps[i] : scores[i], ..., scores[i + confirm - 1] >= threshold }

    With ``confirm=2``, one lucky evaluation counts only if the next one reaches the threshold, too.
    A run where no such ``i`` exists is censored: it gets the step at which the next evaluation
    would have been, ``2 * steps[n - 1] - steps[n - 2]``. That is less than it truly needs, unless
    its last evaluation, which nothing confirms, has reached the threshold already.

    Args:
        steps: of the evaluations, positive and increasing, [n].
        scores: [n], more is better.
        threshold: the score to reach.
        confirm: evaluations in a row that must reach it. Default: 2.

    Raises:
        ValueError: no evaluation, unequal lengths, or steps that do not increase.
    """
    steps, scores = np.asarray(steps, dtype=float), np.asarray(scores, dtype=float)
    if steps.ndim != 1 or steps.size == 0 or steps.shape != scores.shape:
        raise ValueError(
            f"steps to a threshold: {list(scores.shape)} scores for {list(steps.shape)} steps"
        )
    check_integers(confirm=confirm)
    if np.isnan(scores).any() or not np.isfinite(threshold):
        raise ValueError(f"steps to a threshold: NaN among the scores, or threshold={threshold}")
    intervals = np.diff(steps, prepend=0)
    if not (intervals > 0).all() or not np.isfinite(steps).all():
        raise ValueError(f"steps to a threshold: steps must increase, got {steps.tolist()}")
    for i in range(len(scores) - confirm + 1):
        if (scores[i : i + confirm] >= threshold).all():
            return StepsToThreshold(float(steps[i]), False)
    return StepsToThreshold(float(steps[-1] + intervals[-1]), True)


def ratio_of_means(
    scores: ArrayLike,
    baseline: ArrayLike,
    *,
    confidence: float = CONFIDENCE,
    samples: int = SAMPLES,
    seed: int = 0,
) -> Estimate:
    """``mean(scores) / mean(baseline)``, with a stratified bootstrap of both.

    Args:
        scores: [runs, tasks], or [runs] for one task.
        baseline: likewise, with the same tasks; the numbers of runs may differ.
        confidence, samples, seed: as in :func:`bootstrap_interval`.

    Raises:
        ValueError: tasks differ, or a baseline that is not positive.
    """
    _check_bootstrap(confidence, samples)
    x, y = _pair(scores, baseline)
    if not (y > 0).all():
        raise ValueError(f"ratio of means: the baseline must be positive, got {y.tolist()}")
    means = (table.mean(axis=(1, 2)) for table in _redraw(samples, seed, x, y))
    return Estimate(float(x.mean() / y.mean()), *_interval(np.divide(*means), confidence).tolist())


def probability_of_improvement(
    scores: ArrayLike,
    baseline: ArrayLike,
    *,
    confidence: float = CONFIDENCE,
    samples: int = SAMPLES,
    seed: int = 0,
) -> Estimate:
    """How likely a run is better than one of the baseline on a task drawn at random.

        P(X > Y) = 1/M sum_m 1/(N K) sum_i sum_j S(x_im, y_jm)
        S(x, y)  = 1 if x > y, 1/2 if x = y, 0 else

    Agarwal et al. 2021, section 4.3; the terms of one task are the Mann-Whitney U statistic over
    ``N K``. For scores of which less is better, pass them negated.

    Args:
        scores: ``x`` [N, M], runs and tasks, or [N] for one task.
        baseline: ``y`` [K, M], or [K].
        confidence, samples, seed: as in :func:`bootstrap_interval`.

    Raises:
        ValueError: tasks differ.
    """
    _check_bootstrap(confidence, samples)
    x, y = _pair(scores, baseline)
    redrawn = _wins(*_redraw(samples, seed, x, y))
    return Estimate(float(_wins(x, y)), *_interval(redrawn, confidence).tolist())


def wilson_interval(
    successes: int, episodes: int, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Wilson's score interval of a success rate; meaningful at 0 and 1 and for few episodes."""
    check_integers(-(2**31), successes=successes, episodes=episodes)
    _check_bootstrap(confidence, 1)
    if not 0 <= successes <= episodes or episodes < 1:
        raise ValueError(
            f"wilson_interval: 0 <= successes <= episodes and episodes >= 1 are needed, got "
            f"successes={successes}, episodes={episodes}"
        )
    interval = scipy.stats.binomtest(successes, episodes).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def _curves(curves: ArrayLike) -> np.ndarray:
    """Curves as [runs, points] or [runs, tasks, points]."""
    curves = np.asarray(curves, dtype=float)
    if curves.ndim not in (2, 3) or curves.size == 0:
        raise ValueError(f"bootstrap: curves [runs, points] are needed, got {list(curves.shape)}")
    return curves


def _check_bootstrap(confidence: float, samples: int) -> None:
    check_integers(samples=samples)
    check_range(0, 1, confidence=confidence)
    if confidence in (0, 1):
        raise ValueError(f"bootstrap: confidence={confidence} must lie between 0 and 1")


def _table(scores: ArrayLike) -> np.ndarray:
    """Scores as [runs, tasks]."""
    table = np.asarray(scores, dtype=float)
    table = table[:, None] if table.ndim == 1 else table
    if table.ndim != 2 or table.size == 0:
        raise ValueError(f"bootstrap: scores [runs, tasks] are needed, got {list(table.shape)}")
    if not np.isfinite(table).all():
        raise ValueError(f"bootstrap: finite scores are needed, got {table.tolist()}")
    return table


def _pair(scores: ArrayLike, baseline: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    x, y = _table(scores), _table(baseline)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"comparison: {x.shape[1]} tasks against {y.shape[1]} of the baseline")
    return x, y


def _redraw(samples: int, seed: int, *tables: np.ndarray) -> list[np.ndarray]:
    """[samples, runs, tasks] of each table: the runs of each task with replacement."""
    rng, redrawn = np.random.default_rng(seed), []
    for table in tables:
        rows = rng.integers(len(table), size=(samples, *table.shape))
        redrawn.append(np.take_along_axis(table[None], rows, axis=1))
    return redrawn


def _aggregate(values: np.ndarray, statistic: Literal["mean", "iqm"]) -> np.ndarray:
    """Over the last axis [..., n]."""
    check_choice("statistic", statistic, ("mean", "iqm"))
    if statistic == "mean":
        return values.mean(axis=-1)
    return scipy.stats.trim_mean(values, 0.25, axis=-1)  # as interquartile_mean


def _interval(values: np.ndarray, confidence: float) -> np.ndarray:
    """Both ends, over the first axis, [2, ...]."""
    tail = (1 - confidence) / 2
    return np.quantile(values, [tail, 1 - tail], axis=0)


def _wins(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Share of the pairs that ``x`` [..., N, M] wins against ``y`` [..., K, M], draws half."""
    x, y = x[..., :, None, :], y[..., None, :, :]
    return ((x > y) + 0.5 * (x == y)).mean(axis=(-3, -2, -1))
