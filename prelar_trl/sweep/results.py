"""What is kept of a fine-tuning run, and the comparison of all that there are."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prelar_trl.record import (
    COLORS,
    SUMMARY,
    Comparison,
    MethodStyle,
    RunFolder,
    Series,
    read_metrics,
    write_comparison,
    write_csv,
)
from prelar_trl.sweep.jobs import Job, Suite
from prelar_trl.utils import without_null, write_json

EVALUATIONS = {"return": "eval/return", "success": "eval/success"}


@dataclass
class CurveResults:
    """The evaluations of each run, and what made it: ``<suite>/runs/<run>.csv`` and ``.json``."""

    folder: Path

    def path(self, job: Job) -> Path:
        return self.folder / job.suite / "runs" / f"{job.name}.json"

    def publish(self, job: Job, root: Path, facts: Mapping[str, Any]) -> None:
        """Write the evaluations of a run, then what made it; drop its replay.

        Raises:
            KeyError: it was never evaluated.
        """
        run, result = RunFolder.load(root / job.path), self.path(job)
        result.parent.mkdir(parents=True, exist_ok=True)
        metrics = read_metrics(run.metrics)
        series = [metrics[name] for name in EVALUATIONS.values()]
        table = zip(map(int, series[0].steps), *(x.values for x in series), strict=True)
        write_csv(result.with_suffix(".csv"), ["step", *EVALUATIONS], table)
        times = read_metrics(run.times)
        seconds = sum(
            times[name].values.sum() for name in ("startup_s", "seconds") if name in times
        )
        made = {
            **facts,
            "minutes": round(seconds / 60, 2),
            "config": without_null({**run.config, "resume": None}),
            "versions": {name: run.versions[name] for name in ("python", "system", "packages")},
        }
        write_json(result, made)
        shutil.rmtree(run.path / "replay", ignore_errors=True)

    def report(self, suite: Suite, jobs: Sequence[Job], say: Callable[[str], None]) -> None:
        """Tables and pictures of a suite, if runs of its own are finished.

        ``summary.csv`` beside the suites holds the first columns of all their tables.
        """
        curves: dict[str, dict[str, list[Series]]] = {}
        own = False  # more than the runs that it shares with other suites
        for job in jobs:
            path = self.path(job)
            if job.run and path.is_file():
                runs = curves.setdefault(job.run["task"], {}).setdefault(job.run["variant"], [])
                runs.append(read_metrics(path.with_suffix(".csv"))[suite.score])
                own |= job.suite == suite.name
        if not own:
            return
        styles = {
            name: MethodStyle(x.label or name, x.color or COLORS[i % len(COLORS)], x.line)
            for i, (name, x) in enumerate(suite.variants.items())
        }
        comparison = Comparison(suite.name, suite.score, suite.threshold, curves, styles)
        write_comparison(comparison, self.folder / suite.name)
        say(f"report: {self.folder / suite.name}")
        self._summarize()

    def _summarize(self) -> None:
        rows = []
        for table in sorted(self.folder.glob("*/table.csv")):
            with open(table, newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                if set(SUMMARY) <= set(reader.fieldnames or ()):  # else no suite's
                    rows += [[row[name] for name in SUMMARY] for row in reader]
        write_csv(self.folder / "summary.csv", SUMMARY, rows)
