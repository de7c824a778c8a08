"""Statistics of few runs, and the progress display."""

from __future__ import annotations

import numpy as np
import pytest

from prelar_trl.record import (
    bootstrap_interval,
    interquartile_mean,
    wilson_interval,
)


def test_interquartile_mean_ignores_the_outer_quarters():
    assert interquartile_mean([1000, 0, 1, 2, 3, 4, 10, 20]) == 4.75
    assert interquartile_mean([[7.0]]) == 7.0


def test_interquartile_mean_refuses_nan():
    with pytest.raises(ValueError, match="finite"):
        interquartile_mean([1.0, float("nan")])


def test_bootstrap_draws_runs_within_each_task():
    # Tasks differ widely, runs within a task do not: nothing can vary.
    scores = np.tile([0.0, 0.5, 1.0], (5, 1))
    assert bootstrap_interval(scores, statistic=np.mean) == (0.5, 0.5)


def test_bootstrap_draws_the_tasks_independently():
    # Drawn together, the two tasks would always cancel out.
    scores = np.linspace(-1, 1, 8)[:, None] * [1, -1]
    low, high = bootstrap_interval(scores, statistic=np.mean)
    assert low < -0.1 and high > 0.1


def test_bootstrap_interval_has_the_width_of_the_mean_s_error():
    scores = np.random.default_rng(0).normal(size=(200, 1))
    low, high = bootstrap_interval(scores, statistic=np.mean)
    assert low < scores.mean() < high
    assert high - low == pytest.approx(2 * 1.96 / 200**0.5, rel=0.15)
    assert bootstrap_interval(scores, seed=3) == bootstrap_interval(scores, seed=3)


def test_wilson_interval_agrees_with_its_formula():
    z, n, p = 1.959964, 10, 0.9
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
    assert wilson_interval(9, 10) == pytest.approx((middle - half, middle + half), abs=1e-6)
    assert wilson_interval(0, 10)[1] > 0.2 and wilson_interval(10, 10)[1] == 1


@pytest.mark.parametrize("successes, episodes", [(3, 2), (-1, 2), (0, 0)])
def test_wilson_interval_refuses_impossible_counts(successes, episodes):
    with pytest.raises(ValueError, match=f"successes={successes}, episodes={episodes}"):
        wilson_interval(successes, episodes)
