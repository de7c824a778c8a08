"""The README is true: its code runs, its commands, settings and links exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from prelar_trl.config import METHODS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_python_block_runs(
    block: str, capsys: pytest.CaptureFixture[str], monkeypatch, tmp_path
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})  # noqa: S102
    assert capsys.readouterr().out


def test_own_encoder_example_is_there() -> None:
    assert any("MyEncoder" in block for block in BLOCKS)


def test_every_recipe_named_exists_and_every_recipe_is_named() -> None:
    named = set(re.findall(r"recipes/(\w+)\.py", README))
    recipes = {path.stem for path in (ROOT / "configs").glob("*.yaml")}
    assert named == recipes | {"schema", "environments"}


def test_every_method_is_explained() -> None:
    for method in METHODS:
        assert f"`{method}`" in README


def test_every_link_and_picture_exists() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
