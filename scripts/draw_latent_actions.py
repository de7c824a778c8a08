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
from prelar_trl.probes import action_usage, latent_action_features, linear_r2, transfer
from prelar_trl.recipes.common import read_run
from prelar_trl.recipes.probe import make_model
from prelar_trl.record import film_rows, write_picture

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
CONTEXT, STEPS, BATCHES = 4, 12, 20


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
def draw_space(world_model: RSSMWorldModel, clips: VideoClips) -> None:
    """The latent actions of held-out transitions, in the colors of their true direction."""
    latent, true = map(torch.cat, zip(*(pairs(world_model, clips) for _ in range(BATCHES))))
    half = len(latent) // 2
    fit, test = slice(0, half), slice(half, None)
    score = linear_r2(latent[fit], true[fit], latent[test], true[test]).mean()
    weights = torch.linalg.lstsq(with_one(latent[fit]), with_one(true[fit])).solution
    read = (with_one(latent[test]) @ weights)[:, :2]
    components = torch.pca_lowrank(latent, 2)[2]
    plane = ((latent - latent.mean(0)) @ components)[test]
    color = torch.atan2(true[test, 1], true[test, 0])
    usage = action_usage(world_model, clips.sample(), CONTEXT)["action_usage"]
    print(f"R² {score:.3f}, action usage {usage:.2f}, {len(true)} transitions")

    fig, axes = plt.subplots(1, 3, figsize=(10, 3.4), dpi=110)
    panels = (
        (true[test], "true action", "x", "y"),
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


def pairs(world_model: RSSMWorldModel, clips: VideoClips) -> tuple[Tensor, Tensor]:
    """Latent and true actions of a batch of transitions."""
    batch = clips.sample_with_actions()
    images = world_model.preprocess(batch["pixels"])
    latent = latent_action_features(world_model.latent_action_encoder, images)
    return latent.flatten(0, 1), batch["action"][:, 1:].flatten(0, 1)


def with_one(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones(len(x), 1)], -1)


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    run, checkpoint = read_run(sys.argv[1], trust_code=False)
    world_model = make_model(checkpoint)
    world_model.load_state_dict(checkpoint["model"])
    world_model.eval()
    clips = VideoClips(run.config["data"], split="heldout", clip_len=STEPS, batch_size=12)
    draw_transfer(world_model)
    draw_space(world_model, clips)


if __name__ == "__main__":
    main()
