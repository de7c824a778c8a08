"""Names in a sweep (``--multirun``): taken as typed, or it is said how to write them."""

from __future__ import annotations

import pytest

from prelar_trl.recipes.command_line import as_typed
from prelar_trl.recipes.entry import CONFIGS
from prelar_trl.recipes.schema import FinetuneConfig

GROUPS = [folder.name for folder in CONFIGS.iterdir() if folder.is_dir()]


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
