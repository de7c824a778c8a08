"""Whole updates off the CPU: on the ``meta`` device, which has no values, and on a GPU."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torchrl.envs.utils import step_mdp

from prelar_trl.envs import make_env
from prelar_trl.models import Agent
from prelar_trl.modules import StatefulPolicy, WorldModelPolicy
from prelar_trl.updates import BehaviorUpdate, WorldModelUpdate
from tests.tiny import PHASES, batch, tiny, tiny_agent

OPTIONS: list[tuple[str, str, dict[str, Any]]] = [
    ("contextwm", "pretrain", {"augmentation": "shift"}),
    ("contextwm", "pretrain", {"augmentation": "scale"}),
    ("contextwm", "pretrain", {"augmentation": "erasing"}),
    ("prelar", "pretrain", {"latent_action": "categorical", "latent_action_classes": 4}),
    ("prelar_no_cl", "pretrain", {"weights": {"action_contrast": 1.0}, "ensemble": 2}),
    ("prelar", "finetune", {"action_window": 3, "classes": 0}),
]
CASES = [(method, phase, {}) for method, phase in PHASES] + OPTIONS


def update(method: str, phase: str, device: str, precision: str, **options: Any) -> TensorDict:
    """One update of everything, the networks made and trained on the device."""
    with torch.device(device):
        model, loss = tiny(method, phase, **options)
        data = batch()
    model_update = WorldModelUpdate(loss.to(device), frozen_updates=1, precision=precision)
    losses = model_update(data)
    start = losses.pop("state").update(data.select("terminated", "action"))
    if isinstance(model, Agent):
        behavior = BehaviorUpdate(model.to(device), horizon=3, imag_batch=5, precision=precision)
        losses.update(behavior(start))
    return losses


@pytest.mark.parametrize(("method", "phase", "options"), CASES)
def test_an_update_never_asks_for_a_value(method, phase, options) -> None:
    """A value asked for is a wait for the GPU, and an error on the meta device."""
    losses = update(method, phase, "meta", "32", **options)
    assert all(x.is_meta for x in losses.values())


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["32", "bf16"])
@pytest.mark.parametrize(("method", "phase", "options"), CASES)
def test_an_update_on_a_gpu(method, phase, options, precision) -> None:
    losses = update(method, phase, "cuda", precision, **options)
    assert all(x.is_cuda and x.isfinite() for x in losses.values())


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["prelar", "apv", "contextwm"])
def test_a_step_of_acting_waits_for_the_gpu_once(method: str) -> None:
    agent = tiny_agent(method).cuda().eval()
    act = StatefulPolicy(WorldModelPolicy(agent.world_model, agent.actor), "cuda")
    env = make_env("toy")
    now = step_mdp(env.step(act(env.reset())))  # the first step may load kernels
    with warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            act(now)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len([wait for wait in waits if "called a synchroniz" in str(wait.message)]) == 1
