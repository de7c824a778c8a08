"""The smallest models and batches that have all the parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDict

from prelar_trl.config import METHODS
from prelar_trl.models import Agent, make_agent, make_world_model, make_world_model_loss
from prelar_trl.modules import RSSMWorldModel
from prelar_trl.objectives import RSSMWorldModelLoss
from prelar_trl.updates import Update

ACTION_DIM = 2
TINY: dict[str, Any] = {
    "depth": 4,
    "layers": 1,
    "stoch": 4,
    "classes": 4,
    "deter": 16,
    "hidden": 16,
    "head_layers": 1,
    "head_units": 16,
    "latent_action_size": 4,
    "latent_action_deter": 4,
    "latent_action_hidden": 16,
}
BONUS: dict[str, Any] = {
    "bonus_memory": 64,
    "bonus_projection": 8,
    "bonus_neighbors": 4,
    "bonus_window": 3,
}
PHASES = [
    (method, phase)
    for method, preset in METHODS.items()
    for phase in ("pretrain", "finetune")
    if getattr(preset, phase) is not None
]


def tiny_world_model(
    method: str = "prelar", phase: str = "pretrain", **options: Any
) -> RSSMWorldModel:
    return make_world_model(method, phase, action_dim=ACTION_DIM, **{**TINY, **options})


def tiny_agent(method: str = "prelar", **options: Any) -> Agent:
    return make_agent(method, action_dim=ACTION_DIM, **{**TINY, **BONUS, **options})


def tiny(
    method: str, phase: str, weights: dict[str, float | None] | None = None, **options: Any
) -> tuple[RSSMWorldModel | Agent, RSSMWorldModelLoss]:
    """A world model (pre-training) or an agent, and its loss."""
    if phase == "pretrain":
        model = tiny_world_model(method, phase, **options)
        return model, make_world_model_loss(method, phase, model, weights=weights)
    agent = tiny_agent(method, **options)
    loss = make_world_model_loss(
        method, phase, agent.world_model, video_bonus=agent.video_bonus, weights=weights
    )
    return agent, loss


def train_in_float64(updates: Sequence[Update], data: TensorDict) -> TensorDict:
    """One update of the world model, then of the behavior if there is one; all their losses."""
    for name in ("action", "reward"):
        data[name] = data[name].double()
    losses = updates[0](data)
    start = losses.pop("state").update(data.select("terminated", "action"))
    for update in updates[1:]:
        losses.update(update(start))
    return losses


def batch(sequences: int = 2, steps: int = 4, **entries: torch.Tensor) -> TensorDict:
    """A training batch ``[B, T]``; its pictures change from frame to frame."""
    is_first = torch.zeros(sequences, steps, 1, dtype=torch.bool)
    is_first[:, 0] = True
    action = torch.rand(sequences, steps, ACTION_DIM) * 2 - 1
    action[:, 0] = 0
    shape = (sequences, steps, 3, 64, 64)
    return TensorDict(
        {
            "pixels": torch.randint(0, 256, shape, dtype=torch.uint8),
            "action": action,
            "reward": torch.rand(sequences, steps, 1),
            "is_first": is_first,
            "terminated": torch.zeros(sequences, steps, 1, dtype=torch.bool),
            **entries,
        },
        batch_size=[sequences, steps],
    )


def has_gradient(module: torch.nn.Module) -> bool:
    """Whether any parameter has a gradient other than zero."""
    return any(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters())


def same(first: TensorDict, second: TensorDict) -> None:
    """Assert that both hold the same keys and values."""
    assert set(first.keys(True, True)) == set(second.keys(True, True))
    for key in first.keys(True, True):
        torch.testing.assert_close(first[key], second[key])


def seeded(loss: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call the loss with the same random draws each time."""
    torch.manual_seed(9)
    return loss(*args, **kwargs)
