"""Works through jobs, as :mod:`benchmarks.campaign` does, in the clean copy that it made."""

from __future__ import annotations

import csv
import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import prelar_trl
from benchmarks.campaign import COPY, REPOSITORY, git, lock_root, locked, parse_arguments, say
from benchmarks.suites import TABLE, Job, Suite, expand, load_suites, override
from prelar_trl import configs, recipes
from prelar_trl.record import (
    SUMMARY,
    Comparison,
    MethodStyle,
    RunFolder,
    Series,
    read_metrics,
    write_comparison,
    write_rows,
)
from prelar_trl.utils import atomic_write

GRACE = 10.0  # seconds from a signal to this process until those that did not get it are told
PROGRESS = re.compile(r"(\d+)/(\d+) (\w+) after .*?([\d.]+) \3/s")
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
PR_SET_PDEATHSIG = 1


class Campaign:
    """The jobs' state on disk: ``<job>.json`` and ``<job>.log`` in the root, and the results.

    A job with a ``run`` has results, and is finished once they are published; the others only
    serve those.
    """

    def __init__(self, root: Path, results: Path, commit: str) -> None:
        self.root, self.results, self.commit = root, results, commit
        self.stopping: float | None = None  # since when

    def record(self, job: Job) -> dict[str, Any]:
        """What is known of a job: state, inputs, commit; empty before its first start."""
        return read_json(self.root / f"{job.path}.json")

    def result(self, job: Job) -> Path:
        return self.results / job.suite / "runs" / f"{job.name}.json"

    def finished(self, job: Job) -> bool:
        if job.run:
            return self.result(job).is_file()
        record = self.record(job)
        return record.get("state") == "finished" and record["inputs"] == job.inputs

    def unfinished(self, jobs: Iterable[Job]) -> list[Job]:
        """The runs that are not finished, each after what it needs and has not got."""
        ordered: dict[Job, None] = {}
        for job in jobs:
            chain = [job] if job.run and not self.finished(job) else []
            while chain and chain[0].needs is not None and not self.finished(chain[0].needs):
                chain.insert(0, chain[0].needs)
            ordered |= dict.fromkeys(chain)
        return list(ordered)

    def work(self, jobs: Iterable[Job], parallel: int, lock: IO) -> int:
        """Run what is not finished; returns how many jobs failed."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._stop)
        waiting, failed = self.unfinished(jobs), 0
        running: dict[Job, subprocess.Popen] = {}
        while True:
            for job in [job for job, process in running.items() if process.poll() is not None]:
                failed += not self._end(job, running.pop(job).returncode)
            while self.stopping is None and len(running) < parallel:
                ready = (job for job in waiting if job.needs is None or self.finished(job.needs))
                job = next(ready, None)
                if job is None:
                    break
                waiting.remove(job)
                running[job] = self._start(job, lock)
            if not running:
                return failed
            if self.stopping is not None and time.monotonic() > self.stopping + GRACE:
                for process in running.values():
                    process.terminate()
                self.stopping = float("inf")
            time.sleep(0.5)

    def _stop(self, *_: object) -> None:
        self.stopping = self.stopping or time.monotonic()

    def _start(self, job: Job, lock: IO) -> subprocess.Popen:
        """Continue a job at its checkpoint, or start it anew.

        Anew where code or settings have changed, and where continuing it has failed.
        """
        folder, before = self.root / job.path, self.record(job)
        record = {"inputs": job.inputs, "commit": self.commit}
        same = all(before.get(name) == value for name, value in record.items())
        if not same or (before["state"] == "failed" and before["resumed"]):
            shutil.rmtree(folder, ignore_errors=True)
        settings = dict(job.settings)
        resume = (folder / "checkpoints" / "last.pt").is_file()
        if job.recipe == "collect_videos":  # continues by itself
            settings["data"] = job.path
        else:
            settings = {"run": job.path, "device": "cpu", "threads": 1, **settings}
            if "run" not in job.settings:  # it makes the run that it works on
                settings["resume"] = resume
            if not resume:
                shutil.rmtree(folder, ignore_errors=True)
        write_json(
            folder.with_name(f"{folder.name}.json"),
            record | {"state": "running", "resumed": resume},
        )
        command = [sys.executable, "-P", "-m", f"prelar_trl.recipes.{job.recipe}"]
        command += [f"{name}={override(value)}" for name, value in settings.items()]
        say(f"{'continues' if resume else 'starts'}: {job.path}")
        log_file = folder.with_name(f"{folder.name}.log")
        with open(log_file, "a" if resume else "w", encoding="utf-8") as log:
            return subprocess.Popen(
                command,
                cwd=self.root,
                env=os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[lock.fileno()],  # the lock is held until the last of them has ended
                preexec_fn=die_with_parent,
            )

    def _end(self, job: Job, code: int) -> bool:
        """Note how a job ended, and publish the results of a run; returns False if it failed."""
        record, error = self.record(job) | {"state": "finished"}, None
        if code != 0:
            lines = self._log(job).splitlines()
            error = lines[-1] if lines else f"ended with {code} and wrote nothing"
        elif job.run:
            try:
                self.publish(job)
            except (OSError, KeyError, ValueError) as problem:
                error = f"its results cannot be published: {problem!r}"
        if error is not None and self.stopping is not None:
            record["state"] = "stopped"
        elif error is not None:
            record |= {"state": "failed", "error": error}
        write_json(self.root / f"{job.path}.json", record)
        say(f"{record['state']}: {job.path} {record.get('error', '')}")
        return record["state"] != "failed"

    def publish(self, job: Job) -> None:
        """Write the evaluations of a run, then what made it; drop its replay."""
        run, result = RunFolder.load(self.root / job.path), self.result(job)
        result.parent.mkdir(parents=True, exist_ok=True)
        metrics = read_metrics(run.metrics)
        score, success = metrics["eval/return"], metrics["eval/success"].values
        with open(result.with_suffix(".csv"), "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["step", "return", "success"])
            for step, *values in zip(score.steps, score.values, success, strict=True):
                writer.writerow([int(step), *(f"{value:.6g}" for value in values)])
        times = read_metrics(run.times)
        seconds = sum(
            times[name].values.sum() for name in ("startup_s", "seconds") if name in times
        )
        write_json(
            result,
            {
                "suite": job.suite,
                **job.run,
                "commit": self.commit,
                "pretraining_commit": self.record(job.needs).get("commit") if job.needs else None,
                "minutes": round(seconds / 60, 2),
                "inputs": job.inputs,
                "config": without_null({**run.config, "resume": None}),
                "versions": {name: run.versions[name] for name in ("python", "system", "packages")},
            },
        )
        shutil.rmtree(run.path / "replay", ignore_errors=True)

    def _log(self, job: Job) -> str:
        path = self.root / f"{job.path}.log"
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""

    def state(self, job: Job, alive: bool) -> tuple[str, str, str]:
        """State, progress and remark of a job; ``alive``: the campaign is at work."""
        record = self.record(job)
        if self.finished(job):
            result = read_json(self.result(job)) if job.run else record
            other = result["inputs"] != job.inputs
            return "finished", "", "with other settings than now" if other else ""
        state = record.get("state", "waiting")
        if state == "running" and not alive:
            state = "stopped"
        found = PROGRESS.findall(self._log(job)) if state in ("running", "stopped") else []
        step, total, unit, rate = found[-1] if found else ("", "", "", "")
        progress = f"{step}/{total} {unit}" if found else ""
        if state == "running":
            return state, f"{progress}, {rate}/s" if found else "starting", ""
        return state, progress, record.get("error", "") if state == "failed" else ""

    def table(self, jobs: Iterable[Job], alive: bool) -> str:
        """One line a job; what only finished runs needed is left out."""
        jobs = list(jobs)
        needed = set(self.unfinished(jobs))
        shown = [job for job in jobs if job.run or job in needed or self.record(job)]
        rows = [(job.path, *self.state(job, alive)) for job in shown]
        widths = [max(len(row[i]) for row in [*rows, ("",) * 4]) for i in range(3)]
        lines = [
            "  ".join([*(x.ljust(w) for x, w in zip(row, widths, strict=False)), row[3]]).rstrip()
            for row in rows
        ]
        states = [row[1] for row in rows]
        counts = [f"{states.count(state)} {state}" for state in dict.fromkeys(states)]
        return "\n".join([*lines, ", ".join(counts)])


def report(suites: Mapping[str, Suite], results: Path) -> None:
    """Tables and pictures of every suite with finished runs, and ``summary.csv`` over all."""
    summary = []
    for name, suite in suites.items():
        curves: dict[str, dict[str, list[Series]]] = {}
        own = False  # more than the runs that it shares with the suite that it is like
        for job in expand(suites, name):
            path = results / job.suite / "runs" / f"{job.name}.csv"
            if job.run and path.with_suffix(".json").is_file():
                runs = curves.setdefault(job.run["task"], {}).setdefault(job.run["variant"], [])
                runs.append(read_metrics(path)[suite.score])
                own |= job.suite == name
        if own:
            styles = {v: MethodStyle(x.label, x.color, x.line) for v, x in suite.variants.items()}
            comparison = Comparison(name, suite.score, suite.threshold, curves, styles)
            summary += write_comparison(comparison, results / name)
            say(f"report: {results / name}")
    if summary:
        write_rows(results / "summary.csv", SUMMARY, summary)


def check_code() -> None:
    """Refuse to run other code than that of this folder."""
    for module in (prelar_trl, recipes, configs):
        if not Path(str(module.__file__)).is_relative_to(REPOSITORY):
            sys.exit(
                f"error: {module.__name__} would come from {module.__file__}, not from "
                f"{REPOSITORY}: start benchmarks/campaign.py or study.py"
            )


def die_with_parent() -> None:
    """In a child: be killed when the campaign is; on Linux only."""
    if LIBC is not None:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def without_null(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings and groups of them, without those that are null."""
    return {
        name: without_null(value) if isinstance(value, Mapping) else value
        for name, value in settings.items()
        if value is not None
    }


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as part:
        part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    args = parse_arguments()
    check_code()
    suites = load_suites(TABLE)
    unknown = [name for name in args.suites if name not in suites]
    if unknown:
        sys.exit(f"error: no suite {unknown[0]!r} in {TABLE.name}; choose {', '.join(suites)}")
    jobs = [job for name in args.suites or suites for job in expand(suites, name)]
    drive(Campaign, args, jobs, lambda: report(suites, args.results))


def drive(
    kind: type[Campaign], args: Namespace, jobs: Iterable[Job], report: Callable[[], None]
) -> None:
    """What the command line asks for: report, table of states, or to work through the jobs."""
    if args.report:
        report()
        return
    jobs = {job.path: job for job in jobs}
    chosen = [job for job in jobs.values() if not job.run or re.search(args.only, job.path)]
    if not any(job.run for job in chosen):
        sys.exit(f"error: --only {args.only!r} matches none of the {len(jobs)} jobs")
    if args.status:
        print(kind(args.root, args.results, "").table(chosen, alive=locked(args.root)))
        return
    if REPOSITORY != args.root / COPY or git("status", "--porcelain"):
        sys.exit(f"error: {REPOSITORY} is no clean copy: start benchmarks/campaign.py or study.py")
    with lock_root(args.root) as lock:
        campaign = kind(args.root, args.results, git("rev-parse", "HEAD"))
        failed = campaign.work(chosen, args.jobs, lock)
        report()
        print(campaign.table(chosen, alive=False))
    sys.exit(failed > 0 or campaign.stopping is not None)


if __name__ == "__main__":
    main()
