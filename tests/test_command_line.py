"""Names on the command line are taken as they are typed, whatever Hydra's grammar says."""

from __future__ import annotations

import sys

import pytest
from hydra import compose, initialize_config_dir

from prelar_trl.recipes.command_line import HINTS, as_typed
from prelar_trl.recipes.entry import CONFIGS, start
from prelar_trl.recipes.schema import (
    FinetuneConfig,
    ImportOfficialConfig,
    PlotConfig,
    PrepareVideosConfig,
    PretrainConfig,
)
from tests.videos import encode, ramp

GROUPS = [folder.name for folder in CONFIGS.iterdir() if folder.is_dir()]
NAMES = [
    "2024_05_01", "1e3", "视频", "3", "007", "Videos (1)", "a,b", "[hd]", "{x}", "true", "inf",
    "it's", 'a"b', "a=b", "a:b", "back\\slash", "end\\", " lead", "trail ", "#1", "a;b", "~x", "+1",
    "50%", "what?", "100 $", "\t", "a\nb", "données", "'", '"', "name'", "a'b\\'", "0x10", ".5",
]  # fmt: skip
RECIPES = {
    "prepare_videos": (PrepareVideosConfig, ("source", "data", "export")),
    "pretrain": (PretrainConfig, ("data", "run")),
    "finetune": (FinetuneConfig, ("pretrained", "run")),
    "import_official": (ImportOfficialConfig, ("official", "run", "export")),
    "plot": (PlotConfig, ("out", "runs", "title")),
}


def read(name: str, *arguments: str):
    """What the recipe is given for these arguments."""
    typed = as_typed(arguments, RECIPES[name][0], GROUPS)
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose(name, typed)


@pytest.mark.parametrize("name", RECIPES)
def test_a_name_is_taken_as_it_is_typed(name: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    keys = RECIPES[name][1]
    for first in range(0, len(NAMES), len(keys)):  # each key gets the next name
        given = {
            key: typed
            for key, typed in zip(keys, NAMES[first:], strict=False)
            if typed[0] not in "[{" or key not in ("data", "runs")
        }
        config = read(name, *(f"{key}={typed}" for key, typed in given.items()))
        assert {key: config[key] for key in given} == given


def test_names_that_look_like_values_depend_on_what_is_needed(tmp_path, monkeypatch) -> None:
    config = read("finetune", "run=null", "pretrained=null", "env=toy")
    assert config.run == "null" and config.pretrained is None
    assert read("pretrain", "data=null").data == "null"
    monkeypatch.chdir(tmp_path)
    assert read("pretrain", "data=[hd]").data == ["hd"]
    (tmp_path / "[hd]").mkdir()  # now there is such a folder
    assert read("pretrain", "data=[hd]").data == "[hd]"


@pytest.mark.parametrize(
    ("recipe", "argument", "expected"),
    [
        ("pretrain", "data='2024_05_01'", "2024_05_01"),
        ("pretrain", 'data="Videos (1)"', "Videos (1)"),
        ("pretrain", "data=[a,b]", ["a", "b"]),
        ("pretrain", "data={a: 1, b: 3}", {"a": 1, "b": 3}),
        ("plot", "runs=['2024_05_01',b]", ["2024_05_01", "b"]),
        ("finetune", "run=${oc.env:NAME}/a (1)", "here/a (1)"),
        ("finetune", "lr=1e-3", 1e-3),
        # as the messages recommend
        ("pretrain", HINTS["["].format("data"), ["2024_05_01", "Videos (1)"]),
        ("pretrain", HINTS["{"].format("data"), {"./2024_05_01": 3, "Videos (1)": 1}),
    ],
)
def test_quotes_lists_and_mappings_stay_what_they_were(recipe, argument, expected, monkeypatch):
    monkeypatch.setenv("NAME", "here")
    if "e.g. " in argument:
        argument = argument.split("e.g. ")[1].replace("'", "")
    assert read(recipe, argument)[argument.partition("=")[0]] == expected


def test_what_is_no_name_is_left_alone() -> None:
    sweep = ["-m", "run=a,b", "seed=1,2"]
    assert as_typed(sweep, FinetuneConfig, GROUPS) == sweep
    untouched = [
        "run=runs/a",
        "hydra.run.dir=a,b",
        "~env",
        "--cfg",
        "job",
        "+x=[1",
        "model.depth=4",
    ]
    assert as_typed(untouched, FinetuneConfig, GROUPS) == untouched


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("data=[2024_05_01,b]", ["20240501 in it is no text", """data='["2024_05_01","""]),
        ("data=[视频]", ["data=[视频] cannot be read", "in quotes"]),
        ("data=[Videos (1)]", ["cannot be read", "in quotes"]),
        ("data={2024_05_01: 3}", ["20240501 in it is no text", "./2024_05_01: 3"]),
        ("data=", ["data= is empty", "data=<value>"]),
        ("run=", ["run= is empty"]),
    ],
)
def test_what_cannot_be_a_name_says_how_to_write_it(argument: str, parts: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        as_typed([argument], PretrainConfig, GROUPS)
    assert all(part in str(error.value) for part in parts)


def test_the_recipe_reads_and_writes_folders_of_such_names(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("2024_05_01", "Videos (1)", "a,b", "~x"):
        encode(tmp_path / name / "a.mp4", ramp(3))
        arguments = [f"source={name}", f"data=out/{name}", "workers=1"]
        monkeypatch.setattr(sys, "argv", ["prepare_videos.py", *arguments])
        start("prepare_videos")
        assert (tmp_path / "out" / name / "store.json").is_file()
    capsys.readouterr()


# In a sweep (``--multirun``)


@pytest.mark.parametrize(
    ("argument", "handed_on"),
    [
        ("run=2024_05_01", "run='2024_05_01'"),
        ("run=Videos (1)", "run='Videos (1)'"),
        ("run=a,b", "run=a,b"),
        ("run=1,2", "run=1,2"),  # 1 becomes "1" again
        ('run="2024_05_01",b', 'run="2024_05_01",b'),
        ("pretrained=null,a", "pretrained=null,a"),
        ("precision=32,bf16", "precision=32,bf16"),
        ("run=choice(a,b)", "run=choice(a,b)"),
        ("seed=1,2", "seed=1,2"),
    ],
)
def test_one_name_is_as_typed_and_several_are_a_sweep(argument: str, handed_on: str) -> None:
    assert as_typed(["-m", argument], FinetuneConfig, GROUPS) == ["-m", handed_on]


@pytest.mark.parametrize("value", ["2024_05_01,b", "1e3,b", "Videos (1),b"])
def test_names_that_hydra_would_change_say_how_to_write_them(value: str) -> None:
    with pytest.raises(ValueError, match='in quotes, e.g. run=\'"2024_05_01","Videos'):
        as_typed(["--multirun", f"run={value}"], FinetuneConfig, GROUPS)
