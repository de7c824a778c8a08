"""A published preset never changes: every resolved setting against a recorded table."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest

from prelar_trl.config import METHODS, SIZES, loss_settings, model_settings
from prelar_trl.recipes.schema import FinetuneConfig, PretrainConfig

# Recorded at commit 2e20daf, before there was any option beside the published ones.
RECORDED = json.loads(Path(__file__).with_name("fixtures").joinpath("presets.json").read_text())
# The options that are younger than the table: the value that changes nothing.
OFF = {
    "model": {
        "gray": False,
        "patches": False,
        "latent_action_options": {},
        "latent_action_shift": 0,
    },
    "loss": {
        "clip_rewards": "identity",
        "latent_free_nats": 0.0,
        "latent_warmup": 0,
        "latent_warmup_start": 0.01,
    },
    "recipe": {"labels": 0.0, "align_updates": None, "rehearse": 0.0},
}
MOVED = {"prior_std"}  # now among latent_action_options; off in both places
OURS = {"prelar_plus"}  # methods that nobody has published
PUBLISHED = sorted({name.split()[0] for name in RECORDED["model"]})


def resolved(table: str) -> dict[str, dict[str, Any]]:
    """What the package gives today, as the table has it."""
    phases = [(m, p) for m in PUBLISHED for p in ("pretrain", "finetune")]
    phases = [(m, p) for m, p in phases if getattr(METHODS[m], p) is not None]
    match table:
        case "model":
            return {
                f"{m} {p} {size}": asdict(model_settings(m, p, size))
                for m, p in phases
                for size in ("full", "small", "tiny")
            }
        case "weights":
            return {f"{m} {p}": dict(getattr(METHODS[m], f"{p}_weights")) for m, p in phases}
        case "loss":
            settings, *others = [asdict(loss_settings(m, p)) | {"weights": ...} for m, p in phases]
            assert all(other == settings for other in others)
            settings.pop("weights")
            return {"all": settings}
    configs = {"pretrain": PretrainConfig, "finetune": FinetuneConfig}
    return {
        name: {field.name: field.default for field in fields(config)}
        for name, config in configs.items()
    }


def changes(recorded: dict, today: dict, off: dict[str, Any], *, closed: bool) -> list[str]:
    """Each difference as one line; ``closed``: an option without a recorded value is one too."""
    if recorded.keys() != today.keys():
        return [f"presets: recorded {sorted(recorded)}, today {sorted(today)}"]
    found = []
    for preset, expected in recorded.items():
        expected = {**expected, **{k: v for k, v in off.items() if k in today[preset]}}
        for name in sorted(expected.keys() | (today[preset].keys() if closed else set())):
            if name in MOVED:
                continue
            was, now = (x.get(name, "absent") for x in (expected, today[preset]))
            now = list(now) if isinstance(now, tuple) else now
            if was != now:
                found.append(f"{preset}: {name} is {now}, was {was}")
    return found


@pytest.mark.parametrize("table", ["model", "weights", "loss", "recipe"])
def test_a_published_preset_never_changes(table: str) -> None:
    found = changes(RECORDED[table], resolved(table), OFF.get(table, {}), closed=table != "recipe")
    assert not found, "\n".join(["a published preset has changed:", *found])


def test_published_methods_align_nothing_and_accept_each_other() -> None:
    assert set(PUBLISHED) == METHODS.keys() - OURS
    assert {m for m in PUBLISHED if METHODS[m].align_updates} == set()
    assert {"full", "small", "tiny"} <= SIZES.keys()
