"""What do the losses on latent actions teach? Pre-trains the variants of ``study.yaml``, probes.

    python benchmarks/study.py                     everything, two runs at a time; goes on
    python benchmarks/study.py toy --only 'toy/.*/(soft|prelar_plus)-'
    python benchmarks/study.py --status            what is finished, running, waiting, failed
    python benchmarks/study.py --report            tables and pictures anew
    python benchmarks/study.py --updates 5 --seeds 1 --root runs/try --results runs/try/results

Works like ``recipes/sweep.py``: from a clean copy of the present commit, stopped in any way
and started again it goes on, and what is finished is never run again. What a run gives is one file,
``runs/<data set>/<variant>-<seed>.json`` in ``--results``. All else there is made from those:
``table.csv`` (the experts' videos) and ``toy.csv``, ``runs.csv`` (one line a run), ``table.md``
(with the goals), ``experts.png`` and ``toy.png``.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

if not __package__:  # started as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.study_jobs import TABLE, ProbeResults, expand, load_study  # noqa: E402
from benchmarks.study_report import write_report  # noqa: E402
from prelar_trl.recipes.sweep import command, say  # noqa: E402
from prelar_trl.sweep import Engine, LocalLauncher, lock_root, locked, prepare_source  # noqa: E402

REPOSITORY = Path(__file__).resolve().parents[1]


def parse_arguments() -> argparse.Namespace:
    summary = str(__doc__).partition("\n")[0]
    parser = argparse.ArgumentParser(prog="benchmarks/study.py", description=summary)
    parser.add_argument("data", nargs="*", metavar="DATA", help="experts, toy; default: both")
    parser.add_argument("--updates", type=int, help="of pre-training; default: as in study.yaml")
    parser.add_argument("--seeds", type=int, help="default: as in study.yaml")
    parser.add_argument("--jobs", type=int, default=2, help="programs at a time; default 2")
    parser.add_argument("--only", default="", metavar="REGEX", help="runs whose name it matches")
    parser.add_argument("--status", action="store_true", help="show the state of all, run nothing")
    parser.add_argument("--report", action="store_true", help="only make tables and pictures anew")
    parser.add_argument(
        "--update-code", action="store_true", help="take the present commit for unfinished runs"
    )
    parser.add_argument("--root", type=Path, default=REPOSITORY / "runs" / "study")
    parser.add_argument("--results", type=Path, default=REPOSITORY / "results" / "study")
    args = parser.parse_args()
    for name in ("updates", "seeds", "jobs"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)} must be at least 1")
    args.root, args.results = args.root.resolve(), args.results.resolve()
    return args


def main() -> int:
    """Do what the command line asks for; returns how many jobs failed or were stopped."""
    args, study = parse_arguments(), load_study()
    unknown = [name for name in args.data if name not in study.data]
    if unknown:
        choices = ", ".join(study.data)
        raise ValueError(f"no data set {unknown[0]!r} in {TABLE.name}; choose {choices}")
    if args.report:
        write_report(args.results, list(study.variants))
        return 0
    changed = {"updates": args.updates} if args.updates else {}
    jobs = expand(study, data=args.data, seeds=args.seeds, **changed)
    chosen = [job for job in jobs if not job.run or re.search(args.only, job.path)]
    if not any(job.run for job in chosen):
        raise ValueError(f"--only {args.only!r} matches none of the {len(jobs)} jobs")
    engine = Engine(
        args.root,
        ProbeResults(args.results),
        chosen,
        command,
        manifest=args.root / "manifest.json",
        runtime={"device": "cpu", "threads": 1},
        say=say,
    )
    if args.status:
        print(engine.table(alive=locked(args.root)))
        return 0
    with lock_root(args.root) as lock:
        engine.source = prepare_source(args.root, copy=None, update=args.update_code, say=say)
        undone = engine.work(LocalLauncher(lock), args.jobs)
        write_report(args.results, list(study.variants))
    print(engine.table(alive=False))
    return undone


if __name__ == "__main__":
    try:
        sys.exit(main() > 0)
    except (ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")
