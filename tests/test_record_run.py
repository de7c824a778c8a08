"""Run folders: what they note, and what they refuse."""

from __future__ import annotations

import subprocess

import pytest

from prelar_trl.record import RunFolder, check_space
from prelar_trl.record.run import git_state


def test_run_folder_is_read_back_with_its_config_and_versions(tmp_path):
    config = {"method": "prelar", "lr": 1e-5, "seed": 7, "model": {"stoch": 32, "free": None}}
    started = RunFolder.create(tmp_path / "a" / "run", config).versions["started"]
    run = RunFolder.load(tmp_path / "a" / "run")
    assert run.config == config
    assert run.versions["seed"] == 7 and run.versions["command"]
    assert run.versions["packages"]["torch"].startswith("2.")
    assert run.checkpoints.is_dir() and run.videos.is_dir() and run.pictures.is_dir()
    run.note_continuation(step=40)
    assert run.versions["started"] == started
    assert [session["step"] for session in run.versions["continued"]] == [40]


def test_a_second_run_or_other_files_are_refused_and_kept(tmp_path):
    RunFolder.create(tmp_path / "run", {"seed": 1})
    with pytest.raises(FileExistsError, match="already holds a run: choose another"):
        RunFolder.create(tmp_path / "run", {"seed": 2})
    assert RunFolder.load(tmp_path / "run").config == {"seed": 1}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="something else"):
        RunFolder.create(tmp_path / "other", {})
    assert [file.name for file in (tmp_path / "other").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("below", ["", "run", "deep/run"])
def test_a_file_in_the_way_is_named(tmp_path, below):
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError, match="file is a file; choose another path"):
        RunFolder.create(tmp_path / "file" / below, {})


def test_a_link_to_nothing_in_the_way_is_named(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(NotADirectoryError, match="link is a link to nothing; choose another path"):
        RunFolder.create(tmp_path / "link", {})


def test_a_place_that_cannot_be_written_is_one_line():
    with pytest.raises(OSError, match="cannot be written .* choose another folder") as error:
        RunFolder.create("/proc/run", {}, need_bytes=0)
    assert "\n" not in str(error.value)


def test_too_little_space_says_what_is_needed_and_there(tmp_path):
    with pytest.raises(OSError, match=r"need 1099511627776 MiB, have \d+ MiB"):
        RunFolder.create(tmp_path / "run", {}, need_bytes=2**60)
    assert not (tmp_path / "run").exists()
    check_space(tmp_path / "not" / "there" / "yet", 1)


def test_a_config_that_yaml_cannot_hold_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="not plain"):
        RunFolder.create(tmp_path / "run", {"device": object()})
    assert not (tmp_path / "run").exists()


def test_a_restarted_run_has_nothing_left_of_any_process(tmp_path):
    run = RunFolder.create(tmp_path / "run", {"seed": 1})
    for folder in ("replay", "replay-1", "checkpoints"):
        (run.path / folder).mkdir(exist_ok=True)
        (run.path / folder / "x").write_text("old")
    for file in ("metrics.csv", "not_finite-1.pt", "slurm.log"):
        (run.path / file).write_text("old")
    run.restart({"seed": 2})
    assert {path.name for path in run.path.iterdir() if path.suffix != ".lock"} == {
        *("checkpoints", "videos", "pictures", "config.yaml", "versions.json", "slurm.log")
    }
    assert not list(run.checkpoints.iterdir())
    assert RunFolder.load(run.path).config == {"seed": 2}


def test_loading_what_is_no_run_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        RunFolder.load(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="has no config.yaml"):
        RunFolder.load(tmp_path)


def test_git_state_tells_clean_dirty_and_untracked(tmp_path):
    def git(*args):
        identity = ["-c", "user.name=x", "-c", "user.email=x@y.z"]
        subprocess.run(["git", "-C", tmp_path, *identity, *args], check=True, capture_output=True)

    source = tmp_path / "code.py"
    source.write_text("a = 1\n")
    git("init", "-q")
    git("add", "code.py")
    git("commit", "-q", "-m", "first")
    (tmp_path / ".gitignore").write_text("installed.py\n")
    git("add", ".gitignore")
    git("commit", "-q", "-m", "second")
    (tmp_path / "installed.py").write_text("b = 1\n")
    assert git_state(tmp_path / "installed.py") is None  # in the checkout, not part of it
    state = git_state(source)
    assert len(state["commit"]) == 40 and state["dirty"] is False
    source.write_text("a = 2\n")
    assert git_state(source) == {"commit": state["commit"], "dirty": True}
