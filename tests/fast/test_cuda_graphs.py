"""Recorded updates: equal to eager ones, and eager where recording fails."""

from __future__ import annotations

import warnings
import weakref
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from prelar_trl.fast import accelerate, compile_update, record_update, skip_on_device
from prelar_trl.fast.cuda_graphs import EAGER, WAIT
from prelar_trl.models import Agent
from prelar_trl.updates import BehaviorUpdate, Update, WorldModelUpdate
from tests.fast.graph_simulator import Capture, SimulatedGraph
from tests.tiny import PHASES, batch, same, tiny, train_in_float64

OPTIONS: list[tuple[str, str, dict[str, Any]]] = [
    ("contextwm", "pretrain", {"augmentation": "scale"}),
    ("prelar_no_cl", "pretrain", {"latent_action": "vq"}),
    ("prelar_no_cl", "pretrain", {"latent_action": "fsq"}),
    ("prelar", "finetune", {"action_window": 3}),
]


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA graphs and parameters that say they are on CUDA, on the CPU."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", SimulatedGraph)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda of: nullcontext())
    for name in ("Stream", "current_stream", "get_sync_debug_mode", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    monkeypatch.setattr(nn.Parameter, "is_cuda", True)


def trained(
    method: str, phase: str, device: str, record: bool, **options: Any
) -> tuple[list[TensorDict], dict[str, Any], torch.Tensor]:
    """Six updates of everything in float64: their losses, the weights, the random state."""
    torch.manual_seed(3)
    with torch.device(device):
        model, loss = tiny(method, phase, **options)
    accelerate(model.to(device)).double()
    loss.to(device).double()
    updates: list[Update] = [WorldModelUpdate(loss)]
    if isinstance(model, Agent):
        schedule = {"entropy_scale": "linear(1e-3,1e-4,10)", "slow_every": 2}
        updates.append(BehaviorUpdate(model, horizon=3, imag_batch=4, **schedule))
    for update in updates:
        if device == "cuda":
            skip_on_device(update)
        if record:
            record_update(update)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # recording failed
        history = [train_in_float64(updates, batch(2, 4).to(device)) for _ in range(EAGER + 3)]
    rng = torch.cuda.get_rng_state() if device == "cuda" else torch.get_rng_state()
    return history, model.state_dict(), rng


def assert_recorded_equals_eager(method: str, phase: str, device: str, **options: Any) -> None:
    expected, expected_state, expected_rng = trained(method, phase, device, False, **options)
    history, state, rng = trained(method, phase, device, True, **options)
    assert torch.equal(rng, expected_rng)
    for ours, theirs in zip(history, expected, strict=True):
        same(ours, theirs)
    for name, value in expected_state.items():
        torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-7)


CASES = [(method, phase, {}) for method, phase in PHASES] + OPTIONS


@pytest.mark.parametrize(("method", "phase", "options"), CASES)
def test_recorded_updates_equal_eager_ones(simulated: None, method, phase, options) -> None:
    assert_recorded_equals_eager(method, phase, "cpu", **options)


