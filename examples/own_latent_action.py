"""A kind of latent action of one's own, in pre-training: signs, with a loss and a metric.

python examples/own_latent_action.py
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prelar_trl.modules import LatentActions, register_latent_actions
from prelar_trl.recipes.collect_videos import collect
from prelar_trl.recipes.pretrain import pretrain
from prelar_trl.recipes.schema import CollectVideosConfig, PretrainConfig


@register_latent_actions("signs")
class SignActions(LatentActions):
    """Signs of the network's output, with straight-through gradients.

    Args:
        size: number of signs.
        push: what the size of the output is drawn to, away from 0, where a sign flips.
    """

    def __init__(self, *, size: int, push: float = 1.0) -> None:
        super().__init__(size=size)
        self.num_outputs = self.dim = size
        self.push = push

    def forward(self, raw: Tensor, sample: bool = True) -> tuple[Tensor, Tensor]:
        bounded = torch.tanh(raw)
        return bounded + (bounded.sign() - bounded).detach(), raw

    def extra_losses(self, action: Tensor, params: Tensor) -> dict[str, Tensor]:
        return {"push": (params.abs() - self.push).square().mean()}

    def metrics(self, action: Tensor, params: Tensor) -> dict[str, Tensor]:
        codes = torch.unique(action.detach().sign().flatten(0, -2), dim=0)
        return {"codes_used": torch.tensor(float(len(codes)))}


def main(folder: str | Path = "runs/own_latent_action", *, videos: int = 50, **settings: Any):
    """``settings`` are those of ``pretrain.py``; ``model`` those of the model."""
    folder = Path(folder)
    collect(CollectVideosConfig(data=str(folder / "videos"), env="toy", episodes=videos))
    short = {"size": "mini", "updates": 500, "batch_size": 8, "clip_len": 12}
    kind = {"latent_action": "signs", "latent_action_size": 4, **settings.pop("model", {})}
    pretrain(
        PretrainConfig(
            method="prelar",
            data=str(folder / "videos"),
            run=str(folder / "run"),
            model=kind,  # on the command line: model.latent_action=my_module:SignActions
            loss={"weights": {"push": 0.1, "action_state_consistency": 0.1}},
            **{**short, **settings},
        )
    )


if __name__ == "__main__":
    main()
