"""Methods x tasks x seeds as jobs that need each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prelar_trl.utils import listed


@dataclass(frozen=True, eq=False)
class Job:
    """One program to run, after the one that it needs.

    Args:
        suite: first folder of its path; the recipe and the name follow.
        recipe: which program.
        settings: its overrides; paths of other jobs in them are relative to the root.
        needs: the job that must be finished before.
        run: what identifies a run with results of its own; empty for a job that only serves others.
    """

    suite: str
    recipe: str
    name: str
    settings: Mapping[str, Any]
    needs: Job | None = None
    run: Mapping[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> str:
        return f"{self.suite}/{self.recipe}/{self.name}"

    @property
    def inputs(self) -> dict[str, Any]:
        """All settings that its result depends on, those of what it needs, too."""
        needs = self.needs.inputs if self.needs else None
        return {"recipe": self.recipe, "settings": dict(self.settings), "needs": needs}


@dataclass(frozen=True)
class Variant:
    """One method of a suite.

    Args:
        label, color, line: in tables and pictures. Default: its name, the next color, solid.
        pretrain: settings of ``pretrain.py``; or the name of a variant whose run it shares; or
            None, from scratch.
        finetune: settings of ``finetune.py``.
    """

    label: str | None = None
    color: str | None = None
    line: str = "-"
    pretrain: Mapping[str, Any] | str | None = None
    finetune: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Suite:
    """Variants x tasks x seeds.

    Args:
        name: of its folder.
        variants: by name.
        tasks: name -> settings of ``finetune.py``.
        seeds: how many, from 0 on.
        pretrain_seeds: pre-training runs of a variant; fine-tuning seed ``s`` takes run
            ``s % pretrain_seeds``. Default: one a seed.
        videos: settings of ``collect_videos.py``, collected once; empty where ``pretrain`` names
            its ``data``.
        pretrain, finetune: settings of all variants; a variant's own win.
        from_scratch: the folder of runs without pre-training, which do not depend on the videos and
            can be shared by suites. Default: the suite's own.
        score: what is compared, ``return`` or ``success`` of an evaluation.
        threshold: a score that counts as learned.
    """

    name: str
    variants: Mapping[str, Variant]
    tasks: Mapping[str, Mapping[str, Any]]
    seeds: int
    pretrain_seeds: int | None = None
    videos: Mapping[str, Any] = field(default_factory=dict)
    pretrain: Mapping[str, Any] = field(default_factory=dict)
    finetune: Mapping[str, Any] = field(default_factory=dict)
    from_scratch: str | None = None
    score: str = "success"
    threshold: float = 0.8

    def jobs(
        self, variants: Sequence[str] | None = None, tasks: Sequence[str] | None = None
    ) -> list[Job]:
        """The jobs in their order: every variant gets a seed before any gets the next.

        Args:
            variants, tasks: names; default: all.

        Raises:
            ValueError: an unknown name, two runs of one path, or nothing to pre-train on.
        """
        variants = _chosen("methods", variants, self.variants)
        tasks = _chosen("tasks", tasks, self.tasks)
        jobs: dict[str, Job] = {}
        for seed in range(self.seeds):
            for name in variants:
                variant = self.variants[name]
                suite, settings = self.name, {**self.finetune, **variant.finetune, "seed": seed}
                needs = None
                if variant.pretrain is None:
                    suite = self.from_scratch or suite
                else:
                    shared = variant.pretrain if isinstance(variant.pretrain, str) else name
                    needs = self._pretraining(shared, seed, jobs)
                    settings["pretrained"] = needs.path
                for task in tasks:
                    run = {"variant": name, "task": task, "seed": seed}
                    own = {**self.tasks[task], **settings}
                    job = Job(suite, "finetune", f"{name}-{task}-{seed}", own, needs, run)
                    if job.path in jobs:
                        raise ValueError(
                            f"two runs would be {job.path}: rename the variant {name} or the task "
                            f"{task}"
                        )
                    jobs[job.path] = job
        return list(jobs.values())

    def _pretraining(self, name: str, seed: int, jobs: dict[str, Job]) -> Job:
        """The pre-training run of a variant for a seed, and before it its videos."""
        seed %= self.pretrain_seeds or self.seeds
        own = self.variants[name].pretrain if name in self.variants else None
        if not isinstance(own, Mapping):
            raise ValueError(f"pretrain={name!r} of a variant is no variant with a pre-training")
        settings = {**self.pretrain, **own, "seed": seed}
        videos = None
        if self.videos and "data" not in settings:
            videos = Job(self.name, "collect_videos", "videos", self.videos)
            videos = jobs.setdefault(videos.path, videos)
            settings["data"] = videos.path
        elif "data" not in settings:
            raise ValueError(
                f"{name} has nothing to pre-train on: give videos={{env: ..., episodes: ...}}, or "
                "the store of your own as pretrain.data"
            )
        job = Job(self.name, "pretrain", f"{name}-{seed}", settings, videos)
        return jobs.setdefault(job.path, job)


def _chosen(what: str, names: Sequence[str] | None, known: Mapping[str, Any]) -> list[str]:
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise ValueError(f"{what}: {unknown[0]!r} is unknown; choose {listed(known)}")
    return list(known if names is None else dict.fromkeys(names))
