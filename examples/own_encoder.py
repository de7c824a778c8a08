"""PreLAR's losses in a training loop of one's own, with an image encoder of one's own.

python examples/own_encoder.py
"""

from pathlib import Path

import torch
from torch import nn

from prelar_trl.data import VideoClips
from prelar_trl.models import make_world_model
from prelar_trl.objectives import LatentActionLoss, RSSMWorldModelLoss, total_loss
from prelar_trl.recipes.collect_videos import collect
from prelar_trl.recipes.schema import CollectVideosConfig


class MyEncoder(nn.Sequential):
    """Images ``[N, 3, 64, 64]`` in [-0.5, 0.5] -> ``[N, embed_dim]``."""

    embed_dim = 128  # what the world model must know of it

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 16, 8, stride=4),  # [N, 16, 15, 15]
            nn.ELU(),
            nn.AvgPool2d(3),
            nn.Flatten(),
            nn.Linear(16 * 5 * 5, self.embed_dim),
            nn.ELU(),
        )


def main(
    folder: str | Path = "runs/own_encoder", *, videos: int = 50, updates: int = 500, **sizes: int
) -> list[float]:
    """The loss of each update. ``sizes`` are settings of the model, such as ``deter=64``."""
    store = Path(folder) / "videos"
    collect(CollectVideosConfig(data=str(store), env="toy", episodes=videos))  # or your own store
    clips = VideoClips(store, clip_len=12, batch_size=8)

    world_model = make_world_model(
        "prelar", "pretrain", action_dim=0, size="mini", encoder=MyEncoder(), **sizes
    )
    latent_action = LatentActionLoss(
        world_model.rssm,
        world_model.latent_action_encoder.latent_actions,
        weights={"latent_kl": 0.03, "action_contrast": 1.0},
    )
    loss = RSSMWorldModelLoss(world_model, latent_action=latent_action)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3)
    history = []
    for update in range(updates):
        losses = loss(clips.sample())  # pixels and is_first, [B, T]; no actions
        total = total_loss(losses)
        optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(loss.parameters(), 100.0)
        optimizer.step()
        history.append(total.item())
        if update % 50 == 0:
            terms = {k: round(x.item(), 2) for k, x in losses.items() if k.startswith("loss_")}
            print(update, terms, f"own action explains best: {losses['contrast_accuracy']:.2f}")
    return history


if __name__ == "__main__":
    main()
