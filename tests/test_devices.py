"""Whole updates off the CPU: on the ``meta`` device, which has no values, and on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict

from prelar_trl.models import Agent
from prelar_trl.updates import BehaviorUpdate, WorldModelUpdate
from tests.tiny import PHASES, batch, same, tiny, train_in_float64

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
        behaviour = BehaviorUpdate(model.to(device), horizon=3, imag_batch=5, precision=precision)
        losses.update(behaviour(start))
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
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("method", "phase"), [("prelar", "pretrain"), ("prelar", "finetune")])
def test_compiled_updates_on_a_gpu_equal_eager_ones(method, phase, monkeypatch) -> None:
    """Five updates: a CUDA graph is warmed up, recorded, and then replayed."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    results = []
    for compile in ("off", "on"):
        torch.manual_seed(3)
        with torch.device("cuda"):
            model, loss = tiny(method, phase)
        model.to("cuda").double()
        loss.to("cuda").double()
        updates = [WorldModelUpdate(loss, compile=compile)]
        if isinstance(model, Agent):
            updates.append(BehaviorUpdate(model, horizon=3, imag_batch=5, compile=compile))
        # Looked at only after the graphs were replayed.
        history = [train_in_float64(updates, batch().to("cuda")) for _ in range(5)]
        results.append((history, model.state_dict(), torch.cuda.get_rng_state()))
    (expected, expected_state, expected_rng), (history, state, rng) = results
    assert torch.equal(rng, expected_rng)
    for ours, theirs in zip(history, expected, strict=True):
        same(ours, theirs)
    for name, value in expected_state.items():
        torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-7)
