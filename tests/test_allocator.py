"""The memory allocator of CPU training: chosen once, without loops, and only where it is there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from prelar_trl import allocator


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """A machine with tcmalloc; the programs that were started in place of this one."""
    started: list[tuple[str, list[str]]] = []
    for name in (*allocator.PRELOAD, allocator.CHOICE):
        monkeypatch.setenv(name, "")  # put back afterwards
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(allocator.ctypes.util, "find_library", lambda name: f"lib{name}.so.4")
    monkeypatch.setattr(allocator.os, "execv", lambda path, args: started.append((path, args)))
    return started


def test_the_program_starts_anew_once_with_the_same_arguments(
    installed: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["python", "-X", "dev", "recipes/pretrain.py", "seed=3"])
    monkeypatch.setattr(allocator, "keep_freed_memory", lambda: True)
    allocator.with_tcmalloc()
    expected = [sys.executable, "-X", "dev", "recipes/pretrain.py", "seed=3"]
    assert installed == [(sys.executable, expected)]
    assert allocator.os.environ["LD_PRELOAD"] == "libtcmalloc_minimal.so.4"
    allocator.with_tcmalloc()
    assert len(installed) == 1
    assert "LD_PRELOAD" not in allocator.os.environ  # the children choose for themselves


@pytest.mark.parametrize("reason", ["choice", "preloaded", "missing"])
def test_else_the_program_goes_on_with_its_allocator(
    reason: str, installed: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = []
    monkeypatch.setattr(allocator, "keep_freed_memory", lambda: kept.append(1))
    match reason:
        case "choice":
            monkeypatch.setenv("PRELAR_MALLOC", "system")
        case "preloaded":
            monkeypatch.setenv("LD_PRELOAD", "libjemalloc.so.2")
        case "missing":
            monkeypatch.setattr(allocator.ctypes.util, "find_library", lambda name: None)
    allocator.with_tcmalloc()
    assert not installed and kept == [1]


FAULTS = """
import resource, sys
from prelar_trl.allocator import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
    print("unsupported"); sys.exit()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
b"x" * (84 << 20)
before = faults()
for size in range(80, 40, -4):
    b"x" * (size << 20)
print(faults() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the settings are glibc's")
def test_kept_memory_is_not_asked_of_the_kernel_again() -> None:
    def faults(mode: str) -> str:
        command = [sys.executable, "-c", FAULTS, mode]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()

    kept = faults("keep")
    if kept == "unsupported":
        pytest.skip("this C library takes no such settings")
    assert int(kept) < 0.5 * int(faults("default"))


def test_under_tcmalloc_a_program_needs_no_settings() -> None:
    environment = {"PATH": "/usr/bin:/bin"} | allocator_of_this_machine()
    code = "from prelar_trl.allocator import keep_freed_memory as k; print(k())"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert done.returncode == 0 and done.stdout.strip() == "False"


def allocator_of_this_machine() -> dict[str, str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PRELAR_MALLOC", raising=False)
        patch.delenv("LD_PRELOAD", raising=False)
        environment = allocator.tcmalloc_environment()
    if not environment:
        pytest.skip("tcmalloc is not installed here: apt-get install libtcmalloc-minimal4")
    return environment


def test_a_recipe_that_was_started_anew_still_ends_with_one_line(tmp_path: Path) -> None:
    environment = os.environ | {"PRELAR_MALLOC": ""}
    if not allocator_of_this_machine():
        pytest.skip("tcmalloc is not installed here")
    command = [sys.executable, "-m", "prelar_trl.recipes.pretrain", "device=cpu", "size=tiny"]
    command += [f"data={tmp_path / 'none'}", f"run={tmp_path / 'run'}"]
    done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True)
    assert done.returncode and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
