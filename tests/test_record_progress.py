"""The progress display away from a terminal: a line now and then."""

from __future__ import annotations

import io
import time

import torch

from prelar_trl.record import Progress


def test_lines_tell_count_pace_time_left_and_metrics(monkeypatch) -> None:
    clock = iter([0.0] + [x for x in (40.0, 80.0, 120.0) for _ in range(2)] + [120.0] * 4)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    stream = io.StringIO()
    bar = Progress(400, name="pretrain", unit="updates", every=30, stream=stream)
    bar.update(100, frames=1000, metrics={"kl": torch.tensor(0.5)})
    bar.update(100, frames=1000, metrics={"image": 12.25})
    bar.close()
    first, second, last = stream.getvalue().splitlines()
    assert first == (
        "pretrain: 100/400 updates after 0:00:40, 0:02:00 to go, 2.5 updates/s, 25 frames/s, kl 0.5"
    )
    assert "200/400" in second and "0:01:20 to go" in second and "image 12.2" in second
    assert "to go" not in last


def test_a_quick_loop_prints_only_the_last_line() -> None:
    stream = io.StringIO()
    with Progress(3, name="collect", unit="episodes", stream=stream) as bar:
        for _ in range(3):
            bar.update()
    assert stream.getvalue().count("\n") == 1
    assert stream.getvalue().startswith("collect: 3/3 episodes after 0:00:00, ")
