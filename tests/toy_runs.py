"""Tiny runs of the recipes on the toy environment, in this process: seconds each."""

from __future__ import annotations

import csv
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from torchrl.envs import SerialEnv

from prelar_trl.envs import make_env
from prelar_trl.probes import mlp_r2
from prelar_trl.recipes.collect_videos import collect
from prelar_trl.recipes.entry import settings
from prelar_trl.recipes.schema import (
    CollectVideosConfig,
    FinetuneConfig,
    PretrainConfig,
)
from prelar_trl.updates import WorldModelUpdate

ROOT = Path(__file__).parents[1]
TINY = {
    "depth": 4,
    "deter": 16,
    "hidden": 16,
    "stoch": 4,
    "classes": 4,
    "head_units": 16,
    "latent_action_size": 4,
    "latent_action_deter": 4,
    "latent_action_hidden": 16,
    "bonus_memory": 64,
    "bonus_projection": 8,
}
# The same on a command line.
TINY_ARGS = [f"model.{name}={value}" for name, value in TINY.items()]
CLIPS = {"batch_size": 2, "clip_len": 6, "context": 2, "heldout": 0.25, "device": "cpu"}
STEPS = {
    "env": "toy",
    "max_steps": 10,
    "env_steps": 60,
    "prefill": 20,
    "batch_size": 2,
    "batch_length": 6,
    "pretrain_updates": 1,
    "frozen_updates": 1,
    "train_every": 10,
    "capacity": 1_000,
    "horizon": 3,
    "eval_episodes": 1,
    "eval_every": 40,
    "log_every": 10,
    "checkpoint_every": 20,
    "device": "cpu",
}
QUICK = {  # fine-tuning of two updates of the smallest networks
    "size": "mini",
    "env_steps": 30,
    "prefill": 20,
    "batch_length": 5,
    "horizon": 2,
    "max_steps": 8,
    "eval_every": 30,
}
PRETRAIN_ARGS = [f"{k}={v}" for k, v in CLIPS.items()] + ["size=tiny", "threads=1", *TINY_ARGS]
FINETUNE_ARGS = [f"{k}={v}" for k, v in STEPS.items()] + ["size=tiny", "threads=1", *TINY_ARGS]


def configured(recipe: str, *given: str, configs: Path = ROOT / "configs") -> Any:
    """The checked configuration of a recipe with these arguments."""
    with initialize_config_dir(str(configs), version_base="1.3"):
        return settings(compose(recipe, list(given)))


def make_clips(path: Path, **changes: Any) -> Path:
    """A clip store of five toy episodes of nine frames."""
    small = {"env": "toy", "episodes": 5, "max_steps": 8, "after_success": None} | changes
    collect(CollectVideosConfig(data=str(path), **small))
    return path


def pretrain_config(data: Path, run: Path, **changes: Any) -> PretrainConfig:
    """Three updates, everything logged."""
    model = {**TINY, **changes.pop("model", {})}
    options = {"method": "prelar", "size": "tiny", "updates": 3, "threads": 1, "log_every": 1}
    options |= {**CLIPS, "checkpoint_every": 1, **changes}
    return PretrainConfig(data=str(data), run=str(run), model=model, **options)


def finetune_config(run: Path, **changes: Any) -> FinetuneConfig:
    """Sixty steps of the toy, six episodes, five updates."""
    model = {**TINY, **changes.pop("model", {})}
    options = {"method": "prelar", "size": "tiny", "threads": 1, **STEPS, **changes}
    return FinetuneConfig(run=str(run), model=model, **options)


def copy_run(source: Path, to: Path) -> Path:
    """A copy of a run folder, as if the run had been there from the start."""
    shutil.copytree(source, to)
    config = (to / "config.yaml").read_text()
    (to / "config.yaml").write_text(config.replace(f"run: {source}", f"run: {to}"))
    return to


def interrupt_after(
    monkeypatch: pytest.MonkeyPatch, updates: int, number: int = signal.SIGINT
) -> None:
    """The process gets a signal within the update of that number."""
    real = WorldModelUpdate.__call__

    def call(self, batch):
        if self.count + 1 == updates:
            signal.raise_signal(number)
        return real(self, batch)

    monkeypatch.setattr(WorldModelUpdate, "__call__", call)


def two_at_once(name, *, seed, num_workers, **options):
    """As ``num_workers=2``, without the seconds that processes take to start."""
    return SerialEnv(2, [partial(make_env, name, seed=seed + i, **options) for i in range(2)])


def shorten_mlp_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """The MLPs of a probe train for 20 steps, which is a hundredth of a second each."""
    monkeypatch.setattr("prelar_trl.recipes.probe.mlp_r2", partial(mlp_r2, steps=20))


def checkpoint(run: str | Path) -> dict[str, Any]:
    """The last checkpoint of a run."""
    return torch.load(Path(run, "checkpoints", "last.pt"), weights_only=True)


def rows(run: Path, name: str = "metrics.csv") -> list[dict[str, str]]:
    """The table of metrics of a run, or another one."""
    with open(run / name, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def different(a: Any, b: Any, name: str = "") -> list[str]:
    """Names of the entries of nested dictionaries in which two checkpoints differ."""
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [name]
        return [d for key in a for d in different(a[key], b[key], f"{name}/{key}")]
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            return [name]
        return [
            d
            for i, pair in enumerate(zip(a, b, strict=True))
            for d in different(*pair, f"{name}/{i}")
        ]
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    return [] if same else [name]
