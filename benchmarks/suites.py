"""What :mod:`benchmarks.campaign` runs: ``suites.yaml`` as jobs that need each other."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

TABLE = Path(__file__).with_name("suites.yaml")


@dataclass(frozen=True)
class Variant:
    """One method of a suite; see ``suites.yaml``."""

    label: str
    color: str
    finetune: Mapping[str, Any]
    pretrain: Mapping[str, Any] | str | None = None
    line: str = "-"
    skip: bool = False


@dataclass(frozen=True)
class Suite:
    """Tasks, variants and settings; see ``suites.yaml``."""

    tasks: Mapping[str, Mapping[str, Any]]
    seeds: int
    score: str
    threshold: float
    videos: Mapping[str, Any]
    pretrain: Mapping[str, Any]
    finetune: Mapping[str, Any]
    variants: Mapping[str, Variant]
    like: str | None = None


@dataclass(frozen=True, eq=False)
class Job:
    """One program to run, after the one that it needs.

    ``settings`` are its overrides; all paths in them are relative to the campaign's root.
    """

    suite: str
    recipe: str
    name: str
    settings: Mapping[str, Any]
    needs: Job | None = None
    run: Mapping[str, Any] = field(default_factory=dict)  # what identifies a run with results

    @property
    def path(self) -> str:
        return f"{self.suite}/{self.recipe}/{self.name}"

    @property
    def inputs(self) -> dict[str, Any]:
        """All settings that its result depends on, those of what it needs, too."""
        needs = self.needs.inputs if self.needs else None
        return {"recipe": self.recipe, "settings": self.settings, "needs": needs}


def load_suites(path: Path) -> dict[str, Suite]:
    """Read the table; mappings of a suite are laid over those of the suite that it is like."""
    table: dict[str, dict[str, Any]] = yaml.safe_load(path.read_text(encoding="utf-8"))
    for keys in table.values():
        for key, value in table.get(keys.get("like", ""), {}).items():
            merge = isinstance(value, dict) and key != "variants"
            keys[key] = {**value, **keys.get(key, {})} if merge else keys.get(key, value)
    return {
        name: Suite(**keys | {"variants": {v: Variant(**x) for v, x in keys["variants"].items()}})
        for name, keys in table.items()
    }


def expand(suites: Mapping[str, Suite], name: str) -> list[Job]:
    """The jobs of a suite in their order: every variant gets a seed before any gets the next."""
    suite, jobs = suites[name], {}
    elsewhere = {job.path: job for job in expand(suites, suite.like)} if suite.like else {}

    def add(*args: Any, **kwargs: Any) -> Job:
        job = Job(*args, **kwargs)
        return jobs.setdefault(job.path, job)

    for seed in range(suite.seeds):
        for variant, entry in suite.variants.items():
            if entry.skip:
                continue
            needs, settings = None, suite.finetune | entry.finetune | {"seed": seed}
            if entry.pretrain is not None:
                shared = entry.pretrain if isinstance(entry.pretrain, str) else variant
                videos = add(name, "collect_videos", "videos", suite.videos)
                own = {"seed": seed, "data": videos.path}
                pretrain = suite.pretrain | suite.variants[shared].pretrain | own
                needs = add(name, "pretrain", f"{shared}-{seed}", pretrain, videos)
                settings["pretrained"] = needs.path
            for task, of_task in suite.tasks.items():
                run = {"variant": variant, "task": task, "seed": seed}
                run_name = f"{variant}-{task}-{seed}"
                job = Job(name, "finetune", run_name, {**of_task, **settings}, needs, run)
                twin = elsewhere.get(f"{suite.like}/finetune/{run_name}", job)
                if needs is None and twin.settings == job.settings:
                    job = twin
                jobs[job.path] = job
    return list(jobs.values())


def override(value: Any) -> str:
    """A value in the form in which Hydra reads it from a command line."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{override(x)}" for key, x in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(override, value)) + "]"
    return value if isinstance(value, str) else json.dumps(value)
