"""What the processes of a run exchange in an update, computed from the networks' sizes.

python benchmarks/exchange.py --size full mini
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from torch import nn

from prelar_trl.config import METHODS, SIZES
from prelar_trl.models import make_agent, make_world_model, make_world_model_loss
from prelar_trl.updates import BehaviorUpdate, WorldModelUpdate

BATCH = {"pretrain": (16, 25), "finetune": (50, 50)}  # as published: rows, frames
ACTION_DIM = 4  # of Meta-world
NUMBER = 4  # bytes


def exchange(method: str, phase: str, size: str) -> dict[str, float]:
    """Of one update of everything that the phase trains.

    Returns:
        ``gradients_mb``: of all trained parameters, averaged. ``norms`` batch norms exchange
        ``norms_kb`` in all: mean and variance, and two sums on the way back. ``rows_mb``: latent
        actions and divergences of the whole batch, or its points in the bonus's memory.
    """
    with torch.device("meta"):
        if phase == "pretrain":
            model = world_model = make_world_model(method, phase, action_dim=0, size=size)
            bonus = None
        else:
            model = make_agent(method, action_dim=ACTION_DIM, size=size)
            world_model, bonus = model.world_model, model.video_bonus
        loss = make_world_model_loss(method, phase, world_model, video_bonus=bonus)
        updates = [WorldModelUpdate(loss)]
        if phase == "finetune":
            updates.append(BehaviorUpdate(model))
    rows, frames = BATCH[phase]
    groups = [g for u in updates for o in u.optimizers.values() for g in o.param_groups]
    trained = sum(p.numel() for group in groups for p in group["params"])
    norms = [x.num_features for x in world_model.modules() if isinstance(x, nn.BatchNorm2d)]
    numbers = 0
    if bonus is not None:
        numbers = rows * (frames - bonus.window + 1) * bonus.projection.shape[1]
    elif (
        loss.latent_action is not None and "action_state_consistency" in loss.latent_action.weights
    ):
        actions = loss.latent_action.latent_actions
        wide = actions.dim + (actions.num_outputs if loss.latent_action.has_params else 0)
        numbers = rows * (frames - 1) * (wide + 2)
    return {
        "gradients_mb": trained * NUMBER / 1e6,
        "norms": len(norms),
        "norms_kb": sum(norms) * 4 * NUMBER / 1e3,
        "rows_mb": numbers * NUMBER / 1e6,
    }


def cases() -> Iterator[tuple[str, str]]:
    """Every method with its phases."""
    for method, preset in METHODS.items():
        for phase in BATCH:
            if getattr(preset, phase) is not None:
                yield method, phase


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", nargs="+", default=["full", "mini"], choices=list(SIZES))
    for number, size in enumerate(parser.parse_args().size):
        if number:
            print()
        print(f"| size={size} | gradients, MB | batch norms | their kB | rows, MB |")
        print("|---|---|---|---|---|")
        for method, phase in cases():
            x = exchange(method, phase, size)
            print(
                f"| {method} {phase} | {x['gradients_mb']:.1f} | {x['norms']} "
                f"| {x['norms_kb']:.1f} | {x['rows_mb']:.2f} |"
            )


if __name__ == "__main__":
    main()
