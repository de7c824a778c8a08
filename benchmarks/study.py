"""What do the losses on latent actions teach? Pre-trains the variants of ``study.yaml``, probes.

    python benchmarks/study.py                     everything, two runs at a time; goes on
    python benchmarks/study.py toy --only 'toy/.*/(soft|prelar_plus)-'
    python benchmarks/study.py --status            what is finished, running, waiting, failed
    python benchmarks/study.py --report            tables and pictures anew
    python benchmarks/study.py --updates 5 --seeds 1 --root runs/try --results runs/try/results

Works like ``benchmarks/campaign.py``: from a clean copy of the present commit, stopped in any way
and started again it goes on, and what is finished is never run again. What a run gives is one file,
``runs/<data set>/<variant>-<seed>.json`` in ``--results``. All else there is made from those:
``table.csv`` (the experts' videos) and ``toy.csv``, ``runs.csv`` (one line a run), ``table.md``
(with the goals), ``experts.png`` and ``toy.png``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # started as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.campaign import launch, make_parser, parse  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    parser = make_parser("study", __doc__.partition("\n")[0], results="study")
    parser.add_argument("data", nargs="*", metavar="DATA", help="experts, toy; default: both")
    parser.add_argument("--updates", type=int, help="of pre-training; default: as in study.yaml")
    parser.add_argument("--seeds", type=int, help="default: as in study.yaml")
    args = parse(parser)
    for name in ("updates", "seeds"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)} must be at least 1")
    return args


if __name__ == "__main__":
    launch(parse_arguments(), "benchmarks.study_jobs")
