"""Statistics of few runs: known values, symmetries, and what intervals are for."""

from __future__ import annotations

import numpy as np
import pytest

from prelar_trl.record import (
    bootstrap_band,
    bootstrap_interval,
    interquartile_mean,
    probability_of_improvement,
    ratio_of_means,
    steps_to_threshold,
    wilson_interval,
)


def test_interquartile_mean_ignores_the_outer_quarters():
    assert interquartile_mean([1000, 0, 1, 2, 3, 4, 10, 20]) == 4.75
    assert interquartile_mean([[7.0]]) == 7.0


def test_bootstrap_draws_runs_within_each_task_and_tasks_independently():
    # Tasks differ widely, runs within a task do not: nothing can vary.
    scores = np.tile([0.0, 0.5, 1.0], (5, 1))
    assert bootstrap_interval(scores, statistic=np.mean) == (0.5, 0.5)
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


def test_band_of_a_mean_curve_is_the_interval_of_each_point():
    curves = np.random.default_rng(0).normal([0.0, 5.0, 50.0], [0.0, 1.0, 4.0], size=(300, 3))
    low, high = bootstrap_band(curves)
    assert low.shape == high.shape == (3,)
    width = 2 * 1.96 * np.array([0.0, 1.0, 4.0]) / 300**0.5
    assert high - low == pytest.approx(width, rel=0.2, abs=1e-12)
    assert (low <= curves.mean(0) + 1e-12).all() and (curves.mean(0) <= high + 1e-12).all()


@pytest.mark.parametrize(
    ("scores", "options", "expected"),
    [
        ([0, 9, 0, 8, 8], {}, (400, False)),  # 9 was luck
        ([0, 9, 0, 8, 8], {"confirm": 1}, (200, False)),
        ([0, 9, 0, 8, 8], {"confirm": 3}, (600, True)),  # one interval after its end
        ([8, 8, 0, 0, 0], {}, (100, False)),
        ([1, 2, 3], {}, (400, True)),
        ([1, 2, 9], {}, (400, True)),
        ([9, 9], {"confirm": 3}, (300, True)),
        ([9], {}, (200, True)),
    ],
)
def test_threshold_is_reached_where_the_next_evaluation_confirms_it(scores, options, expected):
    steps = [100, 200, 300, 400, 500][: len(scores)]
    assert steps_to_threshold(steps, scores, 8, **options) == expected


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: steps_to_threshold([1, 2], [1], 0.5), r"\[1\] scores for \[2\] steps"),
        (lambda: steps_to_threshold([], [], 0.5), "scores"),
        (lambda: steps_to_threshold([2, 1], [0, 0], 0.5), "increase"),
        (lambda: interquartile_mean([1.0, float("nan")]), "finite"),
        (lambda: ratio_of_means([1, 2], [0, 1]), "positive"),
        (lambda: ratio_of_means([1, 2], [[1, 2]]), "1 tasks against 2"),
        (lambda: wilson_interval(3, 2), "successes=3, episodes=2"),
        (lambda: wilson_interval(-1, 2), "successes=-1, episodes=2"),
        (lambda: wilson_interval(0, 0), "successes=0, episodes=0"),
    ],
)
def test_what_has_no_statistic_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_ratio_of_means_and_its_interval():
    assert ratio_of_means([2, 4], [4, 8])[0] == 0.5
    assert ratio_of_means([3, 3, 3], [6, 6]) == (0.5, 0.5, 0.5)
    rng = np.random.default_rng(0)
    x, y = rng.normal(10, 1, 200), rng.normal(20, 4, 300)
    ratio = ratio_of_means(x, y)
    # First order: relative variances of both means add.
    width = 2 * 1.96 * ratio.value * ((0.1 / 200**0.5) ** 2 + (0.2 / 300**0.5) ** 2) ** 0.5
    assert ratio.high - ratio.low == pytest.approx(width, rel=0.2)
    assert ratio.low < ratio.value < ratio.high
    scaled = ratio_of_means(10 * x, y)
    assert np.array(scaled) == pytest.approx(10 * np.array(ratio))


def test_probability_of_improvement_has_its_known_values():
    assert probability_of_improvement([2, 3], [0, 1]) == (1, 1, 1)
    assert probability_of_improvement([0, 1], [2, 3]) == (0, 0, 0)
    assert probability_of_improvement([1, 1], [1, 1, 1]) == (0.5, 0.5, 0.5)
    assert probability_of_improvement([0, 2], [1, 2, 3])[0] == pytest.approx(1.5 / 6)
    # Better on one task, worse on the other.
    assert probability_of_improvement([[1, 0], [1, 0]], [[0, 1]])[0] == 0.5


def test_probability_of_improvement_is_symmetric_and_sees_only_the_order():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8, 3)), rng.normal(0.3, 1, size=(6, 3))
    value = probability_of_improvement(x, y).value
    assert value + probability_of_improvement(y, x).value == pytest.approx(1)
    assert probability_of_improvement(np.exp(x), np.exp(y)).value == value
    for pair in ((x, y), (x[:, 0], [0.0]), ([0.0], x[:, 0])):  # both are redrawn
        estimate = probability_of_improvement(*pair)
        assert estimate.low < estimate.value < estimate.high


def test_wilson_interval_agrees_with_its_formula():
    z, n, p = 1.959964, 10, 0.9
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
    assert wilson_interval(9, 10) == pytest.approx((middle - half, middle + half), abs=1e-6)
    assert wilson_interval(0, 10)[1] > 0.2 and wilson_interval(10, 10)[1] == 1
