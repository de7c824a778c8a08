"""The stopwatch: shares of a section, and what a GPU would make of them."""

from __future__ import annotations

import time

import pytest

from prelar_trl.stopwatch import Stopwatch


@pytest.fixture
def pass_time(monkeypatch):
    """A clock that only the test moves."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds

    return wait


def test_a_summary_has_the_rate_and_the_share_of_each_section(pass_time) -> None:
    watch = Stopwatch()
    for _ in range(2):
        with watch("env"):
            pass_time(1.0)
        with watch("update"):
            pass_time(2.5)
        pass_time(0.5)
    assert watch.times == {"env": [1000, 1000], "update": [2500, 2500]}
    assert watch.summary(20) == {
        "seconds": 8.0,
        "steps_per_s": 2.5,
        "time/env": 0.25,
        "time/update": 0.625,
        "time/rest": 0.125,
    }


def test_each_lap_stands_alone(pass_time) -> None:
    watch = Stopwatch()
    with watch("env"):
        pass_time(5.0)
    watch.summary(10)
    pass_time(2.0)
    assert watch.summary(14) == {"seconds": 2.0, "steps_per_s": 2.0, "time/rest": 1.0}
    pass_time(1.0)
    assert watch.summary(14) == {"seconds": 1.0, "time/rest": 1.0}  # no steps, no rate


def test_work_that_goes_on_beside_the_program_counts_where_it_was_started(pass_time) -> None:
    left = [0.0]  # of what a GPU was asked to do

    def synchronize() -> None:
        pass_time(left[0])
        left[0] = 0.0

    def shares(watch: Stopwatch) -> dict[str, float]:
        with watch("update"):
            left[0] = 3.0
        with watch("policy"):
            pass_time(1.0)
            synchronize()
        summary = watch.summary(1)
        return {name: summary[f"time/{name}"] for name in ("update", "policy")}

    assert shares(Stopwatch()) == {"update": 0.0, "policy": 1.0}
    assert shares(Stopwatch(wait=synchronize)) == {"update": 0.75, "policy": 0.25}
