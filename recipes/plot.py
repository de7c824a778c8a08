"""Build an HTML report and curve pictures from run folders.

python recipes/plot.py runs=[runs/pretrain,runs/finetune] out=report.html
"""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from prelar_trl.recipes.entry import recipe
from prelar_trl.record import html_report


@recipe("plot")
def main(config: DictConfig) -> None:
    """Write the report and say where it is."""
    runs = OmegaConf.to_container(config, resolve=True)["runs"]
    if not runs:
        raise ValueError("no runs given: say which, e.g. runs=[runs/pretrain,runs/finetune]")
    path = html_report(config.out, [runs] if isinstance(runs, str) else runs, title=config.title)
    print(f"report: {Path(path).resolve()}")


if __name__ == "__main__":
    main()
