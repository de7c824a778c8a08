"""Throughput of several processes: every case is measured and shown."""

from __future__ import annotations

import sys

import pytest

from benchmarks import processes


def test_two_processes_share_a_batch_and_measure_the_same() -> None:
    config = {"method": "prelar", "phase": "finetune", "size": "mini", "length": 6}
    config |= {"device": "cpu", "precision": "32", "compile": "off", "plain": False}
    (seconds,) = processes.measure(processes.Case(2, 1, 2), [config], 0.1)
    assert seconds > 0


def test_cases_are_measured_in_turn_and_compared(monkeypatch, capsys) -> None:
    cases = []

    def measure(case, configs, seconds):
        cases.append(case)
        assert [config["phase"] for config in configs] == ["pretrain"] and seconds == 4.0
        return [len(cases) / case.batch]

    monkeypatch.setattr(processes, "measure", measure)
    sizes = ["--batch", "2", "--length", "5", "--processes", "2", "--phase", "pretrain"]
    monkeypatch.setattr(sys, "argv", ["processes", *sizes])
    processes.main()
    once = [(1, 2, 2), (1, 1, 2), (2, 1, 2), (2, 1, 4)]
    assert cases == 2 * once
    first, *_, last = (line.split() for line in capsys.readouterr().out.splitlines()[2:])
    # Half a second and five half: 1500 ms. Four quarters and eight quarters of a second.
    assert first == ["pretrain", "1", "2", "2x5", "1500", "(500-2500)", "7", "1.00"]
    assert last == ["pretrain", "2", "1", "4x5", "1500", "(1000-2000)", "13", "2.00"]


def test_a_batch_that_cannot_be_shared_is_an_error(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["processes", "--batch", "7", "--processes", "2"])
    with pytest.raises(SystemExit):
        processes.main()
    assert "--batch 7 must be a multiple of --processes 2" in capsys.readouterr().err
