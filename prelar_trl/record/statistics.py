"""Statistics of few runs: interquartile mean, bootstrap and Wilson intervals."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import binomtest, trim_mean


def interquartile_mean(scores: ArrayLike) -> float:
    """Mean of the middle half of all scores; ``floor(n / 4)`` are cut at either end."""
    scores = np.asarray(scores, dtype=float).reshape(-1)
    if scores.size == 0 or not np.isfinite(scores).all():
        raise ValueError(f"interquartile mean: finite scores are needed, got {scores.tolist()}")
    return float(trim_mean(scores, 0.25))


def bootstrap_interval(
    scores: ArrayLike,
    *,
    statistic: Callable[[np.ndarray], float] = interquartile_mean,
    confidence: float = 0.95,
    samples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of a statistic by stratified bootstrap.

    Runs are drawn with replacement within each task, independently of the other tasks.

    Args:
        scores: [runs, tasks], or [runs] for one task.
        statistic: from [runs, tasks] to a number. Default: :func:`interquartile_mean`.
        confidence: default 0.95.
        samples: number of redrawn tables. Default: 2000.
        seed: of the draws. Default: 0.
    """
    table = np.asarray(scores, dtype=float)
    table = table[:, None] if table.ndim == 1 else table
    if table.ndim != 2 or table.size == 0:
        raise ValueError(f"bootstrap: scores [runs, tasks] are needed, got {list(table.shape)}")
    rng = np.random.default_rng(seed)
    rows = rng.integers(len(table), size=(samples, *table.shape))
    values = [statistic(np.take_along_axis(table, row, axis=0)) for row in rows]
    tail = (1 - confidence) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def wilson_interval(successes: int, episodes: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a success rate; meaningful at 0 and 1 and for few episodes."""
    if not 0 <= successes <= episodes or episodes < 1:
        raise ValueError(
            f"wilson_interval: 0 <= successes <= episodes and episodes >= 1 are needed, got "
            f"successes={successes}, episodes={episodes}"
        )
    interval = binomtest(successes, episodes).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)
