"""Learning curves: works through the runs of ``suites.yaml``, and goes on where it was stopped.

    python benchmarks/campaign.py toy              two runs at a time, one thread each
    python benchmarks/campaign.py toy --status     what is finished, running, waiting, failed
    python benchmarks/campaign.py --report         tables and pictures anew

Everything runs from a clean copy of this repository at one commit, which lies in ``--root``:
changes that are not committed do not count, and a later commit only does with ``--update-code``.
Stopped in any way (Ctrl-C, SIGTERM, SIGKILL) and started again, it goes on with each run at its
last checkpoint; SIGSTOP to its process group pauses all of them. What is finished lies in
``--results``, one CSV and one JSON file a run beside the tables and pictures, and is never run
again, even where nothing else is left.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

REPOSITORY = Path(__file__).resolve().parents[1]
COPY = "source"  # the clean copy, in the campaign's root
BESIDE = ("recipes", "configs")  # lie beside the package in a checkout, and are parts of it


def parse_arguments() -> argparse.Namespace:
    parser = make_parser("campaign", __doc__.partition("\n")[0], results="curves")
    parser.add_argument("suites", nargs="*", metavar="SUITE", help="of suites.yaml")
    args = parse(parser)
    if not args.suites and not args.status and not args.report:
        parser.error("name a suite, for example toy")
    return args


def make_parser(name: str, summary: str, results: str) -> argparse.ArgumentParser:
    """What every program of this kind takes.

    Args:
        name: of the program, and of its folder of unfinished work.
        summary: one line.
        results: its folder below ``results``.
    """
    parser = argparse.ArgumentParser(prog=f"benchmarks/{name}.py", description=summary)
    parser.add_argument("--jobs", type=int, default=2, help="programs at a time; default 2")
    parser.add_argument("--only", default="", metavar="REGEX", help="runs whose name it matches")
    parser.add_argument("--status", action="store_true", help="show the state of all, run nothing")
    parser.add_argument("--report", action="store_true", help="only make tables and pictures anew")
    parser.add_argument(
        "--update-code", action="store_true", help="take the present commit for unfinished runs"
    )
    parser.add_argument("--root", type=Path, default=REPOSITORY / "runs" / name)
    parser.add_argument("--results", type=Path, default=REPOSITORY / "results" / results)
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line, with absolute places."""
    args = parser.parse_args()
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs} must be at least 1")
    args.root, args.results = args.root.resolve(), args.results.resolve()
    return args


def main() -> None:
    launch(parse_arguments(), "benchmarks.jobs")


def launch(args: argparse.Namespace, module: str) -> None:
    """Become the program ``module`` in the tree whose code counts, with the same command line."""
    tree = args.root / COPY
    if args.report or (args.status and not tree.is_dir()):
        tree = REPOSITORY
    elif not args.status:
        with lock_root(args.root):
            prepare_copy(tree, update=args.update_code)
    places = ["--root", str(args.root), "--results", str(args.results)]
    command = [sys.executable, "-P", "-m", module, *sys.argv[1:], *places]
    os.execve(sys.executable, command, os.environ | {"PYTHONPATH": str(tree)})


def prepare_copy(tree: Path, *, update: bool) -> None:
    """Make the clean copy of the present commit, unless there is one and no ``update``."""
    if not tree.is_dir():
        part = tree.with_name(f"{tree.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        git("clone", "--quiet", "--no-checkout", str(REPOSITORY), str(part))
        git("checkout", "--quiet", "--detach", git("rev-parse", "HEAD"), tree=part)
        with open(part / ".git" / "info" / "exclude", "a", encoding="utf-8") as exclude:
            exclude.writelines(f"/prelar_trl/{name}\n" for name in BESIDE)
        part.rename(tree)
    elif update:
        git("fetch", "--quiet", str(REPOSITORY), "HEAD", tree=tree)
        git("checkout", "--quiet", "--detach", "FETCH_HEAD", tree=tree)
    for name in BESIDE:  # so that an editable install elsewhere does not provide them
        link = tree / "prelar_trl" / name
        if not link.exists():
            link.symlink_to(Path("..") / name)
    copy, present = git("rev-parse", "HEAD", tree=tree), git("rev-parse", "HEAD")
    say(f"commit {copy[:12]}")
    if copy != present:
        say(f"the repository is at {present[:12]}: --update-code takes it for unfinished runs")
    if git("status", "--porcelain", "--untracked-files=no"):
        say("changes of the repository that are not committed do not count")


def git(*arguments: str, tree: Path = REPOSITORY) -> str:
    """What a git command says; the program ends with its error if it fails."""
    done = subprocess.run(["git", "-C", str(tree), *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"error: git {arguments[0]}: {done.stderr.strip()}")
    return done.stdout.strip()


def lock_root(root: Path) -> IO[str]:
    """An open file that keeps other campaigns off this root until it is closed."""
    root.mkdir(parents=True, exist_ok=True)
    file = open(root / "lock", "w", encoding="utf-8")
    for _ in range(20):  # what a killed campaign leaves ends at once, but not at the same time
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            time.sleep(0.1)
    sys.exit(f"error: another campaign is at work in {root}")


def locked(root: Path) -> bool:
    """Whether a campaign is at work."""
    if not (root / "lock").exists():
        return False
    with open(root / "lock", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


if __name__ == "__main__":
    main()
