"""The settings of a run that starts, and of one that goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from prelar_trl.config import METHODS, Phase, loss_settings, model_settings, named_modules
from prelar_trl.recipes.schema import FinetuneConfig, RunConfig, overrides
from prelar_trl.record import RunFolder

CHECKPOINT = "last.pt"
# What a run may continue with another value of: it changes no number that was not to come.
CHANGEABLE = {
    *("run", "updates", "env_steps", "device", "threads", "compile", "num_workers", "prefetch"),
    *("worker_timeout", "worker_failures", "logger", "log_every", "video_every", "usage_every"),
    *("collector", "checkpoint_every", "eval_every", "eval_from", "eval_episodes"),
    *("keep", "keep_every", "max_skipped", "trust_code"),
}
MOVABLE = {"data", "pretrained"}  # the clip stores' contents are compared with the checkpoint
Run = TypeVar("Run", bound=RunConfig)


def settle_resume(cfg: Run) -> tuple[Run, bool]:
    """The configuration with ``resume`` true or false, and whether ``auto`` decided that."""
    if cfg.resume != "auto":
        return cfg, False
    checkpoint = Path(cfg.run).expanduser() / "checkpoints" / CHECKPOINT
    return replace(cfg, resume=checkpoint.is_file()), True


def settle_preset(cfg: Run) -> Run:
    """The configuration with a value for each setting that the method has one for.

    What is not given is the method's or, in a run that goes on, what the run began with: the
    method may have changed since. A module that the run folder names must be given again.
    """
    began = RunFolder.load(cfg.run).config if cfg.resume else {}
    same = began.get("method") == cfg.method and began.get("size") == cfg.size
    if not same or not began.keys() <= vars(cfg).keys():  # refused later, by name
        began = {}
    settled = preset_of(cfg.phase, asdict(cfg), began)
    if isinstance(cfg, FinetuneConfig) and cfg.align_updates is None:
        aligned = METHODS[cfg.method].align_updates if cfg.pretrained else 0
        settled["align_updates"] = began.get("align_updates", aligned)
    return replace(cfg, **settled)


def preset_of(
    phase: Phase, config: Mapping[str, Any], began: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """All of ``model`` and ``loss``: a configuration's, else ``began``'s, else the method's."""
    given = {part: overrides(config.get(part) or {}) for part in ("model", "loss")}
    kept = {part: overrides(began.get(part) or {}) for part in given}
    for name in named_modules(kept["model"]):
        del kept["model"][name]
    model = {**kept["model"], **given["model"]}
    weights = {**kept["loss"].get("weights", {}), **given["loss"].get("weights", {})}
    loss = {**kept["loss"], **given["loss"], "weights": weights}
    return {
        "model": plain(asdict(model_settings(config["method"], phase, config["size"], model))),
        "loss": plain(asdict(loss_settings(config["method"], phase, loss))),
    }


def changed_settings(run: RunFolder, cfg: RunConfig) -> dict[str, Any]:
    """Settings that differ from those that the run was started with.

    Raises:
        ValueError: one of them changes what the run computes.
    """
    first: dict[str, Any] = {field.name: field.default for field in fields(cfg)}  # options since
    first |= run.config
    first |= preset_of(cfg.phase, first, {})  # of a run whose folder has only what was given
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
                f"{name}={began}; repeat its command with resume=true"
            )
        changed[name] = value
    return changed


def plain(value: Any) -> Any:
    """Tuples as lists, throughout: what YAML gives back."""
    if isinstance(value, Mapping):
        return {key: plain(x) for key, x in value.items()}
    return [plain(x) for x in value] if isinstance(value, (list, tuple)) else value
