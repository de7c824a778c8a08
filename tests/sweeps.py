"""Sweeps of this code in a repository of their own, as whole programs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from prelar_trl.recipes.command_line import as_typed
from prelar_trl.recipes.entry import start
from prelar_trl.recipes.schema import SweepConfig
from prelar_trl.sweep.launchers import Program
from tests.toy_runs import ROOT, configured


def sweep_config(*given: str, repository: Path = ROOT) -> SweepConfig:
    """Of a sweep's command line."""
    typed = as_typed(given, SweepConfig, ["experiment"])
    return configured("sweep", *typed, configs=repository / "configs")


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def make_repository(folder: Path, table: str, content: Mapping[str, Any] | str) -> Path:
    """This code with a table of runs in place of the file ``table``, committed."""
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("prelar_trl", "recipes", "configs", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore, symlinks=True)
    # So that these are the configurations, whatever is installed.
    (folder / "prelar_trl" / "configs").symlink_to(Path("..") / "configs")
    (folder / ".gitignore").write_text("runs/\n__pycache__/\n/prelar_trl/configs\n")
    text = content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False)
    (folder / table).write_text(text)
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "-m", "trial")
    return folder


def environment(repository: Path) -> dict[str, str]:
    """Where its code comes first."""
    return os.environ | {"PYTHONPATH": str(repository)}


def command(repository: Path, program: str, *arguments: str) -> list[str]:
    return [sys.executable, str(repository / program), *arguments]


def run(repository: Path, program: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(repository, program, *arguments),
        cwd=repository,
        env=environment(repository),
        capture_output=True,
        text=True,
        timeout=400,
    )


def run_programs_here(patch: pytest.MonkeyPatch) -> None:
    """The programs of a sweep run in this process, which has imported everything, one by one."""

    def call(program: Program, lock: Any = None) -> SimpleNamespace:
        module, *arguments = program.command[program.command.index("-m") + 1 :]
        more = ["resume=false"] if program.resumes else []
        program.log.parent.mkdir(parents=True, exist_ok=True)
        with open(program.log, "w") as log, pytest.MonkeyPatch.context() as here:
            here.setattr(sys, "argv", [module, *arguments, *more])
            here.chdir(program.root)
            with redirect_stdout(log), redirect_stderr(log):
                start(module.rpartition(".")[2])
        return SimpleNamespace(poll=lambda: 0)

    patch.setattr(Program, "start", call)


def wait_for(condition: Callable[[], Any], seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def row(output: str, name: str) -> str:
    (line,) = [line for line in output.splitlines() if line.startswith(name)]
    return line
