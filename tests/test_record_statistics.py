"""Statistics of few runs, and the progress display."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch

from prelar_trl.record import (
    bootstrap_interval,
    interquartile_mean,
    progress,
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


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_without_a_terminal_progress_is_a_line_at_the_end():
    stream = io.StringIO()
    with progress(5, name="pretrain", stream=stream) as bar:
        for _ in range(5):
            bar.update(frames=400, metrics={"image": torch.tensor(12.345)})
    (line,) = stream.getvalue().splitlines()
    assert line.startswith("pretrain: 5/5 updates after 00:00:0")
    assert "updates/s" in line and "frames/s" in line and "image 12.3" in line


def test_without_a_terminal_progress_is_a_line_every_so_often():
    stream = io.StringIO()
    with progress(3, every=0, stream=stream) as bar:
        for _ in range(3):
            bar.update()
    assert len(stream.getvalue().splitlines()) == 4


def test_a_resumed_bar_counts_only_its_own_updates_for_the_rate():
    stream = io.StringIO()
    with progress(1000, initial=1000, stream=stream):
        pass
    assert "1000/1000" in stream.getvalue() and " 0 updates/s" in stream.getvalue()


def test_on_a_terminal_progress_is_a_bar():
    stream = Terminal()
    with progress(4, name="pretrain", stream=stream) as bar:
        bar.update(4, frames=8, metrics={"kl": 3.0})
    assert "pretrain 100%|" in stream.getvalue()
    assert "4/4" in stream.getvalue() and "kl 3" in stream.getvalue()


def test_metrics_are_not_fetched_before_they_are_shown():
    class Costly:
        def __float__(self):
            raise AssertionError("fetched")

    bar = progress(10, stream=io.StringIO())
    bar.update(metrics={"loss": Costly()})
