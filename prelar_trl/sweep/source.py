"""The code that a sweep runs, and the lock on its folder."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

import prelar_trl
from prelar_trl.utils import git_state

COPY = "source"  # the clean copy, in the root
BESIDE = ("recipes", "configs")  # lie beside the package in a checkout, and are parts of it


class Source(NamedTuple):
    """The code of the programs: ``commit`` names it, ``path`` goes before what is installed."""

    commit: str
    path: Path | None = None


def prepare_source(
    root: Path, *, copy: bool | None, update: bool, say: Callable[[str], None]
) -> Source:
    """The code to run: a clean copy of the checkout's present commit, or what is installed.

    A copy that is there already stays as it is without ``update``, so that all runs of a sweep are
    of one commit; changes that are not committed never get into it.

    Args:
        root: the sweep's folder; the copy lies in ``source`` there.
        copy: make one. Default (None): where this package is part of a git checkout.
        update: take the present commit.
        say: gets lines for the user.

    Raises:
        RuntimeError: git fails, or ``copy`` without a checkout.
    """
    present = git_state()
    if present is None and copy:
        raise RuntimeError("copy=true: this package is no part of a git checkout; use copy=false")
    if present is None:
        return Source(f"prelar_trl {prelar_trl.__version__}")
    if copy is False:
        return Source(present["commit"] + ("-dirty" if present["dirty"] else ""))
    repository, tree = Path(prelar_trl.__file__).resolve().parents[1], root / COPY
    if not tree.is_dir():
        part = tree.with_name(f"{tree.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        git(root, "clone", "--quiet", "--no-checkout", str(repository), str(part))
        git(part, "checkout", "--quiet", "--detach", present["commit"])
        with open(part / ".git" / "info" / "exclude", "a", encoding="utf-8") as exclude:
            exclude.writelines(f"/prelar_trl/{name}\n" for name in BESIDE)
        part.rename(tree)
    elif update:
        git(tree, "fetch", "--quiet", str(repository), "HEAD")
        git(tree, "checkout", "--quiet", "--detach", "FETCH_HEAD")
    for name in BESIDE:  # so that an editable install elsewhere does not provide them
        link = tree / "prelar_trl" / name
        if not link.exists():
            link.symlink_to(Path("..") / name)
    commit = git(tree, "rev-parse", "HEAD")
    if git(tree, "status", "--porcelain"):
        raise RuntimeError(f"{tree} is no clean copy any more: remove it")
    say(f"commit {commit[:12]}")
    if commit != present["commit"]:
        say(
            f"the repository is at {present['commit'][:12]}: update_code=true takes it for "
            "unfinished runs"
        )
    if git(repository, "status", "--porcelain", "--untracked-files=no"):
        say("changes of the repository that are not committed do not count")
    return Source(commit, tree)


def git(folder: Path, *arguments: str) -> str:
    """What a git command says; a RuntimeError with its error in one line if it fails."""
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"git {arguments[0]}: {' '.join(done.stderr.split())}")
    return done.stdout.strip()


@contextmanager
def lock_root(root: Path) -> Iterator[IO[str]]:
    """An open file that keeps other sweeps off this root until it is closed.

    Raises:
        RuntimeError: another one is at work.
    """
    root.mkdir(parents=True, exist_ok=True)
    with open(root / "lock", "w", encoding="utf-8") as file:
        for _ in range(20):  # what a killed sweep leaves ends at once, but not at the same time
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.1)
        else:
            raise RuntimeError(f"another sweep is at work in {root}")
        yield file


def locked(root: str | os.PathLike[str]) -> bool:
    """Whether a sweep is at work."""
    path = Path(root) / "lock"
    if not path.exists():
        return False
    with open(path, encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
