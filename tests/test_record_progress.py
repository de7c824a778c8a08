"""The progress display away from a terminal: a line now and then."""

from __future__ import annotations

import io
import time

import torch

from prelar_trl.record import Progress, progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


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


def test_without_a_terminal_progress_is_a_line_every_so_often_and_at_the_end():
    for every, lines in ((0, 4), (30, 1)):
        stream = io.StringIO()
        with Progress(3, every=every, stream=stream) as bar:
            for _ in range(3):
                bar.update()
        assert len(stream.getvalue().splitlines()) == lines


def test_without_a_terminal_no_thread_is_started(monkeypatch):
    """A signal that the main thread holds back would be handled through another one."""
    monkeypatch.setattr(progress, "tqdm", None)  # which starts one
    for options in ({"stream": io.StringIO()}, {"stream": Terminal(), "hidden": True}):
        with Progress(3, **options) as bar:
            bar.update()


def test_a_resumed_bar_counts_only_its_own_updates_for_the_rate():
    stream = io.StringIO()
    with Progress(1000, initial=1000, stream=stream):
        pass
    assert "1000/1000" in stream.getvalue() and " 0 updates/s" in stream.getvalue()


def test_on_a_terminal_progress_is_a_bar():
    stream = Terminal()
    with Progress(4, name="pretrain", stream=stream) as bar:
        bar.update(4, frames=8, metrics={"kl": 3.0})
    assert "pretrain 100%|" in stream.getvalue()
    assert "4/4" in stream.getvalue() and "kl 3" in stream.getvalue()


def test_metrics_are_not_fetched_before_they_are_shown():
    class Costly:
        def __float__(self):
            raise AssertionError("fetched")

    bar = Progress(10, stream=io.StringIO())
    bar.update(metrics={"loss": Costly()})
