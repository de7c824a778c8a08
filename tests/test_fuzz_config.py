"""Odd configurations of every recipe: refused in one line, or a run that can be built."""

from __future__ import annotations

import warnings
from dataclasses import fields
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import open_dict

from prelar_trl.config import METHODS, LossSettings, ModelSettings
from prelar_trl.models import make_agent, make_world_model, make_world_model_loss
from prelar_trl.recipes import schema
from prelar_trl.recipes.command_line import FREE, as_typed
from prelar_trl.recipes.entry import CONFIGS, describe, settings
from tests.fuzz import ODD, WORDS, check_numbers, fuzz, run

RECIPES = {
    "pretrain": schema.PretrainConfig,
    "finetune": schema.FinetuneConfig,
    "evaluate": schema.EvaluateConfig,
    "probe": schema.ProbeConfig,
    "collect_videos": schema.CollectVideosConfig,
    "prepare_videos": schema.PrepareVideosConfig,
    "sweep": schema.SweepConfig,
    "plot": schema.PlotConfig,
    "export": schema.ExportConfig,
    "import_official": schema.ImportOfficialConfig,
}
GROUPS = [folder.name for folder in CONFIGS.iterdir() if folder.is_dir()]
SMALL = {"depth": 4, "layers": 1, "deter": 16, "hidden": 16, "head_units": 16}


def names(of: type) -> st.SearchStrategy[str]:
    return st.sampled_from([field.name for field in fields(of)])


def check_error(error: Exception) -> None:
    """It is one line for the user, who sees no traceback."""
    line = describe(error)
    assert line and "\n" not in line, repr(error)


def made(config: type, values: dict[str, Any]) -> Any:
    """The configuration; None where it is refused."""
    try:
        cfg = config(**values)
    except Exception as error:
        return check_error(error)
    # Mappings that the schema does not know are checked by the recipe that they are for.
    free = {f.name for f in fields(config) if f.metadata == FREE}
    check_numbers({name: x for name, x in vars(cfg).items() if name not in free})
    return cfg


@pytest.mark.parametrize("recipe", RECIPES)
@fuzz(60)
def test_every_field_takes_what_makes_sense_only(recipe: str, budget: Any) -> None:
    config = RECIPES[recipe]

    @given(st.dictionaries(names(config), ODD, min_size=1, max_size=2))
    def check(values: dict[str, Any]) -> None:
        made(config, values)

    run(budget, check)


def plausible(of: type) -> st.SearchStrategy[dict[str, Any]]:
    """Settings near their defaults, so that many are accepted, and odd ones."""
    numbers = st.sampled_from([0, 1, 2, 3, 4, 5, 8, 0.5, 0.25])
    words = ["cnn", "resnet", "context", "gaussian", "mixed", "categorical", "fsq", "vq"]
    words += ["deterministic", "embed", "feat", "lower", "diff", "catdiff", "flow", "soft", "gated"]
    words += ["layer", "group", "none", "batch", "real", "encoded", "latent", "erasing", "tanh"]
    lists = st.lists(st.sampled_from(["reward", "aux_reward", "discount", "x"]), max_size=3)
    options = st.dictionaries(
        st.sampled_from(["levels", "codes", "decay", "prior_std", "classes", "restart_below"]),
        ODD | st.sampled_from([[3, 3], [8, 5, 5], 4, 0.9]),
        max_size=2,
    )
    terms = st.sampled_from(["image", "kl", "reward", "aux_reward", "discount", "latent_kl"])
    weights = st.dictionaries(terms | WORDS, ODD | numbers, max_size=3)
    values = numbers | st.sampled_from(words) | st.booleans() | st.none() | lists
    special = {"weights": weights, "latent_action_options": options}
    keys = {f.name: special.get(f.name, values) | ODD for f in fields(of)}
    pairs = st.sampled_from(list(keys)).flatmap(lambda name: keys[name].map(lambda x: (name, x)))
    return st.lists(pairs, max_size=4).map(dict)


def build(cfg: schema.RunConfig) -> None:
    """Networks and losses of a configuration, without memory."""
    model, loss = ({k: x for k, x in s.items() if x is not None} for s in (cfg.model, cfg.loss))
    size = {"size": cfg.size, **SMALL, **model}
    with torch.device("meta"):
        if cfg.phase == "pretrain":
            bonus, world_model = (
                None,
                make_world_model(cfg.method, "pretrain", action_dim=0, **size),
            )
        else:
            agent = make_agent(cfg.method, action_dim=2, **size)
            bonus, world_model = agent.video_bonus, agent.world_model
        make_world_model_loss(cfg.method, cfg.phase, world_model, video_bonus=bonus, **loss)


@pytest.mark.parametrize("recipe", ["pretrain", "finetune"])
@fuzz(60)
def test_what_is_accepted_can_be_built(recipe: str, budget: Any) -> None:
    config = RECIPES[recipe]
    of_phase = [name for name, m in METHODS.items() if getattr(m, config.phase) is not None]

    @given(st.sampled_from(of_phase), plausible(ModelSettings), plausible(LossSettings))
    def check(method: str, model: dict[str, Any], loss: dict[str, Any]) -> None:
        cfg = made(config, {"method": method, "size": "tiny", "model": model, "loss": loss})
        if cfg is None:
            return
        try:
            with warnings.catch_warnings(action="ignore"):  # initializing tensors without elements
                build(cfg)
        except ValueError as error:
            check_error(error)

    run(budget, check)


TEXTS = WORDS | st.sampled_from(
    ["nan", ".nan", "inf", "-1", "0", "1", "1e30", "1e-3", "10", "true", "[a,b]", "[1,2]", "{a: 1}"]
    + ["{a: nan}", "{a: [1]}", "1_000", "0x10", "'a'", "'", "9" * 30, "1.5", "${lr}", "${", "a=b"]
)


@pytest.mark.parametrize("recipe", ["pretrain", "finetune", "prepare_videos"])
@fuzz(40)
def test_every_command_line_is_understood_or_answered_in_one_line(recipe: str, budget: Any) -> None:
    config = RECIPES[recipe]
    needed = [f"{f.name}=x" for f in fields(config) if f.default == schema.MISSING]
    nested = [f"model.{f.name}" for f in fields(ModelSettings)]
    nested += [f"loss.{f.name}" for f in fields(LossSettings)] + ["model.x", "loss.weights.image"]
    keys = names(config) | st.sampled_from(nested if hasattr(config, "phase") else ["x", "seed.x"])
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        base = compose(recipe, as_typed(needed, config, GROUPS))

    @given(st.lists(st.tuples(st.sampled_from(["", "+", "++"]), keys, TEXTS), max_size=3))
    def check(arguments: list[tuple[str, str, str]]) -> None:
        typed = [f"{add}{key}={value}" for add, key, value in arguments]
        typed = [x for x in typed if x.lstrip("+").partition("=")[0] not in GROUPS]
        composed = base.copy()
        try:
            overrides = OverridesParser.create().parse_overrides(as_typed(typed, config, GROUPS))
            ConfigLoaderImpl._apply_overrides_to_config(overrides, composed)
            with open_dict(composed):
                composed.pop("hydra", None)
            cfg = settings(composed)
        except Exception as error:
            check_error(error)
        else:
            check_numbers(vars(cfg))

    run(budget, check)
