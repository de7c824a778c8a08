"""Build an HTML report and curve pictures from run folders, or compare groups of runs.

python recipes/plot.py runs=[runs/pretrain,runs/finetune] out=report.html
python recipes/plot.py runs=runs/sweep/mine compare=method out=curves.html
python recipes/plot.py runs=results/curves/toy/runs compare=variant out=curves.html
python recipes/plot.py runs=runs/paper compare=method out=curves.html \\
    reference=apv_metaworld_v2.csv reference_name="Meta-world v2, Seo et al."

A comparison shows, for each task and over all, success and return against environment steps with
95% bootstrap intervals, performance profiles, probabilities of improvement and a table; every
picture lies as png and svg, and all numbers as CSV, in ``<out>_curves/``.
"""

from __future__ import annotations

import sys

from prelar_trl.recipes.entry import start

if __name__ == "__main__":  # before the imports that take seconds
    sys.exit(start("plot"))

from pathlib import Path

from prelar_trl.recipes.schema import PlotConfig
from prelar_trl.record import curves_page, html_report, read_reference, read_runs


def main(cfg: PlotConfig) -> None:
    """Write the page and say where it is."""
    if not cfg.runs:
        raise ValueError("runs is empty: say which, e.g. runs=[runs/pretrain,runs/finetune]")
    runs = [str(run) for run in (cfg.runs if isinstance(cfg.runs, list) else [cfg.runs])]
    if cfg.compare is None:
        for name in ("reference", "at", "baseline"):
            if getattr(cfg, name) is not None:
                raise ValueError(f"{name}={getattr(cfg, name)} needs compare=<config key>")
        path = html_report(cfg.out, runs, title=cfg.title or "Training report")
    else:
        compared = read_runs(runs, cfg.compare)
        if cfg.reference is not None:
            compared += read_reference(cfg.reference, cfg.reference_name)
        title = cfg.title or "Learning curves"
        path = curves_page(cfg.out, compared, title=title, at=cfg.at, baseline=cfg.baseline)
    print(f"report: {Path(path).resolve()}")
