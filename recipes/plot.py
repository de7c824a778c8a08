"""Build an HTML report and curve pictures from run folders.

python recipes/plot.py runs=[runs/pretrain,runs/finetune] out=report.html
"""

from __future__ import annotations

import sys

from prelar_trl.recipes.entry import start

if __name__ == "__main__":  # before the imports that take seconds
    sys.exit(start("plot"))

from pathlib import Path

from prelar_trl.recipes.schema import PlotConfig
from prelar_trl.record import html_report


def main(cfg: PlotConfig) -> None:
    """Write the report and say where it is."""
    if not cfg.runs:
        raise ValueError("runs is empty: say which, e.g. runs=[runs/pretrain,runs/finetune]")
    runs = cfg.runs if isinstance(cfg.runs, list) else [cfg.runs]
    path = html_report(cfg.out, [str(run) for run in runs], title=cfg.title)
    print(f"report: {Path(path).resolve()}")
