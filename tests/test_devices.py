"""Whole updates off the CPU: on the ``meta`` device, which has no values, and on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict

from prelar_trl.models import Agent
from prelar_trl.updates import BehaviorUpdate, WorldModelUpdate
from tests.tiny import PHASES, batch, tiny

OPTIONS: list[tuple[str, str, dict[str, Any]]] = [
    ("contextwm", "pretrain", {"augmentation": "shift"}),
    ("contextwm", "pretrain", {"augmentation": "scale"}),
    ("contextwm", "pretrain", {"augmentation": "erasing"}),
    ("prelar", "pretrain", {"latent_action": "categorical", "latent_action_classes": 4}),
    ("prelar", "pretrain", {"weights": {"action_contrast": 1.0}, "ensemble": 2}),
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
