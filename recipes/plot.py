"""Build an HTML report and curve pictures from run folders.

python recipes/plot.py runs=[runs/pretrain,runs/finetune] out=report.html
"""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

from prelar_trl.record import html_report


@hydra.main(version_base="1.3", config_path="../configs", config_name="plot")
def main(config: DictConfig) -> None:
    """Write the report and say where it is."""
    runs = OmegaConf.to_container(config, resolve=True)["runs"]
    if not runs:
        sys.exit("error: no runs given: say which folders, e.g. runs=[runs/pretrain,runs/finetune]")
    try:
        path = html_report(
            config.out, [runs] if isinstance(runs, str) else runs, title=config.title
        )
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"report: {Path(path).resolve()}")


if __name__ == "__main__":
    main()
