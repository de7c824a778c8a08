"""Compiled updates: equal to eager ones, and eager where compiling fails."""

from __future__ import annotations

import shutil
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from prelar_trl import compilation
from prelar_trl.compilation import EAGER_CALLS, TRIALS, CompileMode, ForwardBackward
from prelar_trl.models import Agent
from prelar_trl.recipes.finetune import finetune
from prelar_trl.recipes.pretrain import pretrain
from prelar_trl.updates import BehaviorUpdate, WorldModelUpdate
from tests.tiny import batch, same, tiny, train_in_float64
from tests.toy_runs import checkpoint, finetune_config, make_clips, pretrain_config

torch_compile = torch.compile


@pytest.fixture(autouse=True)
def _forget_compiled_code() -> Iterator[None]:
    yield
    torch._dynamo.reset()


@pytest.fixture
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced forward and backward as in a compiled update, but run by torch's own kernels."""

    def compile(function: Callable, *, options: dict[str, Any], **how: Any) -> Callable:
        return torch_compile(function, backend="aot_eager", **how)

    monkeypatch.setattr(torch, "compile", compile)


def trained(method: str, phase: str, mode: CompileMode, **options: Any) -> list[TensorDict]:
    """Losses, weights and buffers after each of three updates of everything, in float64."""
    torch.manual_seed(3)
    model, loss = tiny(method, phase, **options)
    model.double()
    loss.double()
    updates = [WorldModelUpdate(loss, compile=mode)]
    if isinstance(model, Agent):
        updates.append(BehaviorUpdate(model, horizon=3, imag_batch=4, compile=mode))
    results = []
    for _ in range(3):
        losses = train_in_float64(updates, batch(2, 3))
        values = {"losses": losses.clone(), "rng": torch.get_rng_state()}
        values["model"] = {name: x.clone() for name, x in model.state_dict().items()}
        results.append(TensorDict(values))
    return results


def assert_compiled_equals_eager(method: str, phase: str, **options: Any) -> None:
    expected = trained(method, phase, "off", **options)
    with torch._dynamo.config.patch(error_on_recompile=True):
        results = trained(method, phase, "on", **options)
    for after in (0, 2):
        same(results[after], expected[after])


def test_compiled_updates_equal_eager_ones(without_inductor: None) -> None:
    assert_compiled_equals_eager("prelar", "finetune")


def test_a_compiled_context_is_augmented_as_the_eager_one(without_inductor: None) -> None:
    assert_compiled_equals_eager("contextwm", "pretrain", augmentation="scale")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("phase", ["pretrain", "finetune"])
def test_updates_compiled_by_inductor_equal_eager_ones(phase: str) -> None:
    assert_compiled_equals_eager("prelar", phase)


