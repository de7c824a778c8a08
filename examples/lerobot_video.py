"""Latent actions from a LeRobot data set (version 3): its videos, and a few of its true actions.

python examples/lerobot_video.py <folder of the data set> [<camera>]

The same on the command line: ``prepare_videos.py source=<folder> data=<store> actions=true
camera=<camera>``, then ``pretrain.py data=<store> ...``.
"""

import sys
from pathlib import Path
from typing import Any

from prelar_trl.recipes.prepare_videos import run as prepare
from prelar_trl.recipes.pretrain import pretrain
from prelar_trl.recipes.schema import PrepareVideosConfig, PretrainConfig


def main(
    source: str | Path,
    camera: str | None = None,
    folder: str | Path = "runs/lerobot",
    *,
    stride: int = 1,
    **settings: Any,
) -> None:
    """``settings`` are those of ``pretrain.py``; a ``stride`` leaves the true actions out."""
    store, run = Path(folder) / "videos", Path(folder) / "run"
    prepare(
        PrepareVideosConfig(
            source=str(source), data=str(store), camera=camera, stride=stride, actions=stride == 1
        )
    )
    short = {"size": "mini", "updates": 2000, "batch_size": 8, "clip_len": 12}
    if stride == 1:  # of a twentieth of the episodes a linear map is told the true actions
        short |= {"labels": 0.05, "loss": {"weights": {"action_label": 0.5}}}
    pretrain(
        PretrainConfig(method="prelar_plus", data=str(store), run=str(run), **{**short, **settings})
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
