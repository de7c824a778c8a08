"""Work through methods x tasks x seeds, and go on where it was stopped.

python recipes/sweep.py experiment=toy jobs=2                    two runs at a time
python recipes/sweep.py experiment=toy status=true               finished, running, waiting, failed
python recipes/sweep.py experiment=toy report=true               tables and pictures anew
python recipes/sweep.py experiment=prelar_paper dry_run=true     runs, GPU hours, disk
python recipes/sweep.py methods=[dreamerv2,prelar] tasks=[metaworld/reach] seeds=3 \\
    pretrain.data=videos/rlbench name=mine

Stopped in any way (Ctrl-C, SIGTERM, SIGKILL) and started again, it goes on with each run at its
last checkpoint; SIGSTOP to its process group pauses all of them. In a git checkout the runs are of
a clean copy of one commit, which lies in ``root``: changes that are not committed do not count, and
a later commit only does with ``update_code=true``. What is finished lies in ``results``, one CSV
and one JSON file a run beside the tables and pictures, and is never run again, even where nothing
else is left.
"""

from __future__ import annotations

import sys

from prelar_trl.recipes.entry import describe, start

if __name__ == "__main__":  # before the imports that take seconds
    sys.exit(start("sweep"))

import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from prelar_trl.config import METHODS
from prelar_trl.recipes.command_line import as_override
from prelar_trl.recipes.estimate import estimate, estimate_table, resolve
from prelar_trl.recipes.schema import SweepConfig
from prelar_trl.sweep import (
    Engine,
    Job,
    Launcher,
    LocalLauncher,
    RayLauncher,
    SlurmLauncher,
    Suite,
    Variant,
    lock_root,
    locked,
    module_command,
    prepare_source,
)
from prelar_trl.sweep.results import CurveResults


def sweep(cfg: SweepConfig) -> int:
    """What the configuration asks for; returns how many jobs are not finished."""
    root, results = Path(cfg.root).absolute(), CurveResults(Path(cfg.results).absolute())
    suite, jobs = make_suite(cfg), make_jobs(cfg)
    chosen = [job for job in jobs if not job.run or re.search(cfg.only, job.path)]
    if not any(job.run for job in chosen):
        raise ValueError(f"only={cfg.only} matches none of the {len(jobs)} jobs")
    engine = Engine(
        root,
        results,
        chosen,
        command,
        manifest=root / cfg.name / "manifest.json",
        runtime=cfg.runtime,
        say=say,
    )
    engine.check_shared(suite.name)
    if cfg.status:
        print(engine.table(alive=locked(root)))
        return 0
    if cfg.dry_run:
        print(engine.table(alive=locked(root)), end="\n\n")
        print(estimate_table(*estimate(engine.unfinished(), cfg), cfg))
        return 0
    if cfg.report:
        results.report(suite, jobs, say)
        return 0
    check_settings(engine.unfinished())
    with lock_root(root) as lock:
        engine.source = prepare_source(root, copy=cfg.copy_code, update=cfg.update_code, say=say)
        launcher: Launcher = LocalLauncher(lock)
        if cfg.launcher == "slurm":
            launcher = SlurmLauncher(root / cfg.name / "slurm", cfg.slurm)
        elif cfg.launcher == "ray":
            launcher = RayLauncher(cfg.ray)
        undone = engine.work(launcher, cfg.jobs)
        results.report(suite, jobs, say)
    print(engine.table(alive=False))
    return undone


def make_suite(cfg: SweepConfig) -> Suite:
    """The whole table of the configuration: every variant and task that it knows.

    Raises:
        ValueError: a variant with an unknown setting, or tasks that cannot be told apart.
    """
    variants = {}
    for name, settings in (cfg.variants or presets()).items():
        try:
            variants[name] = Variant(**settings)
        except TypeError:
            known = ", ".join(Variant.__dataclass_fields__)
            raise ValueError(f"variants.{name} is no mapping of {known}") from None
    tasks = cfg.environments
    if not tasks:
        tasks = {env.rpartition("/")[2]: {"env": env} for env in cfg.tasks or ()}
        if len(tasks) < len(cfg.tasks or ()):
            raise ValueError(f"tasks={cfg.tasks}: two have the same last name")
    if not tasks:
        raise ValueError("no tasks: give an experiment=, or tasks=[metaworld/reach]")
    return Suite(
        cfg.name,
        variants,
        tasks,
        cfg.seeds,
        pretrain_seeds=cfg.pretrain_seeds,
        videos=cfg.videos,
        pretrain=cfg.pretrain,
        finetune=cfg.finetune,
        from_scratch=cfg.from_scratch,
        score=cfg.score,
        threshold=cfg.threshold,
    )


def make_jobs(cfg: SweepConfig) -> list[Job]:
    """The jobs of the chosen methods and tasks."""
    if not cfg.variants and cfg.methods is None:
        raise ValueError("no methods: give an experiment=, or methods=[dreamerv2,prelar]")
    return make_suite(cfg).jobs(cfg.methods, cfg.tasks if cfg.environments else None)


def check_settings(jobs: Iterable[Job]) -> None:
    """Refuse settings that a recipe does not take before anything is run.

    Raises:
        ValueError: naming the first such job.
    """
    checked, apart = [], ("seed", "pretrained")
    for job in jobs:
        settings = [job.recipe, {k: x for k, x in job.settings.items() if k not in apart}]
        if settings in checked:
            continue
        checked.append(settings)
        try:
            resolve(job)
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            raise ValueError(f"{job.path}: {describe(error)}") from None


def presets() -> dict[str, dict[str, Any]]:
    """Every method by its name, pre-trained where it can be."""
    variants: dict[str, dict[str, Any]] = {}
    for name, method in METHODS.items():
        pretrain: Mapping[str, Any] | str | None = None
        if method.pretrain is not None:
            pretrain = {"method": name}
        elif method.checkpoint:
            pretrain = method.checkpoint[0]
        variants[name] = {"pretrain": pretrain, "finetune": {"method": name}}
    return variants


def command(recipe: str, settings: Mapping[str, Any]) -> list[str]:
    """The program of a recipe with these settings."""
    overrides = [f"{name}={as_override(value)}" for name, value in settings.items()]
    return module_command(recipe, overrides)


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def main(cfg: SweepConfig) -> None:
    """Entry point; ends with 1 if not all is finished."""
    if sweep(cfg):
        sys.exit(1)