class Noisy(nn.Module):
    """A loss with a parameter, a buffer that it moves, and a random draw."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> TensorDict:
        self.calls.add_(1)
        error = self.weight * x + torch.randn(3)
        return TensorDict({"loss_x": error.square().sum(), "x": error.detach().sum()})


class FailingBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no C++ compiler\nand more")


def fail_in(where: str, call: int) -> Callable:
    """torch.compile whose result fails in that call, after it has changed things."""

    def compile(function: Callable, **how: Any) -> Callable:
        calls = iter(range(100))

        def compiled(*inputs: Any) -> TensorDict:
            losses = function(*inputs)
            if next(calls) == call:
                losses["loss_x"] = FailingBackward.apply(losses["loss_x"])
                if where == "forward":
                    losses["loss_x"].backward()
            return losses

        return compiled

    return compile


def train_noisy(mode: CompileMode) -> tuple[ForwardBackward, list[torch.Tensor]]:
    torch.manual_seed(5)
    module = Noisy()
    run, seen = ForwardBackward(module, module, mode), []
    for step in range(EAGER_CALLS + TRIALS + 2):
        losses = run(torch.full((3,), float(step)))
        seen += [losses["loss_x"], losses["x"], module.weight.grad.clone(), module.calls.clone()]
        module.weight.grad = None
    return run, [*seen, torch.get_rng_state()]


@pytest.mark.parametrize("call", [0, 1, 4])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_auto_goes_on_eagerly_with_one_warning_where_compiling_fails(
    where: str, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, expected = train_noisy("off")
    monkeypatch.setattr(compilation, "COMPILED_DEVICES", ("cpu",))
    monkeypatch.setattr(torch, "compile", fail_in(where, call))
    with pytest.warns(UserWarning) as caught:
        run, seen = train_noisy("auto")
    (message,) = (str(warning.message) for warning in caught)
    assert message == (
        "compile=auto failed (RuntimeError: no C++ compiler and more); goes on as compile=off"
    )
    assert run.mode == "off" and run.compiled is None
    for a, b in zip(seen, expected, strict=True):
        assert torch.equal(a, b)


def slow_by(seconds: float) -> Callable:
    """torch.compile whose result takes that much longer."""

    def compile(function: Callable, **how: Any) -> Callable:
        return lambda *inputs: time.sleep(seconds) or function(*inputs)

    return compile


def test_auto_goes_on_eagerly_where_compiled_is_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    _, expected = train_noisy("off")
    monkeypatch.setattr(compilation, "COMPILED_DEVICES", ("cpu",))
    monkeypatch.setattr(torch, "compile", slow_by(0.2))
    with pytest.warns(
        UserWarning, match=r"^compile=auto is no gain \(\d+ ms, eager \d+ ms\); "
    ) as w:
        run, seen = train_noisy("auto")
    assert len(w) == 1 and run.mode == "off" and run.compiled is None
    for a, b in zip(seen, expected, strict=True):
        assert torch.equal(a, b)


def test_the_failed_call_s_tensors_are_free_when_the_eager_one_begins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compilation, "COMPILED_DEVICES", ("cpu",))
    held: list[weakref.ref] = []

    def compile(function: Callable, **how: Any) -> Callable:
        def compiled(x: torch.Tensor) -> TensorDict:
            activation = x * 2
            held.append(weakref.ref(activation))
            raise RuntimeError(f"no memory for {activation.sum()}")

        return compiled

    monkeypatch.setattr(torch, "compile", compile)
    module = Noisy()
    run, alive = ForwardBackward(module, module, "auto"), []
    eager = run._eager
    run._eager = lambda x: alive.extend(ref() is not None for ref in held) or eager(x)
    with pytest.warns(UserWarning, match="no memory"):
        for _ in range(EAGER_CALLS + 1):
            run(torch.ones(3))
    assert alive == [False]


def test_an_eager_call_that_fails_gives_no_time_to_beat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "COMPILED_DEVICES", ("cpu",))
    module = Noisy()
    run = ForwardBackward(module, module, "auto")
    for _ in range(EAGER_CALLS + 1):
        with pytest.raises(RuntimeError, match="size of tensor"):
            run(torch.ones(2))
    assert run.eager_seconds == float("inf") and run.compiled is None


def test_auto_stays_compiled_where_that_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "COMPILED_DEVICES", ("cpu",))
    monkeypatch.setattr(torch, "compile", slow_by(0.0))
    eager = ForwardBackward._eager
    monkeypatch.setattr(
        ForwardBackward, "_eager", lambda self, *x: time.sleep(0.2) or eager(self, *x)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run, _ = train_noisy("auto")
    assert run.mode == "auto" and run.compiled is not None


def test_on_raises_where_compiling_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", fail_in("forward", 0))
    message = r"^compile=on failed \(RuntimeError: no C\+\+ compiler and more\); use compile=off$"
    with pytest.raises(RuntimeError, match=message):
        train_noisy("on")


def test_an_error_of_the_inputs_is_not_the_compilers(
    monkeypatch: pytest.MonkeyPatch, without_inductor: None
) -> None:
    monkeypatch.setattr(compilation, "COMPILED_DEVICES", ("cpu",))
    module = Noisy()
    run = ForwardBackward(module, module, "auto")
    for _ in range(EAGER_CALLS):
        run(torch.ones(3))
    with warnings.catch_warnings(), pytest.raises(RuntimeError, match="size of tensor"):
        warnings.simplefilter("error")
        run(torch.ones(2))
    assert run(torch.ones(3))["loss_x"].isfinite() and run.compiled is not None


def test_auto_is_eager_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda *args, **how: pytest.fail("compiled"))
    train_noisy("auto")


def test_an_unknown_mode_is_named() -> None:
    with pytest.raises(ValueError, match="compile='yes' is unknown; choose auto, on or off"):
        ForwardBackward(Noisy(), Noisy(), "yes")


def assert_same_run(first: Path, second: Path, part: str) -> None:
    """Equal but for rounding, which Adam enlarges where a gradient is nearly nothing but that."""
    ours, theirs = checkpoint(first), checkpoint(second)
    assert ours.keys() == theirs.keys() and ours["step"] == theirs["step"]
    assert torch.equal(ours["rng"]["torch"], theirs["rng"]["torch"])
    assert ours[part].keys() == theirs[part].keys()
    for name, value in ours[part].items():
        assert (value - theirs[part][name]).abs().double().mean() < 3e-5, name  # a step: 3e-4


def test_a_run_continues_compiled_or_not(tmp_path: Path, without_inductor: None) -> None:
    data, options = make_clips(tmp_path / "clips"), {"method": "apv"}
    pretrain(pretrain_config(data, tmp_path / "eager", compile="off", **options))
    for updates, mode in enumerate(("on", "off", "on"), 1):
        options |= {"updates": updates, "compile": mode, "resume": updates > 1}
        pretrain(pretrain_config(data, tmp_path / "mixed", **options))
    assert_same_run(tmp_path / "mixed", tmp_path / "eager", "model")


def test_compiled_fine_tuning_is_the_eager_one(tmp_path: Path, without_inductor: None) -> None:
    for mode in ("off", "on"):
        options = {"method": "dreamerv2", "env_steps": 40, "eval_episodes": 0, "compile": mode}
        finetune(finetune_config(tmp_path / mode, **options))
    assert_same_run(tmp_path / "on", tmp_path / "off", "agent")
