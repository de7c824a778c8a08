"""Throughput of several processes: every case is measured and shown."""

from __future__ import annotations

import sys

import pytest

from benchmarks import processes


def test_one_and_two_processes_are_measured_and_compared(monkeypatch, capsys) -> None:
    sizes = ["--size", "mini", "--batch", "2", "--length", "4", "--processes", "2"]
    times = ["--rounds", "1", "--seconds", "0.1", "--phase", "pretrain"]
    monkeypatch.setattr(sys, "argv", ["processes", *sizes, *times])
    processes.main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    cases = [row[:4] for row in rows]
    assert cases == [
        ["pretrain", "1", "2", "2x4"],
        ["pretrain", "1", "1", "2x4"],
        ["pretrain", "2", "1", "2x4"],
        ["pretrain", "2", "1", "4x4"],
    ]
    assert all(float(row[-2]) > 0 for row in rows) and float(rows[0][-1]) == 1.0


def test_a_batch_that_cannot_be_shared_is_an_error(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["processes", "--batch", "7", "--processes", "2"])
    with pytest.raises(SystemExit):
        processes.main()
    assert "--batch 7 must be a multiple of --processes 2" in capsys.readouterr().err
