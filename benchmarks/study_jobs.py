"""The jobs of :mod:`benchmarks.study`: videos, pre-training on them, probes of what was learned."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.jobs import Campaign, check_code, drive, write_json
from benchmarks.study import parse_arguments
from benchmarks.study_report import write_report
from benchmarks.suites import Job

TABLE = Path(__file__).with_name("study.yaml")
OF_ONE_DIMENSION = re.compile(r"action_r2.*_\d+")


@dataclass(frozen=True)
class Study:
    """What ``study.yaml`` holds."""

    seeds: int
    data: Mapping[str, Mapping[str, Any]]
    variants: Mapping[str, Mapping[str, Any]]


def load_study(path: Path = TABLE) -> Study:
    return Study(**yaml.safe_load(path.read_text(encoding="utf-8")))


def expand(
    study: Study, *, data: list[str] | None = None, seeds: int | None = None, **pretrain: Any
) -> list[Job]:
    """The jobs in their order: every variant gets a seed before any gets the next.

    Args:
        data: names of data sets. Default: all.
        seeds: in place of the table's.
        pretrain: settings in place of those of the data sets.
    """
    chosen = {name: study.data[name] for name in data or study.data}
    videos = {
        name: Job(name, "collect_videos", "videos", x["videos"]) for name, x in chosen.items()
    }
    jobs = list(videos.values())
    for seed in range(seeds or study.seeds):
        for variant, own in study.variants.items():
            for name, of_data in chosen.items():
                source, run = videos[name], f"{variant}-{seed}"
                settings = {**of_data["pretrain"], **pretrain, **own}
                settings |= {"seed": seed, "data": source.path}
                trained = Job(name, "pretrain", run, settings, source)
                identity = {"data": name, "variant": variant, "seed": seed}
                probed = of_data["probe"] | {"run": trained.path}
                jobs += [trained, Job(name, "probe", run, probed, trained, identity)]
    return jobs


class StudyCampaign(Campaign):
    """A campaign whose results are the probes of pre-training runs."""

    def result(self, job: Job) -> Path:
        return self.results / "runs" / job.suite / f"{job.name}.json"

    def publish(self, job: Job) -> None:
        """Write a run's probed values, and what made it."""
        probed = json.loads((self.root / job.settings["run"] / "probe.json").read_text("utf-8"))
        values = {
            name: None if math.isnan(value) else float(f"{value:.6g}")
            for name, value in probed["values"].items()
            if not OF_ONE_DIMENSION.fullmatch(name)
        }
        commits = {"commit": self.commit, "pretraining_commit": self.record(job.needs)["commit"]}
        made = {**job.run, **commits, "inputs": job.inputs, "values": values}
        write_json(self.result(job), made)


def main() -> None:
    args = parse_arguments()
    check_code()
    study = load_study()
    unknown = [name for name in args.data if name not in study.data]
    if unknown:
        choices = ", ".join(study.data)
        sys.exit(f"error: no data set {unknown[0]!r} in {TABLE.name}; choose {choices}")
    changed = {"updates": args.updates} if args.updates else {}
    jobs = expand(study, data=args.data, seeds=args.seeds, **changed)
    drive(StudyCampaign, args, jobs, lambda: write_report(args.results, list(study.variants)))


if __name__ == "__main__":
    main()
