"""Draws docs/images/latent_*.png from a pre-training run on the toy.

python recipes/collect_videos.py data=runs/pictures/videos env=toy episodes=300 max_steps=30 \
    random_fraction=0.5 noise=0.5 after_success=null
python recipes/pretrain.py method=prelar_plus size=mini data=runs/pictures/videos \
    run=runs/pictures/run updates=3000 batch_size=12 clip_len=12 lr=1e-3
python scripts/draw_latent_actions.py runs/pictures/run
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from tensordict import TensorDict
from torch import Tensor

from prelar_trl.data import VideoClips
from prelar_trl.envs import play_toy
from prelar_trl.modules import RSSMWorldModel
from prelar_trl.probes import latent_action_features, linear_r2, transfer
from prelar_trl.recipes.common import read_run
from prelar_trl.recipes.probe import make_model
from prelar_trl.record import film_rows, write_picture

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
CONTEXT, STEPS, BATCHES = 4, 12, 8


@torch.no_grad()
def draw_transfer(world_model: RSSMWorldModel) -> None:
    """A disc that goes right and then up; a scene that stands still; the one's actions in it."""
    actions = torch.zeros(2, STEPS - 1, 2)
    actions[0, : CONTEXT + 3, 0] = 0.6
    actions[0, CONTEXT + 3 :, 1] = 0.6
    position = torch.tensor([[-0.8, -0.1], [-0.3, -0.5]])
    square = torch.tensor([[0.6, -0.6], [-0.6, 0.6]])
    frames, path = play_toy(position, square, actions)
    played, _ = play_toy(path[1:, CONTEXT - 1], square[1:], actions[:1, CONTEXT - 1 :])
    is_first = (torch.arange(STEPS) == 0)[:, None].expand(2, STEPS, 1)
    source = TensorDict({"pixels": frames, "is_first": is_first}, [2, STEPS])
    moved, _ = transfer(world_model, source, source.roll(1, 0), CONTEXT)
    rows = {
        "source": frames[0],
        "target": frames[1],
        "imagined": moved[0],
        "simulator": torch.cat([frames[1, : CONTEXT - 1], played[0]]),
    }
    write_picture(IMAGES / "latent_transfer.png", film_rows(rows, scale=1))


@torch.no_grad()
def draw_space(world_model: RSSMWorldModel, clips: VideoClips, heldout: VideoClips) -> None:
    """The latent actions of held-out transitions, in the colors of their true direction."""
    fit, fit_true = transitions(world_model, clips)
    latent, true = transitions(world_model, heldout)
    score = linear_r2(fit, fit_true, latent, true).mean()
    weights = torch.linalg.lstsq(with_one(fit), fit_true).solution
    read = with_one(latent) @ weights
    plane = (latent - fit.mean(0)) @ torch.pca_lowrank(fit, 2)[2]
    color = torch.atan2(true[:, 1], true[:, 0])
    print(f"R² {score:.3f} on {len(true)} transitions")

    fig, axes = plt.subplots(1, 3, figsize=(10, 3.4), dpi=110)
    panels = (
        (true, "true action", "x", "y"),
        (plane, "latent action: two main components", "first", "second"),
        (read, f"true action, read from the latent: R² {score:.2f}", "x", "y"),
    )
    for ax, (points, title, x, y) in zip(axes, panels, strict=True):
        ax.scatter(*points.T, c=color, cmap="hsv", s=5, vmin=-torch.pi, vmax=torch.pi)
        ax.set_title(title, fontsize=9)
        ax.set(xlabel=x, ylabel=y)
        ax.spines[["top", "right"]].set_visible(False)
    fig.tight_layout()
    fig.savefig(IMAGES / "latent_space.png")


def transitions(world_model: RSSMWorldModel, clips: VideoClips) -> tuple[Tensor, Tensor]:
    """Latent and true actions, ``[N, U]`` and ``[N, A]``."""
    latent, true = [], []
    for _ in range(BATCHES):
        batch = clips.sample_with_actions()
        images = world_model.preprocess(batch["pixels"])
        features = latent_action_features(world_model.latent_action_encoder, images)
        latent.append(features.flatten(0, 1))
        true.append(batch["action"][:, 1:].flatten(0, 1))
    return torch.cat(latent), torch.cat(true)


def with_one(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones(len(x), 1)], -1)


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    run, checkpoint = read_run(sys.argv[1], trust_code=False)
    world_model = make_model(checkpoint)
    world_model.load_state_dict(checkpoint["model"])
    world_model.eval()
    clips, heldout = (
        VideoClips(run.config["data"], split=split, clip_len=STEPS, batch_size=12)
        for split in ("train", "heldout")
    )
    draw_transfer(world_model)
    draw_space(world_model, clips, heldout)


if __name__ == "__main__":
    main()