@pytest.mark.gpu
@pytest.mark.parametrize(("method", "phase", "options"), CASES)
def test_recorded_updates_on_a_gpu_equal_eager_ones(method, phase, options, monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert_recorded_equals_eager(method, phase, "cuda", **options)


class Noisy(Update):
    """An update with a parameter and a random draw; ``calls`` counts the eager ones."""

    def __init__(self, device: str = "cpu") -> None:
        module = nn.Module()
        module.weight = nn.Parameter(torch.ones(3, device=device))
        super().__init__(module, "32", 100.0)
        self.calls = 0

    def losses(self, batch: TensorDict) -> TensorDict:
        self.calls += 1
        error = self.module.weight * batch["x"] + torch.randn(3, device=batch["x"].device)
        return TensorDict({"loss_x": error.square().sum(), "x": error.detach().sum()})

    def __call__(self, batch: TensorDict) -> TensorDict:
        losses = self.forward_backward(batch)
        self.gradient, self.module.weight.grad = self.module.weight.grad.clone(), None
        return losses


class Waiting(Noisy):
    """Asks for a value, which cannot be recorded."""

    def losses(self, batch: TensorDict) -> TensorDict:
        batch["x"].sum().item()
        return super().losses(batch)


def noise(*shape: int, device: str = "cpu") -> TensorDict:
    return TensorDict({"x": torch.randn(shape or 3, device=device)})


def test_the_fourth_update_is_recorded_and_the_host_computes_none_later(simulated: None) -> None:
    update = record_update(Noisy())
    losses = [update(noise()) for _ in range(EAGER + 4)]
    assert update.calls == EAGER + 1
    assert len({float(each["x"]) for each in losses}) == EAGER + 4  # none was written over


def test_a_batch_of_another_form_is_computed_eagerly(simulated: None) -> None:
    update = record_update(Noisy())
    for _ in range(EAGER + 2):
        update(noise())
    wide = noise(5, 3)
    update(wide)
    assert update.calls == EAGER + 2
    eager, x = Noisy(), noise()
    torch.manual_seed(0)
    eager(x)
    torch.manual_seed(0)
    update(x)
    assert update.calls == EAGER + 2
    torch.testing.assert_close(update.gradient, eager.gradient)


def check_that_it_goes_on_eagerly(device: str) -> None:
    update = record_update(Waiting(device))
    with pytest.warns(UserWarning, match="compile=auto failed") as caught:
        for _ in range(EAGER + 3):
            losses = update(noise(device=device))
            assert losses["loss_x"].isfinite() and update.gradient.isfinite().all()
    (message,) = (str(warning.message) for warning in caught)
    assert message.endswith("goes on as compile=off") and "\n" not in message
    assert update.calls >= EAGER + 3


def test_where_recording_fails_it_goes_on_eagerly_with_one_warning(simulated: None) -> None:
    check_that_it_goes_on_eagerly("cpu")


@pytest.mark.gpu
def test_where_recording_fails_on_a_gpu_it_goes_on_eagerly_with_one_warning() -> None:
    check_that_it_goes_on_eagerly("cuda")


def test_an_update_that_waits_for_the_gpu_is_not_recorded(simulated: None) -> None:
    class Synchronizing(Noisy):
        def losses(self, batch: TensorDict) -> TensorDict:
            warnings.warn(f"{WAIT} (Triggered internally)", stacklevel=1)
            return super().losses(batch)

    update = record_update(Synchronizing())
    with pytest.warns(UserWarning) as caught:
        for _ in range(EAGER + 2):
            update(noise())
    told = [str(warning.message) for warning in caught if "compile=auto" in str(warning.message)]
    assert told == ["compile=auto failed (it waits for the GPU); goes on as compile=off"]
    assert update.calls == EAGER + 2


def test_the_failed_recording_s_tensors_are_free_when_the_eager_one_begins(simulated) -> None:
    held: list[weakref.ref] = []
    alive: list[bool] = []

    class Full(Noisy):
        def losses(self, batch: TensorDict) -> TensorDict:
            if self.calls == EAGER and not held:
                activation = batch["x"] * 2
                held.append(weakref.ref(activation))
                raise RuntimeError(f"no memory for {activation.shape}")
            alive.extend(ref() is not None for ref in held)
            return super().losses(batch)

    update = record_update(Full())
    with pytest.warns(UserWarning, match="no memory"):
        for _ in range(EAGER + 1):
            update(noise())
    assert alive == [False]


def test_an_error_of_the_inputs_is_not_the_recordings(simulated: None) -> None:
    update = record_update(Noisy())
    for _ in range(EAGER):
        update(noise())
    with warnings.catch_warnings(), pytest.raises(RuntimeError, match="size of tensor"):
        warnings.simplefilter("error")
        update(noise(2))
    calls = update.calls
    update(noise())
    update(noise())
    assert update.calls == calls + 1  # recorded at last


def test_auto_records_on_cuda_only(simulated: None, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = compile_update(Noisy(), "auto")
    assert "forward_backward" in vars(recorded)
    assert "forward_backward" not in vars(compile_update(Noisy(), "off"))
    monkeypatch.setattr(nn.Parameter, "is_cuda", False)
    assert "forward_backward" not in vars(compile_update(Noisy(), "auto"))
