"""A sweep on a cluster: jobs are queued once, saved and requeued, and found again.

The cluster is a folder with the five commands of SLURM that submitit calls; its jobs are real
processes of this machine.
"""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prelar_trl.sweep import STOPPED, Engine, Job, LocalLauncher, SlurmLauncher, Source
from prelar_trl.utils import write_json
from tests.sweeps import wait_for

COMMANDS = {
    "sbatch": """
        id=$(( $(cat "$CLUSTER/last" 2>/dev/null || echo 100) + 1 ))
        echo $id > "$CLUSTER/last"
        cp "$1" "$CLUSTER/$id.sh"
        "$CLUSTER/start" $id
        echo "Submitted batch job $id" """,
    "start": """
        export SLURM_JOB_ID=$1 SLURM_NTASKS=1 SLURM_JOB_NUM_NODES=1 SLURM_NODEID=0
        export SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_JOB_NODELIST=here
        rm -f "$CLUSTER/$1.step"
        setsid bash "$CLUSTER/$1.sh" >/dev/null 2>&1 &
        echo $! > "$CLUSTER/$1.pid"
        rm -f "$CLUSTER/$1.requeued" """,
    "srun": """
        while [[ $1 == --* ]]; do
          case $1 in
            --output) out=${2//%j/$SLURM_JOB_ID}; shift 2;;
            --error) shift 2;;
            *) shift;;
          esac
        done
        echo $$ > "$CLUSTER/$SLURM_JOB_ID.step"
        exec "$@" >> "${out//%t/0}" 2>&1""",
    "sacct": """
        echo "JobID|State|NodeList"
        while (( $# )); do
          if [[ $1 == -j ]]; then
            state=COMPLETED
            kill -0 $(cat "$CLUSTER/$2.pid") 2>/dev/null && state=RUNNING
            [[ -e "$CLUSTER/$2.requeued" ]] && state=REQUEUED
            echo "$2|$state|here"
            shift
          fi
          shift
        done""",
    "scontrol": """
        touch "$CLUSTER/$2.requeued"
        ( while kill -0 $(cat "$CLUSTER/$2.pid") 2>/dev/null; do sleep 0.1; done
          "$CLUSTER/start" $2 ) >/dev/null 2>&1 &""",
    "scancel": 'kill -TERM -- -$(cat "$CLUSTER/$1.pid")',
}
# A run that saves at once, ends when its root has the file "end" and stops when it is told to.
PROGRAM = """
import pathlib, signal, sys, time
given = dict(argument.split("=", 1) for argument in sys.argv[1:])
last = pathlib.Path(given["run"]) / "checkpoints" / "last.pt"
print("resume", given["resume"], flush=True)
def stop(*_):
    print("saved", flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
last.parent.mkdir(parents=True, exist_ok=True)
last.write_text("")
while not pathlib.Path("end").exists():
    time.sleep(0.05)
if given.get("fails"):
    sys.exit("it failed")
"""


