"""Settings of all tests, and what many of them need."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ.setdefault("MUJOCO_GL", "egl")
os.environ["PRELAR_MALLOC"] = "system"  # a recipe would restart the test program

# What takes seconds to import is imported below: pytest-xdist's own process needs none of it.


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_the_disk() -> Iterator[None]:
    """Processes are killed in the tests, but no power is lost."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of five toy episodes of nine frames, for reading only."""
    from tests.toy_runs import make_clips

    return make_clips(tmp_path_factory.mktemp("stores") / "clips")


@pytest.fixture
def fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Runs a recipe that must fail; returns its one line on stderr."""
    from prelar_trl.recipes.entry import start

    def run(recipe: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["recipe", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            start(recipe)
        line = stop.value.code  # what Python prints on stderr, with exit status 1
        assert isinstance(line, str) and line.startswith("error: ") and "\n" not in line
        said = capsys.readouterr()
        assert said.out == "" and "Traceback" not in said.err and "Error exec" not in said.err
        return line.removeprefix("error: ")

    return run
