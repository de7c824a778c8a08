"""Processes that share a batch compute what one process computes with all of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor, nn

from prelar_trl.collectives import own_rows
from prelar_trl.distributed import distribute
from prelar_trl.fast import accelerate
from prelar_trl.models import make_world_model_loss
from prelar_trl.modules import actions, context
from prelar_trl.modules.pixels import normalize_pixels
from prelar_trl.objectives import LatentActionLoss
from prelar_trl.rehearsal import Rehearsal
from prelar_trl.updates import Alignment, BehaviorUpdate, Update, WorldModelUpdate
from tests.processes import run_in_processes
from tests.tiny import ACTION_DIM, PHASES, batch, tiny_agent, tiny_world_model

ROWS = 4  # of the joint batch
Case = tuple[str, str, dict[str, Any]]
ALL_TERMS = {"latent_kl": 1.0, "action_state_consistency": 1.0, "action_contrast": 1.0}
OPTIONS: dict[str, Case] = {
    "contrast": ("prelar", "pretrain", {"loss": {"weights": ALL_TERMS, "temperature": "learned"}}),
    "labels": ("prelar", "pretrain", {"loss": {"weights": {"action_label": 1.0}}}),
    "free nats": ("prelar", "pretrain", {"loss": {"free_nats": 0.4, "latent_free_nats": 0.1}}),
    "vq": ("prelar", "pretrain", {"latent_action": "vq"}),
    "fsq": ("prelar", "pretrain", {"latent_action": "fsq"}),
    "not accelerated": ("prelar", "pretrain", {"accelerated": False}),
    "rehearsal": ("prelar", "finetune", {"rehearse": 0.5}),
    "reward norm": ("dreamerv2", "finetune", {"behavior": {"reward_norm_momentum": 0.5}}),
}
CASES: dict[str, Case] = {f"{m} {phase}": (m, phase, {}) for m, phase in PHASES} | OPTIONS


def joint_batch() -> TensorDict:
    torch.manual_seed(3)
    data = batch(ROWS, 5)
    data["labeled"] = torch.zeros(ROWS, 5, 1, dtype=torch.bool)
    data["labeled"][0] = True  # all labels lie in the first process
    data["is_first"][1, 3] = True
    for name in ("action", "reward"):
        data[name] = data[name].double()
    return data


@contextmanager
def fixed_draws() -> Iterator[None]:
    """Draws that do not depend on which rows a process has."""

    def order(self, batch: int, device: torch.device) -> Tensor:
        return torch.tensor([2, 0, 3, 1])

    def frames(batch: int, steps: int, device: torch.device) -> Tensor:
        return torch.full((batch,), 1)

    def positions(rows: int, count: int, device: torch.device) -> Tensor:
        return torch.arange(count).flip(0).expand(rows, -1)

    def shift(images: Tensor, pad: int) -> Tensor:
        return images.roll(pad // 2, -1)

    with (
        mock.patch.object(actions, "random_shift", shift),
        mock.patch.object(LatentActionLoss, "draw_permutation", order),
        mock.patch.object(context, "draw_frames", frames),
        mock.patch.object(context, "draw_positions", positions),
    ):
        yield


@contextmanager
def in_float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def make(case: Case) -> tuple[nn.Module, list[Update]]:
    """The networks of a case, in float64, and the updates that train them."""
    method, phase, given = case
    options = {"accelerated": True, "rehearse": None, "loss": {}, "behavior": {}, **given}
    accelerated, share, settings, behavior = (
        options.pop(x) for x in ("accelerated", "rehearse", "loss", "behavior")
    )
    options |= {"sample": False, "context_dropout": 0.0}
    if phase == "pretrain":
        model = world_model = tiny_world_model(method, phase, **options)
        bonus = None
    else:
        model = tiny_agent(method, **options)
        world_model, bonus = model.world_model, model.video_bonus
    loss = make_world_model_loss(
        method, phase, world_model, video_bonus=bonus, action_dim=ACTION_DIM, **settings
    )
    together = nn.ModuleList([model, loss]).double()
    inverse = tiny_world_model().latent_action_encoder.double().requires_grad_(False)
    if accelerated:
        accelerate(together)
    rehearsal = Rehearsal(loss, inverse, share) if share else None
    updates: list[Update] = [
        WorldModelUpdate(loss, lr=1e-3, frozen_updates=1, rehearsal=rehearsal)
        if phase == "finetune"
        else WorldModelUpdate(loss, lr=1e-3)
    ]
    if phase == "finetune":
        learning = {"actor_lr": 1e-3, "critic_lr": 1e-3, **behavior}
        updates.append(BehaviorUpdate(model, horizon=3, **learning))
        if world_model.action_encoder is not None:
            preprocess = partial(normalize_pixels, dtype=torch.float64)
            updates.append(Alignment(world_model.action_encoder, inverse, preprocess=preprocess))
    return together, updates


def train(names: list[str], steps: int = 2) -> dict[str, dict[str, Any]]:
    """What some updates give of each case: losses, gradients, weights and buffers.

    In a process of a group the batch is this process's share of the joint one.
    """
    group = dist.group.WORLD if dist.is_initialized() else None
    results = {}
    with fixed_draws(), in_float64():
        for name in names:
            torch.manual_seed(0 if group is None else group.rank())  # the first one's weights count
            together, updates = make(CASES[name])
            gradients: list[dict[str, Tensor]] = []
            for update in updates:
                distribute(update, group, overlap=not isinstance(update, Alignment))
                keep_gradients(update, together, gradients)
            losses = []
            for _ in range(steps):
                data = joint_batch()
                data = TensorDict({k: own_rows(x, group) for k, x in data.items()})
                data.auto_batch_size_(2)
                video = [data.clone()] if CASES[name][2].get("rehearse") else []
                out = updates[0](data, *video)
                start = out.pop("state").update(data.select("terminated", "action"))
                losses.append(out)
                for update in updates[1:]:
                    arguments = (data,) if isinstance(update, Alignment) else (start, False)
                    losses.append(update(*arguments))
            state = {k: x.clone() for k, x in together.state_dict().items()}
            losses = [{k: x.clone() for k, x in each.items()} for each in losses]
            results[name] = {"losses": losses, "gradients": gradients, "state": state}
    return results


def keep_gradients(update: Update, module: nn.Module, kept: list[dict[str, Tensor]]) -> None:
    """Before each step note the gradients of what the update trains."""
    step = update.step_optimizers

    def keep_and_step(loss: Tensor) -> dict[str, Tensor]:
        named = module.named_parameters()
        kept.append({name: p.grad.clone() for name, p in named if p.grad is not None})
        return step(loss)

    update.step_optimizers = keep_and_step


@pytest.fixture(scope="module")
def results() -> tuple[dict, list[dict]]:
    """Of one process with the joint batch, and of two."""
    return train(list(CASES)), run_in_processes(train, list(CASES))


@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one_with_the_joint_batch(results, name: str) -> None:
    alone, (first, second) = results
    if name == "vq":  # of distances that are equal but for rounding it takes the sign
        for each in (alone, first, second):
            for losses in each[name]["losses"]:
                losses.pop("consistency_sign", None)
    for part in ("losses", "gradients", "state"):
        close = {"rtol": 1e-5, "atol": 1e-7} if part == "losses" else {"rtol": 1e-7, "atol": 1e-9}
        torch.testing.assert_close(first[name][part], alone[name][part], **close)
        torch.testing.assert_close(second[name][part], first[name][part], rtol=0, atol=0)
