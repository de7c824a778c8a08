"""Values that make no sense are refused in one line: which key, which value, which are allowed."""

from __future__ import annotations

import sys
from dataclasses import fields
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest
import torch

from prelar_trl.bounds import Rule, check_settings
from prelar_trl.config import LossSettings, ModelSettings
from prelar_trl.recipes import schema
from prelar_trl.recipes.base_config import overrides
from prelar_trl.recipes.entry import start
from prelar_trl.recipes.schema import (
    CollectVideosConfig,
    FinetuneConfig,
    PrepareVideosConfig,
    PretrainConfig,
)
from tests.tiny import batch, tiny_world_model

CONFIGS = schema.Config.__subclasses__() + schema.RunConfig.__subclasses__()
INF = float("inf")  # training would diverge, or never begin, without a word


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("model.discount=2", "model.discount=2 must lie between 0 and 1"),
        ("model.bonus_memory=0", "model.bonus_memory=0 must be at least 1"),
        ("model.depth=0", "model.depth=0 must be at least 1"),
        ("model.depth=1 model.images=resnet", "depth=1 must be at least 2 with images=resnet"),
        (
            "model.depth=5 model.images=context",
            "depth=5 must be at least 2 with images=resnet, and even with context",
        ),
        ("model.stoch=0", "model.stoch=0 must be at least 1"),
        ("model.layers=0", "model.layers=0 must be at least 1"),
        ("model.stages=9", "model.stages=9 must lie between 1 and 5"),
        ("model.classes=1", "model.classes=1 must be 0 (Gaussian) or at least 2"),
        ("model.heads=foo", "model.heads='foo' must be a list of reward, aux_reward or discount"),
        (
            "model.heads=[foo]",
            "model.heads=['foo'] has 'foo', which is unknown; choose reward, aux_reward or",
        ),
        ("model.depth=1.5", "model.depth=1.5 must be a whole number"),
        ("model.stacked=3", "model.stacked=3 must be true or false"),
        ("loss.bonus_scale=-1", "loss.bonus_scale=-1 must be at least 0"),
        ("loss.free_nats=-3", "loss.free_nats=-3 must be at least 0"),
        ("loss.temperature=0", "loss.temperature=0 must be above 0"),
        ("loss.kl_balance=nan", "loss.kl_balance=nan must lie between 0 and 1"),
        (
            "loss.weights={kl:-1}",
            "loss.weights={'kl': -1} has kl=-1, which must be at least 0",
        ),
        ("clip=0", "clip=0.0 must be above 0"),
        ("threads=0", "threads=0 must be at least 1"),
        ("logger=null", "logger='null' is unknown; choose csv, tensorboard, wandb, or a list of"),
        ("method=null", "method='null' is unknown; choose dreamerv2, apv"),
        ("size=null", "size='null' is unknown; choose full, small, tiny or mini"),
    ],
)
def test_training_refuses(argument: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["pretrain", "data=d", "run=r", *argument.split()])
    with pytest.raises(SystemExit) as stop:
        start("pretrain")
    said = str(stop.value.code)
    assert said.startswith(f"error: {line}") and "\n" not in said


def test_what_both_phases_share_is_checked_in_the_other_too() -> None:
    with pytest.raises(ValueError, match="clip=0 must be above 0"):
        FinetuneConfig(clip=0)
    with pytest.raises(ValueError, match="model.discount=2 must lie between 0 and 1"):
        FinetuneConfig(model={"discount": 2})
    with pytest.raises(ValueError, match="depth=1 must be at least 2 with images=resnet"):
        FinetuneConfig(model={"depth": 1, "images": "resnet"})


@pytest.mark.parametrize(
    ("settings", "values", "name"),
    [
        (FinetuneConfig, {"lr": INF}, "lr"),
        (FinetuneConfig, {"train_every": INF}, "train_every"),
        (FinetuneConfig, {"loss": {"free_nats": INF}}, "loss.free_nats"),
        (FinetuneConfig, {"loss": {"temperature": INF}}, "loss.temperature"),
        (CollectVideosConfig, {"noise": INF}, "noise"),
        (PrepareVideosConfig, {"white": INF}, "white"),
    ],
)
def test_infinity_is_refused(settings: type, values: dict, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=inf must be finite"):
        settings(**values)
    assert settings(**{key: {} if isinstance(x, dict) else 1.0 for key, x in values.items()})


def test_a_configuration_made_in_python_is_checked_too() -> None:
    with pytest.raises(ValueError, match="updates=0 must be at least 1"):
        PretrainConfig(updates=0)
    with pytest.raises(ValueError, match="model.stoch=0 must be at least 1"):
        PretrainConfig(model={"stoch": 0})
    with pytest.raises(ValueError, match="unknown setting 'model.width'; choose images, "):
        PretrainConfig(model={"width": 3})
    with pytest.raises(ValueError, match="method=naive has no phase 'pretrain'"):
        PretrainConfig(method="naive")
    cfg = PretrainConfig(model={"depth": 8})
    assert cfg.model.keys() == {f.name for f in fields(ModelSettings)}
    assert overrides(cfg.model) == {"depth": 8} and overrides(cfg.loss) == {}


@pytest.mark.parametrize("settings", [*CONFIGS, ModelSettings, LossSettings])
def test_every_number_has_a_range(settings: type) -> None:
    hints = get_type_hints(settings, include_extras=True)
    for field in fields(settings):
        hint = hints[field.name]
        kinds = [hint] if get_origin(hint) is Annotated else [hint, *get_args(hint)]
        assert not {int, float} & set(kinds), field.name


def test_values_of_every_kind_of_type() -> None:
    class Settings:
        number: Annotated[float, Rule(lambda x: x != 0, "must not be 0")] | None
        names: dict[str, list[int]]
        anything: Any

    good = {"number": None, "names": {"a": [1], "b": []}, "anything": object()}
    check_settings(Settings, good)
    for bad, message in (
        ({"number": 0}, "x.number=0 must not be 0"),
        ({"number": True}, "x.number=True must be a number"),
        ({"names": {"a": [1, "b"]}}, "has a=.* which has 'b', which must be a whole number"),
        ({"names": []}, "x.names=.* must be a mapping"),
    ):
        with pytest.raises(ValueError, match=message):
            check_settings(Settings, bad, prefix="x.")


@pytest.mark.parametrize("images", ["resnet", "context", "cnn"])
@pytest.mark.parametrize("ends", [{"stages": 1, "classes": 0}, {"stages": 5, "classes": 2}])
def test_a_model_of_the_least_values_predicts(images: str, ends: dict[str, int]) -> None:
    least = {
        "depth": 1 if images == "cnn" else 2,
        "layers": 1,
        "stoch": 1,
        "deter": 1,
        "hidden": 1,
        "ensemble": 1,
    }
    model = tiny_world_model(images=images, **least, **ends)
    out = model(batch())
    assert torch.isfinite(out["prediction", "pixels"]).all()
