"""Works through jobs; their states are on disk, so that it goes on wherever it was stopped."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from prelar_trl.sweep.jobs import Job
from prelar_trl.sweep.launchers import Handle, Launcher, Program
from prelar_trl.sweep.source import Source
from prelar_trl.utils import STOPPED, absolute, map_paths, read_json, write_json

GRACE = 10.0  # seconds from a signal to this process until those that did not get it are told
TOLD = "stopped after"  # so begins the last line of a run that was told to stop, and has saved
INPUTS = {"pretrain": "data", "finetune": "pretrained"}  # setting that names what is learned from
PROGRESS = re.compile(r"(\d+)/(\d+) (\w+) after .*?([\d.]+) \3/s")


class Results(Protocol):
    """What is kept of a run, apart from its folder."""

    def path(self, job: Job) -> Path:
        """The JSON file that says that a run is finished and with which inputs."""
        ...

    def publish(self, job: Job, root: Path, facts: Mapping[str, Any]) -> None:
        """Write it and what belongs to it; ``facts``: suite, run, inputs and commits."""


@dataclass(eq=False)
class Engine:
    """Jobs, and their states on disk: ``<job>.json`` and ``<job>.log`` beside the run's folder.

    A job with a ``run`` is finished once its results are published; the others only serve those.

    Args:
        root: folder of runs and states.
        results: what is kept of a finished run.
        jobs: all jobs, each after what it needs.
        command: the command line of a recipe with settings.
        manifest: a JSON file that lists the jobs, kept up to date. Default: none.
        runtime: settings of every program that do not change its result, such as its device.
        source: the code to run; only :meth:`work` needs it.
        say: gets lines for the user. Default: nobody.
    """

    root: Path
    results: Results
    jobs: Sequence[Job]
    command: Callable[[str, Mapping[str, Any]], list[str]]
    manifest: Path | None = None
    runtime: Mapping[str, Any] = field(default_factory=dict)
    source: Source | None = None
    say: Callable[[str], object] = lambda text: None
    stopping: float | None = field(default=None, init=False)  # since when

    def record(self, job: Job) -> dict[str, Any]:
        """What is known of a job: state, inputs, commit; empty before its first start."""
        return read_json(self.root / f"{job.path}.json", missing_ok=True)

    def finished(self, job: Job) -> bool:
        if job.run:
            return self.results.path(job).is_file()
        record = self.record(job)
        return record.get("state") == "finished" and record.get("inputs") == job.inputs

    def unfinished(self) -> list[Job]:
        """The jobs to do, each after what it needs and has not got."""
        ordered: dict[Job, None] = {}
        for job in self.jobs:
            chain = [job] if job.run and not self.finished(job) else []
            while chain and chain[0].needs is not None and not self.finished(chain[0].needs):
                chain.insert(0, chain[0].needs)
            ordered |= dict.fromkeys(chain)
        return list(ordered)

    def check_shared(self, suite: str) -> None:
        """Refuse to share runs of another suite that have other settings than those of this one.

        Raises:
            ValueError: naming the first.
        """
        for job in self.jobs:
            known = {}
            if job.run:
                known = read_json(self.results.path(job), missing_ok=True) or self.record(job)
            if job.suite != suite and known.get("inputs", job.inputs) != job.inputs:
                raise ValueError(
                    f"from_scratch={job.suite}: {job.path} was run with other settings; leave "
                    "from_scratch out"
                )

    def work(self, launcher: Launcher, parallel: int) -> int:
        """Run what is not finished, so many at a time; how many jobs are not finished then.

        Raises:
            ValueError: a job is in SLURM's queue, see :meth:`_attach`; nothing was started.
        """
        handlers = {n: signal.signal(n, self._stop) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            return self._work(launcher, parallel)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _work(self, launcher: Launcher, parallel: int) -> int:
        unfinished = self.unfinished()
        attached = {job: self._attach(job, launcher) for job in unfinished}
        running = {job: handle for job, handle in attached.items() if handle is not None}
        waiting = [job for job in unfinished if job not in running]
        self._write_manifest()
        while True:
            for job in list(running):
                code = running[job].poll()
                if code is None:
                    continue
                del running[job]
                if code == STOPPED and launcher.detached:  # by the cluster, not by the user
                    waiting.insert(0, job)
                else:
                    self._end(job, code)
            while self.stopping is None and len(running) < parallel:
                ready = (job for job in waiting if job.needs is None or self.finished(job.needs))
                job = next(ready, None)
                if job is None:
                    break
                waiting.remove(job)
                running[job] = self._start(job, launcher)
            leaves = self.stopping is not None and launcher.detached
            if running and leaves:
                self.say("the jobs go on in the queue; the same command attends to them again")
            if leaves or not running:
                return sum(not self.finished(job) for job in unfinished)
            if self.stopping is not None and time.monotonic() > self.stopping + GRACE:
                for handle in running.values():
                    handle.terminate()
                self.stopping = float("inf")
            time.sleep(0.5)

    def _stop(self, *_: object) -> None:
        self.stopping = self.stopping or time.monotonic()

    def _attach(self, job: Job, launcher: Launcher) -> Handle | None:
        """A job's program, if an earlier sweep has left it in a queue.

        Raises:
            ValueError: it is there with other settings, or this launcher cannot attend to it.
        """
        record = self.record(job)
        if record.get("state") != "running" or "slurm_job" not in record:
            return None
        handle, number = launcher.attach(record), record["slurm_job"]
        if handle is None:
            raise ValueError(
                f"{job.path} is job {number} of SLURM's queue: go on with launcher=slurm, also "
                f"after scancel {number}; or, once it has ended, remove "
                f"{self.root / f'{job.path}.json'}"
            )
        if record["inputs"] == job.inputs:
            return handle
        if handle.poll() is None:
            raise ValueError(
                f"{job.path} is job {number} of SLURM's queue, with other settings than now: give "
                f"those, or scancel {number}"
            )
        return None

    def _start(self, job: Job, launcher: Launcher) -> Handle:
        """Continue a job at its checkpoint, or start it anew.

        Anew where code or settings have changed, and where continuing it has failed.
        """
        assert self.source is not None
        program, before = self._program(job), self.record(job)
        record = {"inputs": job.inputs, "commit": self.source.commit}
        same = all(before.get(name) == value for name, value in record.items())
        if not same or (before["state"] == "failed" and before["resumed"]):
            shutil.rmtree(program.folder, ignore_errors=True)
        resumed = program.has_checkpoint
        record |= {"state": "running", "resumed": resumed}
        write_json(self.root / f"{job.path}.json", record)
        self.say(f"{'continues' if resumed else 'starts'}: {job.path}")
        handle, more = launcher.start(program, job.name)
        if more:
            write_json(self.root / f"{job.path}.json", record | more)
        return handle

    def _program(self, job: Job) -> Program:
        settings, resumes = dict(job.settings), False
        if job.recipe == "collect_videos":  # goes on by itself
            settings["data"] = job.path
        else:
            settings = {"run": job.path, **self.runtime, **settings}
            resumes = "run" not in job.settings  # it makes the run that it works on
        given = INPUTS.get(job.recipe, "")
        if job.needs is None and given in settings:  # the user's own
            settings[given] = map_paths(absolute, settings[given])
        code = self.source.path if self.source is not None else None
        if code is None and Path("prelar_trl").exists():  # another checkout lies here: not that
            code = Path(__file__).parents[2]
        modules = [code, Path.cwd(), os.environ.get("PYTHONPATH")]
        environment = {"PYTHONPATH": os.pathsep.join(map(str, filter(None, modules)))}
        if "threads" in self.runtime:
            threads = str(self.runtime["threads"])
            environment |= {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        return Program(
            self.command(job.recipe, settings),
            self.root / job.path,
            self.root,
            self.root / f"{job.path}.log",
            environment,
            resumes,
        )

    def _end(self, job: Job, code: int) -> None:
        """Note how a job ended, and publish the results of a run.

        Raises nothing: a run that cannot be published has failed.
        """
        record, error = self.record(job) | {"state": "finished"}, None
        if code != 0:
            lines = self._log(job).splitlines()
            error = lines[-1] if lines else f"ended with {code} and wrote nothing"
        elif job.run:
            try:
                self.results.publish(job, self.root, self._facts(job))
            except (OSError, KeyError, ValueError) as problem:
                error = f"its results cannot be published: {problem!r}"
        told = code == STOPPED or (error or "").startswith(TOLD)
        if error is not None and (self.stopping is not None or told):
            record["state"] = "stopped"
        elif error is not None:
            record |= {"state": "failed", "error": error}
        write_json(self.root / f"{job.path}.json", record)
        self._write_manifest()
        self.say(f"{record['state']}: {job.path} {record.get('error', '')}".rstrip())

    def _facts(self, job: Job) -> dict[str, Any]:
        record = self.record(job)
        return {
            "suite": job.suite,
            **job.run,
            "commit": record["commit"],
            "pretraining_commit": self.record(job.needs).get("commit") if job.needs else None,
            "inputs": record["inputs"],
        }

    def _write_manifest(self) -> None:
        if self.manifest is None:
            return
        jobs = {
            job.path: {
                "state": self.state(job, alive=True)[0],
                "needs": job.needs.path if job.needs else None,
                **job.run,
                "settings": dict(job.settings),
            }
            for job in self.jobs
        }
        commit = self.source.commit if self.source else None
        write_json(self.manifest, {"commit": commit, "jobs": jobs})

    def _log(self, job: Job) -> str:
        path = self.root / f"{job.path}.log"
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""

    def state(self, job: Job, alive: bool) -> tuple[str, str, str]:
        """State, progress and remark of a job; ``alive``: a sweep is at work."""
        record = self.record(job)
        if self.finished(job):
            result = read_json(self.results.path(job)) if job.run else record
            other = result.get("inputs") != job.inputs
            return "finished", "", "with other settings than now" if other else ""
        state = record.get("state", "waiting")
        if state == "running" and not alive and "slurm_job" not in record:
            state = "stopped"
        found = PROGRESS.findall(self._log(job)) if state in ("running", "stopped") else []
        step, total, unit, rate = found[-1] if found else ("", "", "", "")
        progress = f"{step}/{total} {unit}" if found else ""
        if state == "running":
            return state, f"{progress}, {rate}/s" if found else "starting", ""
        return state, progress, record.get("error", "") if state == "failed" else ""

    def table(self, alive: bool) -> str:
        """One line a job; what only finished runs needed is left out."""
        needed = set(self.unfinished())
        shown = [job for job in self.jobs if job.run or job in needed or self.record(job)]
        rows = [(job.path, *self.state(job, alive)) for job in shown]
        widths = [max(len(row[i]) for row in [*rows, ("",) * 4]) for i in range(3)]
        lines = [
            "  ".join([*(x.ljust(w) for x, w in zip(row, widths, strict=False)), row[3]]).rstrip()
            for row in rows
        ]
        states = [row[1] for row in rows]
        counts = [f"{states.count(state)} {state}" for state in dict.fromkeys(states)]
        return "\n".join([*lines, ", ".join(counts)])


def module_command(recipe: str, overrides: Iterable[str]) -> list[str]:
    """A recipe's program by this interpreter."""
    return [sys.executable, "-P", "-m", f"prelar_trl.recipes.{recipe}", *overrides]
