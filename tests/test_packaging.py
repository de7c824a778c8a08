"""The wheel works away from the checkout: library, recipes and configs are inside."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Folder in the checkout -> folder in the wheel.
FOLDERS = {"prelar_trl": "prelar_trl", "recipes": "prelar_trl/recipes"}
FOLDERS["configs"] = "prelar_trl/configs"
RECIPES = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))


def run(*command, cwd):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel, built from a copy so that no build folder of the checkout gets into it."""
    copy = tmp_path_factory.mktemp("source")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    run(*pip, "--no-index", "--wheel-dir", copy / "wheels", copy, cwd=copy)
    (path,) = (copy / "wheels").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def clean(wheel, tmp_path_factory):
    """The ``bin`` folder of a venv with the wheel; other packages come from this one.

    A path line in a .pth file adds a folder without running the .pth files in it, so that an
    editable install there does not count.
    """
    folder = tmp_path_factory.mktemp("clean") / "venv"
    venv.create(folder, symlinks=True)
    scripts = folder / "bin"
    pip = [sys.executable, "-m", "pip", "--python", scripts / "python", "install", "--quiet"]
    run(*pip, "--no-deps", "--no-index", "--no-compile", wheel, cwd=folder)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "parent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return scripts


def test_every_module_and_config_of_the_checkout_is_in_the_wheel(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    for source, target in FOLDERS.items():
        for file in (ROOT / source).rglob("*"):
            if file.suffix in (".py", ".yaml") or file.name == "py.typed" or file.suffix == ".j2":
                assert f"{target}/{file.relative_to(ROOT / source).as_posix()}" in inside
    assert not [name for name in inside if name.startswith(("recipes/", "configs/", "tests/"))]


def test_every_recipe_is_a_console_script():
    metadata = configparser.ConfigParser()
    metadata.read(ROOT / "setup.cfg")
    lines = metadata["options.entry_points"]["console_scripts"].split("\n")
    scripts = dict(line.split(" = ") for line in lines if line)
    expected = {
        f"prelar-{name.replace('_', '-')}": "prelar_trl.recipes.entry:main" for name in RECIPES
    }
    assert scripts == expected


def test_library_is_imported_from_the_wheel(clean, tmp_path):
    code = (
        "import prelar_trl, prelar_trl.recipes as r; print(prelar_trl.__file__); print(r.__file__)"
    )
    for path in run(clean / "python", "-c", code, cwd=tmp_path).split():
        assert path.startswith(str(clean.parent))


def test_installed_recipe_shows_its_config_from_another_folder(clean, tmp_path):
    out = run(clean / "prelar-pretrain", "--cfg", "job", "size=tiny", "run=elsewhere", cwd=tmp_path)
    assert {"size: tiny", "run: elsewhere", "method: prelar"} <= set(out.splitlines())
    assert not list(tmp_path.iterdir())