class Files:
    """Results that say only that a run is finished."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, job: Job) -> Path:
        return self.folder / f"{job.name}.json"

    def publish(self, job: Job, root: Path, facts: dict[str, Any]) -> None:
        write_json(self.path(job), facts)


def make_engine(root: Path, **settings: Any) -> tuple[Engine, Job]:
    job = Job("suite", "finetune", "a-0", settings, None, {"variant": "a"})

    def command(recipe: str, given: dict[str, Any]) -> list[str]:
        return [sys.executable, "-c", PROGRAM, *(f"{k}={x}" for k, x in given.items())]

    return Engine(root, Files(root / "results"), [job], command, source=Source("commit")), job


@pytest.fixture
def cluster(tmp_path, monkeypatch) -> SimpleNamespace:
    folder, root = tmp_path / "cluster", tmp_path / "root"
    folder.mkdir()
    root.mkdir()
    for name, text in COMMANDS.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.setenv("CLUSTER", str(folder))
    yield SimpleNamespace(folder=folder, root=root, log=root / "suite" / "finetune" / "a-0.log")
    (root / "end").touch()
    for file in folder.glob("*.pid"):  # end what a failed test has left
        subprocess.run([folder / "scancel", file.stem], capture_output=True)


def working(engine: Engine, launcher: Any) -> threading.Thread:
    """The engine at work, in a thread; tests have the main one."""
    thread = threading.Thread(target=engine._work, args=(launcher, 1), daemon=True)
    thread.start()
    return thread


def preempt(cluster: SimpleNamespace) -> None:
    """SLURM signals all processes of the step, submitit's and the run's."""
    (step,) = cluster.folder.glob("*.step")
    children = subprocess.check_output(["pgrep", "-P", step.read_text().strip()], text=True)
    for pid in [*children.split(), step.read_text()]:
        os.kill(int(pid), signal.SIGUSR2)


def started(cluster: SimpleNamespace, text: str) -> None:
    wait_for(lambda: cluster.log.exists() and text in cluster.log.read_text(), seconds=60)


def test_a_preempted_job_saves_is_requeued_and_goes_on(cluster):
    engine, job = make_engine(cluster.root)
    thread = working(engine, SlurmLauncher(cluster.root / "slurm", {"timeout_min": 60}))
    started(cluster, "resume auto")
    assert engine.state(job, alive=True)[0] == "running"
    preempt(cluster)
    started(cluster, "resume true")
    (cluster.root / "end").touch()
    thread.join(60)
    assert cluster.log.read_text().splitlines() == ["resume auto", "saved", "resume true"]
    assert engine.finished(job) and engine.state(job, alive=False)[0] == "finished"
    assert (cluster.folder / "last").read_text() == "101\n"  # one submission


def test_a_sweep_that_was_stopped_finds_its_jobs_again(cluster):
    first, job = make_engine(cluster.root)
    thread = working(first, SlurmLauncher(cluster.root / "slurm", {}))
    started(cluster, "resume auto")
    first._stop()
    thread.join(30)
    assert not thread.is_alive()
    engine, job = make_engine(cluster.root)
    assert engine.state(job, alive=False)[0] == "running"
    thread = working(engine, SlurmLauncher(cluster.root / "slurm", {}))
    (cluster.root / "end").touch()
    thread.join(60)
    assert engine.finished(job)
    assert cluster.log.read_text().splitlines() == ["resume auto"]
    assert (cluster.folder / "last").read_text() == "101\n"


@pytest.fixture
def left_in_the_queue(cluster) -> SimpleNamespace:
    """A cluster whose job goes on after its sweep was stopped."""
    engine, _ = make_engine(cluster.root)
    thread = working(engine, SlurmLauncher(cluster.root / "slurm", {}))
    started(cluster, "resume auto")
    engine._stop()
    thread.join(30)
    return cluster


def test_a_job_in_the_queue_with_other_settings_is_refused_until_it_has_ended(left_in_the_queue):
    root = left_in_the_queue.root
    engine, job = make_engine(root, more=1)
    launcher = SlurmLauncher(root / "slurm", {})
    with pytest.raises(ValueError, match=r"a-0 is job 101 of .* other settings .* scancel 101$"):
        engine.work(launcher, 1)
    assert engine.state(job, alive=False)[0] == "running"
    subprocess.run(["scancel", "101"], check=True)
    wait_for(lambda: launcher.attach(engine.record(job)).poll() is not None, seconds=60)
    (root / "end").touch()
    assert engine.work(launcher, 1) == 0
    assert json.loads(engine.results.path(job).read_text())["inputs"] == job.inputs
    assert left_in_the_queue.log.read_text().splitlines() == ["resume auto"]  # anew


def test_a_job_in_the_queue_is_not_run_here_too(left_in_the_queue):
    root = left_in_the_queue.root
    engine, _ = make_engine(root)
    with open(root / "lock", "w") as lock:
        with pytest.raises(ValueError, match=r"a-0 is job 101 of .*: go on with launcher=slurm"):
            engine.work(LocalLauncher(lock), 1)
    assert (root / "suite/finetune/a-0/checkpoints/last.pt").exists()


def test_jobs_that_wait_for_one_that_has_failed_are_not_finished_either(tmp_path):
    engine, job = make_engine(tmp_path)
    needs = Job("suite", "pretrain", "p-0", {"fails": 1, "data": "videos"})
    engine.jobs = [replace(job, name=f"a-{seed}", needs=needs) for seed in range(2)]
    (tmp_path / "end").touch()
    with open(tmp_path / "lock", "w") as lock:
        assert engine.work(LocalLauncher(lock), 1) == 3
    assert engine.state(needs, alive=False)[0] == "failed"


def test_a_job_with_options_of_the_queue_that_fails_says_why_and_is_not_requeued(cluster):
    (cluster.root / "end").touch()
    engine, job = make_engine(cluster.root, fails=1)
    options = {"timeout_min": 90, "slurm_partition": "gpu", "gpus_per_node": 1}
    assert engine.work(SlurmLauncher(cluster.root / "slurm", options), 1) == 1
    assert engine.state(job, alive=False) == ("failed", "", "it failed")
    assert (cluster.folder / "last").read_text() == "101\n"
    script = (cluster.folder / "101.sh").read_text()
    assert "#SBATCH --time=90" in script and "#SBATCH --partition=gpu" in script


def test_options_that_the_queue_does_not_have_are_refused(cluster):
    with pytest.raises(ValueError, match="slurm: .*hours"):
        SlurmLauncher(cluster.root / "slurm", {"hours": 3})


def test_without_submitit_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ImportError, match=r"pip install 'prelar_trl\[slurm\]'"):
        SlurmLauncher(tmp_path, {})


@pytest.mark.parametrize("code", [STOPPED, "'stopped after 5 steps; to continue: ...'"])
def test_a_run_that_was_stopped_from_outside_has_not_failed(tmp_path, code):
    engine, job = make_engine(tmp_path)
    command, program = engine.command, PROGRAM.replace("sys.exit(75)", f"sys.exit({code})")
    engine.command = lambda *given: [program if x == PROGRAM else x for x in command(*given)]
    pids = tmp_path / "suite" / "finetune" / "a-0.log"
    with open(tmp_path / "lock", "w") as lock:
        launcher = LocalLauncher(lock)
        handles = []
        start = launcher.start
        launcher.start = lambda *given: handles.append(start(*given)[0]) or (handles[0], {})
        thread = working(engine, launcher)
        wait_for(lambda: pids.exists() and "resume" in pids.read_text(), seconds=60)
        handles[0].terminate()
        thread.join(60)
    assert handles[0].returncode == (code if code == STOPPED else 1)
    assert engine.state(job, alive=False)[0] == "stopped"
    record = json.loads((tmp_path / "suite" / "finetune" / "a-0.json").read_text())
    assert "error" not in record
