"""Build an HTML report and curve pictures from run folders.

python recipes/plot.py runs=[runs/pretrain,runs/finetune] out=report.html
"""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from prelar_trl.recipes.entry import recipe, settings
from prelar_trl.recipes.schema import register
from prelar_trl.record import html_report

register()


@recipe("plot")
def main(config: DictConfig) -> None:
    """Write the report and say where it is."""
    cfg = settings(config)
    if not cfg.runs:
        raise ValueError("runs is empty: say which, e.g. runs=[runs/pretrain,runs/finetune]")
    runs = cfg.runs if isinstance(cfg.runs, list) else [cfg.runs]
    path = html_report(cfg.out, [str(run) for run in runs], title=cfg.title)
    print(f"report: {Path(path).resolve()}")


if __name__ == "__main__":
    main()
