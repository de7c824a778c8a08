"""A recipe answers before it imports what takes seconds, and restarts before that, too."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.toy_runs import ROOT

RECIPES = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
# Runs the recipes named in the first argument as scripts, one after the other, with the others.
SCRIPT = """
import runpy, sys
names, arguments = sys.argv[1].split(","), sys.argv[2:]
for name in names:
    sys.argv = [name, *arguments]
    try:
        runpy.run_path(f"recipes/{name}.py", run_name="__main__")
    except SystemExit as stop:
        print("ended:", stop.code)
heavy = "torch tensordict torchrl numpy scipy matplotlib mujoco gymnasium av PIL jinja2".split()
print("imported:", *[name for name in heavy if name in sys.modules])
"""
# tcmalloc as if it were there; instead of starting anew the program says what it has imported.
RESTART = """
import os, sys
from prelar_trl import allocator
allocator.ctypes.util.find_library = lambda name: "libtcmalloc_minimal.so.4"
def execv(*_):
    print("started anew")
    raise SystemExit
os.execv = execv
"""


def run(code: str, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job"], ["nonsense=1"]])
def test_an_answer_imports_nothing_heavy(arguments: list[str]) -> None:
    said = run(SCRIPT, ",".join(RECIPES), *arguments)
    assert said.endswith("imported:\n")
    assert said.count("ended:") == len(RECIPES)
    assert said.count("error: ") == (len(RECIPES) if arguments == ["nonsense=1"] else 0)


def test_training_starts_without_what_draws_and_counts_at_its_end() -> None:
    imports = "import sys, prelar_trl.recipes.pretrain, prelar_trl.recipes.finetune"
    imported = "{'matplotlib', 'scipy.stats'} & set(sys.modules)"
    assert run(f"{imports}; print(*{imported})") == "\n"


def test_a_value_out_of_bounds_imports_nothing_heavy() -> None:
    said = run(SCRIPT, "pretrain", "data=d", "run=r", "model.depth=0")
    assert said == "ended: error: model.depth=0 must be at least 1\nimported:\n"


@pytest.mark.skipif(sys.platform != "linux", reason="tcmalloc is chosen on Linux only")
def test_the_restart_under_tcmalloc_comes_before_the_imports() -> None:
    arguments = ["data=d", "run=r", "device=cpu"]
    choice = {"PRELAR_MALLOC": "", "LD_PRELOAD": ""}
    said = run(RESTART + SCRIPT, "pretrain", *arguments, **choice)
    assert said == "started anew\nended: None\nimported:\n"
