"""Names on the command line are taken as they are typed, whatever Hydra's grammar says."""

from __future__ import annotations

import sys

import pytest
from hydra import compose, initialize_config_dir

from prelar_trl.recipes import plot as plot_recipe
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
    for typed in NAMES:
        keys = [k for k in RECIPES[name][1] if typed[0] not in "[{" or k not in ("data", "runs")]
        config = read(name, *(f"{key}={typed}" for key in keys))
        assert {key: config[key] for key in keys} == dict.fromkeys(keys, typed)


def test_null_is_a_name_where_something_must_be_given_and_nothing_elsewhere() -> None:
    config = read("finetune", "run=null", "pretrained=null", "env=toy")
    assert config.run == "null" and config.pretrained is None
    assert read("pretrain", "data=null").data == "null"


def test_quotes_lists_mappings_and_interpolations_stay_what_they_were() -> None:
    assert read("pretrain", "data='2024_05_01'").data == "2024_05_01"
    assert read("pretrain", 'data="Videos (1)"').data == "Videos (1)"
    assert read("pretrain", "data=[a,b]").data == ["a", "b"]
    assert read("pretrain", "data={a: 1, b: 3}").data == {"a": 1, "b": 3}
    assert read("plot", "runs=['2024_05_01',b]").runs == ["2024_05_01", "b"]
    config = read("finetune", "run=${oc.env:HOME}/a (1)", "env=toy")
    assert config.run.endswith("/a (1)") and "$" not in config.run
    assert read("finetune", "lr=1e-3", "size=tiny", "run=r").lr == 1e-3
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


def test_a_list_like_name_is_a_name_if_there_is_such_a_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert read("pretrain", "data=[hd]").data == ["hd"]
    (tmp_path / "[hd]").mkdir()
    assert read("pretrain", "data=[hd]").data == "[hd]"


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


def test_the_ways_of_writing_that_are_recommended_work() -> None:
    in_list = HINTS["["].format("data").split("e.g. ")[1].replace("'", "")
    assert read("pretrain", in_list).data == ["2024_05_01", "Videos (1)"]
    in_mapping = HINTS["{"].format("data").split("e.g. ")[1].replace("'", "")
    assert read("pretrain", in_mapping).data == {"./2024_05_01": 3, "Videos (1)": 1}


def test_the_recipe_reads_and_writes_folders_of_such_names(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("2024_05_01", "Videos (1)", "a,b", "~x"):
        encode(tmp_path / name / "a.mp4", ramp(3))
        arguments = [f"source={name}", f"data=out/{name}", "workers=1"]
        monkeypatch.setattr(sys, "argv", ["prepare_videos.py", *arguments])
        start("prepare_videos")
        assert (tmp_path / "out" / name / "store.json").is_file()
    capsys.readouterr()


def test_the_entry_point_hands_names_on_as_typed(monkeypatch) -> None:
    given = []
    monkeypatch.setattr(sys, "argv", ["plot.py", "runs=2024_05_01", "out=a,b.html"])
    monkeypatch.setattr(plot_recipe, "main", given.append)
    start("plot")
    assert (given[0].runs, given[0].out) == ("2024_05_01", "a,b.html")
