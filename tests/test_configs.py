"""The configurations: every file composes, and defaults stand once."""

from __future__ import annotations

import importlib
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from prelar_trl.config import METHODS, SIZES
from prelar_trl.recipes import schema
from prelar_trl.recipes.entry import settings

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
RECIPES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
SCHEMAS = {
    name: getattr(schema, "".join(part.title() for part in name.split("_")) + "Config")
    for name in RECIPES
}
GROUPS = {
    folder.name: sorted(path.stem for path in folder.glob("*.yaml"))
    for folder in CONFIGS.iterdir()
    if folder.is_dir() and list(folder.glob("*.yaml"))
}
# For what has no default.
GIVEN = {"data": "d", "run": "r", "env": "toy", "source": "s", "runs": "r", "out": "o"}


def composed(recipe, *overrides):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose(recipe, list(overrides))


@cache
def given(recipe):
    config = composed(recipe)
    return [f"{name}={GIVEN[name]}" for name in sorted(OmegaConf.missing_keys(config))]


def groups_of(recipe):
    defaults = OmegaConf.load(CONFIGS / f"{recipe}.yaml").defaults
    names = [str(key) for item in defaults if OmegaConf.is_dict(item) for key in item]
    return [name.removeprefix("optional ") for name in names if "/" not in name]


def fits(recipe, group, option):
    """An experiment says in its first comment which recipe it is for."""
    return group != "experiment" or f"# {recipe}.py:" in (
        CONFIGS / group / f"{option}.yaml"
    ).read_text(encoding="utf-8")


def options():
    return [
        (recipe, f"{group}={option}")
        for recipe in RECIPES
        for group in groups_of(recipe)
        for option in GROUPS[group]
        if fits(recipe, group, option)
    ]


schema.register()


@pytest.mark.parametrize(("recipe", "option"), options())
def test_every_option_of_every_group_composes(recipe, option):
    settings(composed(recipe, *given(recipe), option))


def test_every_group_and_experiment_belongs_to_a_recipe():
    assert set(GROUPS) == {group for recipe in RECIPES for group in groups_of(recipe)}
    tried = {option for _, option in options()}
    assert {f"experiment={name}" for name in GROUPS.get("experiment", [])} <= tried


@pytest.mark.parametrize("recipe", ["pretrain", "finetune"])
def test_every_method_and_size_is_taken_by_name(recipe):
    methods = [name for name, method in METHODS.items() if getattr(method, recipe) is not None]
    for name, choices in (("method", methods), ("size", SIZES)):
        for choice in choices:
            cfg = settings(composed(recipe, *given(recipe), f"{name}={choice}"))
            assert getattr(cfg, name) == choice


@pytest.mark.parametrize("recipe", RECIPES)
def test_defaults_are_those_of_the_dataclass(recipe):
    """A value in the file would be a second place for a default; only groups may set any."""
    arguments = [argument.split("=")[0] for argument in given(recipe)]
    cfg, defaults = settings(composed(recipe, *given(recipe))), SCHEMAS[recipe]()
    names = {f.name for f in fields(defaults)} - {*arguments, *groups_of(recipe)}
    assert {name: getattr(cfg, name) for name in names} == {
        name: getattr(defaults, name) for name in names
    }


@pytest.mark.parametrize("recipe", ["pretrain", "finetune"])
@pytest.mark.parametrize("mode", ["auto", "on", "off"])
def test_compile_takes_words_that_yaml_holds_for_booleans(recipe, mode):
    assert settings(composed(recipe, *given(recipe), f"compile={mode}")).compile == mode


def test_preparing_takes_lists_and_labels():
    lists = "lists={train: train.txt, heldout: validation.txt}"
    cfg = settings(composed("prepare_videos", *given("prepare_videos"), lists, "labels=[0, x]"))
    assert cfg.lists == {"train": "train.txt", "heldout": "validation.txt"}
    assert cfg.labels == [0, "x"]
    assert settings(composed("plot", "runs=[a,b]")).runs == ["a", "b"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_has_a_module_with_a_main_function(recipe):
    assert callable(importlib.import_module(f"prelar_trl.recipes.{recipe}").main)


@pytest.mark.parametrize("recipe", RECIPES)
def test_hydra_writes_nothing_itself(recipe):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose(recipe, return_hydra_config=True)
    assert config.hydra.output_subdir is None and config.hydra.run.dir == "."
    assert not {"handlers", "formatters"} & config.hydra.job_logging.keys()
    assert not config.hydra.job_logging.disable_existing_loggers


# ---------------------------------------------------------------------- paths, and plain values

PATHS = {
    "pretrain": ("data", "run"),
    "finetune": ("pretrained", "run"),
    "evaluate": ("run",),
    "probe": ("data", "run"),
    "collect_videos": ("data",),
    "prepare_videos": ("data", "export", "source"),
    "sweep": ("results", "root", "update_times"),
    "plot": ("out", "reference", "runs"),
    "export": ("out", "run"),
    "import_official": ("export", "official", "run"),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_home_folder_is_understood_in_every_path_and_nowhere_else(
    recipe, monkeypatch, tmp_path
):
    monkeypatch.setenv("HOME", str(tmp_path))
    texts = [
        field.name
        for field in fields(SCHEMAS[recipe])
        if get_type_hints(SCHEMAS[recipe])[field.name] in (str, str | None, Any)
    ]
    needed = {name: GIVEN[name] for name in GIVEN if name in texts}
    found = []
    for name in texts:
        try:
            cfg = SCHEMAS[recipe](**needed | {name: "~/a"})
        except ValueError:  # one of a few words
            continue
        if getattr(cfg, name) == str(tmp_path / "a"):
            found.append(name)
    assert tuple(sorted(found)) == PATHS[recipe]


def test_the_home_folder_is_understood_in_lists_and_mappings_but_not_in_addresses(
    monkeypatch, tmp_path
):
    monkeypatch.setenv("HOME", str(tmp_path))
    for given, expected in (
        (["~/a", "b"], [f"{tmp_path}/a", "b"]),
        ({"~/a": 1, "b": 2.5}, {f"{tmp_path}/a": 1, "b": 2.5}),
        ("hf://me/~model", "hf://me/~model"),
        ("~nobody-here/a", "~nobody-here/a"),
    ):
        assert schema.PretrainConfig(data=given, run="r").data == expected


def test_paths_tuples_and_numpys_numbers_become_plain_values():
    cfg = schema.PretrainConfig(
        data={Path("a"): np.float64(2)},
        run=Path("r"),
        seed=np.int64(1),
        logger=("csv", "tensorboard"),
        model={"depth": np.int64(8)},
    )
    assert (cfg.data, cfg.run, cfg.logger) == ({"a": 2.0}, "r", ["csv", "tensorboard"])
    for value in (cfg.seed, cfg.model["depth"]):
        assert type(value) is int


def test_a_run_needs_videos_to_learn_from():
    with pytest.raises(ValueError, match="data=None must be a folder, a list of them, or"):
        schema.PretrainConfig(data=None, run="r")
    assert schema.ProbeConfig(run="r").data is None
