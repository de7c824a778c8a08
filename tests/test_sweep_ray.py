"""A sweep on Ray, started on this machine; skipped where Ray is not installed."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prelar_trl.sweep import RayLauncher
from tests.sweeps import wait_for
from tests.test_sweep_slurm import make_engine, working


def test_without_ray_one_line_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'prelar_trl\[ray\]'"):
        RayLauncher({})


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


def log(root: Path) -> list[str]:
    path = root / "suite" / "finetune" / "a-0.log"
    return path.read_text().splitlines() if path.exists() else []


def test_a_stopped_sweep_saves_its_programs_and_the_next_goes_on(ray, tmp_path) -> None:
    launcher = RayLauncher({"num_cpus": 1})
    engine, job = make_engine(tmp_path)
    thread = working(engine, launcher)
    wait_for(lambda: log(tmp_path), seconds=60)
    assert engine.state(job, alive=True)[0] == "running"
    engine.stopping = 0.0  # the grace is over: the programs did not get the signal
    thread.join(60)
    assert log(tmp_path) == ["resume auto", "saved"]
    engine, job = make_engine(tmp_path)
    assert engine.state(job, alive=False)[0] == "stopped"
    (tmp_path / "end").touch()
    assert engine.work(launcher, 1) == 0  # so what the first has taken is free again
    assert log(tmp_path) == ["resume auto", "saved", "resume true"]
    assert engine.finished(job)


def test_a_program_whose_machine_is_lost_is_stopped_and_not_left_running(ray, tmp_path) -> None:
    launcher, pids = RayLauncher({"num_cpus": 1}), []
    start = launcher.start

    def start_and_note(program, name):
        handle, more = start(program, name)
        pids.append(ray.get(handle.actor.__ray_call__.remote(lambda self: os.getpid())))
        return handle, more

    launcher.start = start_and_note
    engine, job = make_engine(tmp_path)
    thread = working(engine, launcher)
    wait_for(lambda: log(tmp_path), seconds=60)
    os.kill(pids[0], signal.SIGKILL)
    thread.join(60)
    assert not thread.is_alive() and engine.state(job, alive=False)[0] == "stopped"
    assert log(tmp_path) == ["resume auto"]


def test_a_program_that_fails_says_why(ray, tmp_path) -> None:
    (tmp_path / "end").touch()
    engine, job = make_engine(tmp_path, fails=1)
    assert engine.work(RayLauncher({}), 1) == 1
    assert engine.state(job, alive=False) == ("failed", "", "it failed")


def test_options_are_checked(ray) -> None:
    with pytest.raises(ValueError, match="ray: .*hours"):
        RayLauncher({"hours": 3})
