"""The jobs of :mod:`benchmarks.study`: videos, pre-training on them, probes of what was learned."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from prelar_trl.sweep import Job
from prelar_trl.utils import read_json, write_json

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


class ProbeResults:
    """The probed values of each pre-training run, and what made them.

    Args:
        folder: of the study.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, job: Job) -> Path:
        return self.folder / "runs" / job.suite / f"{job.name}.json"

    def publish(self, job: Job, root: Path, facts: Mapping[str, Any]) -> None:
        """Write a run's probed values, and what made it."""
        probed = read_json(root / job.settings["run"] / "probe.json", missing_ok=True)
        values = {
            name: None if math.isnan(value) else float(f"{value:.6g}")
            for name, value in probed["values"].items()
            if not OF_ONE_DIMENSION.fullmatch(name)
        }
        write_json(self.path(job), {**facts, "values": values})
