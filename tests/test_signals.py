"""What asks a run to stop: it saves first, and says by its exit code that it can go on."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest

from prelar_trl.recipes.finetune import finetune
from prelar_trl.recipes.interaction import Collection
from prelar_trl.recipes.signals import Interruption
from tests.test_resume import STEPS, same, whole  # noqa: F401
from tests.toy_runs import PRETRAIN_ARGS, ROOT, checkpoint, finetune_config


@pytest.fixture(autouse=True)
def hangups_are_heard():
    """Also where the tests themselves run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def signals_at(monkeypatch, step, *numbers):
    """The process gets signals within a step of the environment."""
    real, count = Collection.step, iter(range(1, 1_000))

    def call(self, random):
        if next(count) == step:
            for number in numbers:
                signal.raise_signal(number)
        return real(self, random)

    monkeypatch.setattr(Collection, "step", call)


@pytest.mark.parametrize("number", SIGNALS)
def test_each_signal_saves_and_stops_in_the_prefill(number, whole, tmp_path, monkeypatch):  # noqa: F811
    cfg = finetune_config(tmp_path / "run", **STEPS)
    with monkeypatch.context() as patch:
        signals_at(patch, 9, number)
        with pytest.raises(SystemExit, match="stopped after 9 steps") as stop:
            finetune(cfg)
    assert stop.value.code == 75
    cfg.resume = True
    finetune(cfg)
    same(tmp_path / "run", whole)


def test_only_a_second_ctrl_c_drops_the_save(tmp_path, monkeypatch):
    again = (signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    with monkeypatch.context() as patch:
        signals_at(patch, 9, *again)
        with pytest.raises(SystemExit, match="stopped after 9 steps"):
            finetune(finetune_config(tmp_path / "a", **STEPS))
    assert checkpoint(tmp_path / "a")["step"] == 9
    signals_at(monkeypatch, 9, signal.SIGINT, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        finetune(finetune_config(tmp_path / "b", **STEPS))
    assert not list((tmp_path / "b" / "checkpoints").iterdir())


def test_nohup_is_respected(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            signal.raise_signal(signal.SIGHUP)
            assert not interruption.requested
            signal.raise_signal(signal.SIGTERM)
            assert interruption.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def program(clips, run):
    command = [sys.executable, str(ROOT / "recipes" / "pretrain.py"), *PRETRAIN_ARGS]
    return [*command, f"data={clips}", f"run={run}", "updates=100000", "video_every=99999"]


def test_a_run_outlives_its_terminal_until_it_is_saved(clips, tmp_path):
    run = tmp_path / "run"
    pid, terminal = pty.fork()
    if pid == 0:
        command = program(clips, run)
        os.execv(command[0], command)
    while not (run / "metrics.csv").exists():
        if select.select([terminal], [], [], 0.1)[0]:
            os.read(terminal, 1_000)  # or its buffer would be full one day
    os.close(terminal)  # the kernel sends SIGHUP
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 75
    assert checkpoint(run)["step"] >= 1


def test_a_signal_while_the_program_starts_is_no_failure(clips, tmp_path):
    process = subprocess.Popen(program(clips, tmp_path / "run"), stderr=subprocess.PIPE, text=True)
    listens = 1 << (signal.SIGUSR1 - 1)
    while not caught(process.pid) & listens:
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    _, errors = process.communicate()
    assert process.returncode == 75 and errors.startswith("stopped ")


def caught(pid):
    """The signals that a process has handlers for, as a mask."""
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1], 16) for line in file if line.startswith("SigCgt"))
