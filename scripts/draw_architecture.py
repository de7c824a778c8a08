"""Draws docs/images/architecture.png: the rooms of the code, and the way through them."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

OUT = Path(__file__).resolve().parents[1] / "docs" / "images" / "architecture.png"
INK, FRAME, ACTION = "#222222", "#0072B2", "#D55E00"

PLAIN = "plain networks: encoder, RSSM,\nlatent actions, heads, actor, policy"

# left, bottom, width, height, name, what is in it, fill
ROOMS = [
    (0.2, 8.0, 11.6, 1.2, "recipes/", "a script a phase: pretrain, finetune, probe", "#F3F3F3"),
    (0.2, 6.0, 3.5, 1.4, "models.py", "presets to networks\nand losses", "#E8EEF7"),
    (4.2, 6.0, 3.4, 1.4, "updates.py", "one training step", "#E8EEF7"),
    (8.1, 6.0, 3.7, 1.4, "objectives/", "pure functions,\nthin LossModules", "#E8EEF7"),
    (5.6, 4.0, 6.2, 1.4, "modules/", PLAIN, "#E6F2EA"),
    (0.2, 4.0, 3.5, 1.4, "fast/", "accelerate(module):\nfrom outside, deletable", "#F7EFE2"),
    (0.2, 1.6, 2.8, 1.5, "data/sources/", "videos, pictures,\nnpz, lists", "#F3ECF5"),
    (3.4, 1.6, 3.2, 1.5, "data/", "clip store, TorchRL\nstorages and samplers", "#F3ECF5"),
    (7.0, 1.6, 2.2, 1.5, "envs/", "make_env,\nwrappers", "#F3ECF5"),
    (9.6, 1.6, 2.2, 1.5, "record/", "logs, plots,\nreport", "#F3ECF5"),
]  # fmt: skip


def arrow(ax: plt.Axes, start: tuple[float, float], end: tuple[float, float], color: str) -> None:
    style = {"arrowstyle": "-|>", "color": color, "lw": 1.8, "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", xy=end, xytext=start, arrowprops=style)


def main() -> None:
    fig, ax = plt.subplots(figsize=(9, 7), dpi=110)
    ax.set(xlim=(0, 12), ylim=(0, 9.6))
    ax.axis("off")
    for left, bottom, width, height, name, text, fill in ROOMS:
        box = FancyBboxPatch(
            (left, bottom), width, height, boxstyle="round,pad=0,rounding_size=0.12",
            facecolor=fill, edgecolor="#999999",
        )  # fmt: skip
        ax.add_patch(box)
        middle, top = left + width / 2, bottom + height
        ax.text(middle, top - 0.16, name, ha="center", va="top", weight="bold", color=INK)
        ax.text(middle, top - 0.56, text, ha="center", va="top", size=9, color=INK)
    # a frame
    arrow(ax, (3.0, 2.3), (3.4, 2.3), FRAME)
    arrow(ax, (5.1, 3.1), (5.1, 6.0), FRAME)
    arrow(ax, (7.6, 6.9), (8.1, 6.9), FRAME)
    arrow(ax, (9.6, 6.0), (9.6, 5.4), FRAME)
    # an action
    arrow(ax, (8.1, 4.0), (8.1, 3.1), ACTION)
    arrow(ax, (7.0, 2.3), (6.6, 2.3), ACTION)
    arrow(ax, (4.7, 3.1), (4.7, 6.0), ACTION)
    arrow(ax, (7.6, 6.5), (8.1, 6.5), ACTION)
    arrow(ax, (10.2, 6.0), (10.2, 5.4), ACTION)
    ax.text(0.2, 0.75, "a frame: file, store, batch, update, loss, networks", color=FRAME)
    ax.text(0.2, 0.25, "an action: actor, environment, replay, batch, update, loss", color=ACTION)
    fig.savefig(OUT, bbox_inches="tight", pad_inches=0.1)


if __name__ == "__main__":
    main()
