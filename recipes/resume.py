"""The settings of a run that starts, and of one that goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from prelar_trl.checkpoint import has_checkpoint
from prelar_trl.checkpoint_files import LAST
from prelar_trl.config import METHODS, loss_settings, model_settings, named_modules
from prelar_trl.recipes.base_config import overrides, plain
from prelar_trl.recipes.schema import FinetuneConfig, RunConfig
from prelar_trl.record import RunFolder

# What a run may continue with another value of: it changes no number that was not to come.
CHANGEABLE = {
    *("run", "updates", "env_steps", "device", "threads", "compile", "num_workers", "prefetch"),
    *("worker_timeout", "worker_failures", "logger", "log_every", "video_every", "usage_every"),
    *("collector", "checkpoint_every", "eval_every", "eval_from", "eval_episodes"),
    *("keep", "keep_every", "max_skipped", "trust_code"),
}
MOVABLE = {"data", "pretrained"}  # clips and weights are compared with those of the checkpoint
REPEAT = "repeat its command with resume=auto, or choose another folder"
Run = TypeVar("Run", bound=RunConfig)


def settle_resume(cfg: Run) -> tuple[Run, bool]:
    """The configuration with ``resume`` true or false, and whether ``auto`` decided that."""
    if cfg.resume != "auto":
        return cfg, False
    checkpoint = Path(cfg.run) / "checkpoints" / LAST
    return replace(cfg, resume=has_checkpoint(checkpoint)), True


def settle_preset(cfg: Run, restart: bool = False) -> Run:
    """The configuration with a value for each setting that the method has one for.

    What is not given is the method's or, in a run that goes on, or with ``restart`` starts anew,
    what the run began with: the method may have changed since. A module that the run folder names
    must be given again.
    """
    began: Mapping[str, Any] = {}
    there = (Path(cfg.run) / "config.yaml").is_file()
    if cfg.resume or (restart and there):
        began = RunFolder.load(cfg.run).config
        if other_kind(cfg, began):  # refused later
            began = {}
    settled = preset_of(cfg, began)
    if isinstance(cfg, FinetuneConfig) and cfg.align_updates is None:
        aligned = METHODS[cfg.method].align_updates if cfg.pretrained else 0
        settled["align_updates"] = began.get("align_updates", aligned)
    return replace(cfg, **settled)


def preset_of(cfg: RunConfig, began: Mapping[str, Any], given: bool = True) -> dict[str, Any]:
    """All of ``model`` and ``loss``: what is given, else ``began``'s, else the method's.

    Raises:
        ValueError: ``began`` has something else there, or a value that is out of bounds.
    """
    kept = {part: _settings(cfg, began, part) for part in ("model", "loss")}
    if kept["model"].get("images") is None:  # an older run's, with what was given alone
        kept = {part: overrides(settings) for part, settings in kept.items()}
    if given:
        for name in named_modules(kept["model"]):
            del kept["model"][name]
        weights = (kept["loss"].get("weights") or {}) | (cfg.loss["weights"] or {})
        kept = {part: kept[part] | overrides(getattr(cfg, part)) for part in kept}
        kept["loss"]["weights"] = weights
    return {
        "model": plain(asdict(model_settings(cfg.method, cfg.phase, cfg.size, kept["model"]))),
        "loss": plain(asdict(loss_settings(cfg.method, cfg.phase, kept["loss"]))),
    }


def _settings(cfg: RunConfig, began: Mapping[str, Any], part: str) -> dict[str, Any]:
    settings = began.get(part)
    if settings is None:
        return {}
    inner = settings.get("weights") if isinstance(settings, Mapping) else None
    if not isinstance(settings, Mapping) or not isinstance(inner, Mapping | None):
        raise ValueError(f"config.yaml of the run in {cfg.run} is damaged: {part} is {settings!r}")
    return dict(settings)


def other_kind(cfg: RunConfig, began: Mapping[str, Any]) -> str | None:
    """What makes it another run altogether: phase, method or size; None if nothing does."""
    if ("env_steps" in began) != isinstance(cfg, FinetuneConfig):
        return f"the run in {cfg.run} is of the other phase"
    for name in ("method", "size"):
        if began.get(name) != getattr(cfg, name):
            return (
                f"{name}={getattr(cfg, name)} but the run in {cfg.run} was started with "
                f"{name}={began.get(name)}; {REPEAT}"
            )
    return None


def changed_settings(run: RunFolder, cfg: RunConfig) -> dict[str, Any]:
    """Settings that differ from those that the run was started with.

    Raises:
        ValueError: one of them changes what the run computes.
    """
    if other := other_kind(cfg, run.config):
        raise ValueError(f"resume: {other}")
    # What a run older than an option, or its folder, does not say.
    first: dict[str, Any] = {x.name: x.default for x in fields(cfg)}
    first |= run.config
    first |= preset_of(cfg, run.config, given=False)
    changed = {}
    for name, value in plain(asdict(cfg)).items():
        given, began = value, first[name]
        if name == "resume" or began == given:
            continue
        if name in ("model", "loss"):
            differ = [key for key in given if given[key] != began[key]]
            given, began = ({key: x[key] for key in differ} for x in (given, began))
        moved = name in MOVABLE and None not in (given, began)
        if name not in CHANGEABLE and not moved:
            raise ValueError(
                f"resume: {name}={given} but the run in {cfg.run} was started with "
                f"{name}={began}; {REPEAT}"
            )
        changed[name] = value
    return changed
