"""Draws docs/images/latent_*.png with the pre-trained world model of the repository."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from tensordict import TensorDict
from torch import Tensor

from prelar_trl.envs import play_toy
from prelar_trl.hub import load_pretrained
from prelar_trl.modules import RSSMWorldModel
from prelar_trl.probes import latent_action_features, linear_r2, transfer
from prelar_trl.record import film_rows, write_picture

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
CONTEXT, STEPS, VIDEOS = 4, 12, 80


def draw_transfer(world_model: RSSMWorldModel) -> None:
    """Latent actions of four videos, in which a disc goes one way, act in a scene that is still."""
    names = ("right", "left", "up", "down")
    directions = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    actions = (0.6 * directions)[:, None].expand(4, STEPS - 1, 2)
    squares = torch.tensor([[0.6, -0.6], [0.6, 0.6], [-0.6, -0.6], [-0.6, 0.6]])
    frames, _ = play_toy(-0.8 * directions, squares, actions)
    middle, square = torch.zeros(4, 2), squares[-1:].expand(4, 2)
    still, _ = play_toy(middle, square, torch.zeros_like(actions))
    played, _ = play_toy(middle, square, actions[:, CONTEXT - 1 :])
    is_first = (torch.arange(STEPS) == 0)[:, None].expand(4, STEPS, 1)
    source, target = (
        TensorDict({"pixels": pixels, "is_first": is_first}, [4, STEPS])
        for pixels in (frames, still)
    )
    moved, _ = transfer(world_model, source, target, CONTEXT)
    rows = {}
    for name, imagined, real in zip(names, moved, played, strict=True):
        rows[f"{name}, imagined"] = imagined
        rows["simulator" + " " * len(rows)] = torch.cat([still[0, : CONTEXT - 1], real])
    write_picture(IMAGES / "latent_transfer.png", film_rows(rows, scale=1))


def draw_space(world_model: RSSMWorldModel) -> None:
    """The latent actions of new videos, in the colors of their true direction."""
    fit, fit_true = transitions(world_model)
    latent, true = transitions(world_model)
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


def transitions(world_model: RSSMWorldModel) -> tuple[Tensor, Tensor]:
    """Latent actions ``[N, U]`` and true ones ``[N, 2]`` of random play.

    Steps at the edge of the picture are left out: there the disc stops, whatever the action.
    """
    position = torch.rand(VIDEOS, 2) * 2 - 1
    actions = torch.rand(VIDEOS, STEPS - 1, 2) * 2 - 1
    frames, path = play_toy(position, 0.6 * (torch.rand(VIDEOS, 2) - 0.5).sign(), actions)
    images = world_model.preprocess(frames)
    latent = latent_action_features(world_model.latent_action_encoder, images)
    inside = path[:, 1:].abs().amax(-1) < 1
    return latent[inside], actions[inside]


def with_one(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones(len(x), 1)], -1)


def main() -> None:
    torch.manual_seed(0)
    world_model = cast(RSSMWorldModel, load_pretrained(ROOT / "models" / "toy_prelar_plus"))
    with torch.no_grad():
        draw_transfer(world_model)
        draw_space(world_model)


if __name__ == "__main__":
    main()
