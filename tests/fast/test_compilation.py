"""Compiled updates: equal to eager ones, and eager where compiling fails."""

from __future__ import annotations

import shutil
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from prelar_trl.fast import CompileMode, accelerate, compile_update
from prelar_trl.models import Agent
from prelar_trl.recipes.finetune import finetune
from prelar_trl.recipes.pretrain import pretrain
from prelar_trl.updates import BehaviorUpdate, Update, WorldModelUpdate
from tests.tiny import batch, same, tiny, train_in_float64
from tests.toy_runs import checkpoint, finetune_config, pretrain_config

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
    accelerate(model).double()
    loss.double()
    updates: list[Update] = [WorldModelUpdate(loss)]
    if isinstance(model, Agent):
        updates.append(BehaviorUpdate(model, horizon=2, imag_batch=4))
    for update in updates:
        compile_update(update, mode)
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
    assert_compiled_equals_eager("prelar", "finetune", images="cnn")  # ResNets: below


def test_a_compiled_context_is_augmented_as_the_eager_one(without_inductor: None) -> None:
    assert_compiled_equals_eager("contextwm", "pretrain", augmentation="scale")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("phase", ["pretrain", "finetune"])
def test_updates_compiled_by_inductor_equal_eager_ones(phase: str) -> None:
    assert_compiled_equals_eager("prelar", phase)


class Noisy(Update):
    """An update with a parameter, a buffer that it moves, and a random draw."""

    def __init__(self) -> None:
        module = nn.Module()
        module.weight = nn.Parameter(torch.ones(3))
        super().__init__(module, "32", 100.0)
        self.calls = 0

    def losses(self, x: torch.Tensor) -> TensorDict:
        self.calls += 1
        error = self.module.weight * x + torch.randn(3)
        self.gradient = 2 * error.detach() * x  # of the last call alone
        return TensorDict({"loss_x": error.square().sum(), "x": error.detach().sum()})


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters say that they are on CUDA; CUDA itself is never asked."""
    monkeypatch.setattr(nn.Parameter, "is_cuda", True)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: None)


class FailingBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no C++ compiler\nand more")


def fail_in(where: str, call: int) -> Callable:
    """torch.compile whose result fails in that call, after gradients or half of them are there."""

    def compile(function: Callable, **how: Any) -> Callable:
        calls = iter(range(100))

        def compiled(*inputs: Any) -> TensorDict:
            losses = function(*inputs)
            if next(calls) == call:
                if where == "forward":
                    losses["loss_x"].backward()
                    raise RuntimeError("no C++ compiler\nand more")
                losses["loss_x"] = losses["loss_x"] + FailingBackward.apply(losses["loss_x"])
            return losses

        return compiled

    return compile


@pytest.mark.parametrize("call", [0, 2])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_auto_goes_on_eagerly_with_one_warning_where_compiling_fails(
    where: str, call: int, monkeypatch: pytest.MonkeyPatch, on_cuda: None
) -> None:
    monkeypatch.setattr(torch, "compile", fail_in(where, call))
    update = compile_update(Noisy(), "auto")
    with pytest.warns(UserWarning) as caught:
        for _ in range(4):
            update.forward_backward(torch.ones(3))
            torch.testing.assert_close(update.module.weight.grad, update.gradient)
            update.module.weight.grad = None
    (message,) = (str(warning.message) for warning in caught)
    assert message == (
        "compile=auto failed (RuntimeError: no C++ compiler and more); goes on as compile=off"
    )
    assert update.calls == 5  # one batch was computed again


def test_the_failed_call_s_tensors_are_free_when_the_eager_one_begins(
    monkeypatch: pytest.MonkeyPatch, on_cuda: None
) -> None:
    held: list[weakref.ref] = []

    def compile(function: Callable, **how: Any) -> Callable:
        def compiled(x: torch.Tensor) -> TensorDict:
            activation = x * 2
            held.append(weakref.ref(activation))
            raise RuntimeError(f"no memory for {activation.sum()}")

        return compiled

    monkeypatch.setattr(torch, "compile", compile)
    update, alive = Noisy(), []
    losses = update.losses
    compile_update(update, "auto")
    update.losses = lambda x: alive.extend(ref() is not None for ref in held) or losses(x)
    with pytest.warns(UserWarning, match="no memory"):
        update.forward_backward(torch.ones(3))
    assert alive == [False]


def test_on_raises_where_compiling_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", fail_in("forward", 0))
    message = r"^compile=on failed \(RuntimeError: no C\+\+ compiler and more\); use compile=off$"
    with pytest.raises(RuntimeError, match=message):
        compile_update(Noisy(), "on").forward_backward(torch.ones(3))


def test_an_error_of_the_inputs_is_not_the_compilers(
    monkeypatch: pytest.MonkeyPatch, on_cuda: None
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **how: function)
    update = compile_update(Noisy(), "auto")
    compiled = update.forward_backward
    with warnings.catch_warnings(), pytest.raises(RuntimeError, match="size of tensor"):
        warnings.simplefilter("error")
        update.forward_backward(torch.ones(2))
    assert update.forward_backward is compiled
    assert update.forward_backward(torch.ones(3))["loss_x"].isfinite()


def test_auto_is_eager_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda *args, **how: pytest.fail("compiled"))
    compile_update(Noisy(), "auto").forward_backward(torch.ones(3))


def test_an_unknown_mode_is_named() -> None:
    with pytest.raises(ValueError, match="compile='yes' is unknown; choose auto, on or off"):
        compile_update(Noisy(), "yes")


def assert_same_run(first: Path, second: Path, part: str) -> None:
    """Equal but for rounding, which Adam enlarges where a gradient is nearly nothing but that."""
    ours, theirs = checkpoint(first), checkpoint(second)
    assert ours.keys() == theirs.keys() and ours["step"] == theirs["step"]
    assert torch.equal(ours["rng"]["torch"], theirs["rng"]["torch"])
    assert ours[part].keys() == theirs[part].keys()
    for name, value in ours[part].items():
        assert (value - theirs[part][name]).abs().double().mean() < 3e-5, name  # a step: 3e-4


def test_a_run_continues_compiled_or_not(
    clips: Path, tmp_path: Path, without_inductor: None
) -> None:
    options = {"method": "apv", "clip_len": 4}
    pretrain(pretrain_config(clips, tmp_path / "eager", compile="off", **options))
    for updates, mode in enumerate(("off", "on", "off"), 1):
        options |= {"updates": updates, "compile": mode, "resume": updates > 1}
        pretrain(pretrain_config(clips, tmp_path / "mixed", **options))
    assert_same_run(tmp_path / "mixed", tmp_path / "eager", "model")


def test_compiled_fine_tuning_is_the_eager_one(tmp_path: Path, without_inductor: None) -> None:
    for mode in ("off", "on"):
        options = {"method": "dreamerv2", "env_steps": 40, "eval_episodes": 0, "compile": mode}
        options |= {"batch_length": 3, "horizon": 2}
        finetune(finetune_config(tmp_path / mode, **options))
    assert_same_run(tmp_path / "on", tmp_path / "off", "agent")


@pytest.mark.gpu
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("method", "phase"), [("prelar", "pretrain"), ("prelar", "finetune")])
def test_compiled_updates_on_a_gpu_equal_eager_ones(method, phase, monkeypatch) -> None:
    """Five updates: a CUDA graph is warmed up, recorded, and then replayed."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    results = []
    for mode in ("off", "on"):
        torch.manual_seed(3)
        with torch.device("cuda"):
            model, loss = tiny(method, phase)
        model.to("cuda").double()
        loss.to("cuda").double()
        updates: list[Update] = [WorldModelUpdate(loss)]
        if isinstance(model, Agent):
            updates.append(BehaviorUpdate(model, horizon=3, imag_batch=5))
        for update in updates:
            compile_update(update, mode)
        # Looked at only after the graphs were replayed.
        history = [train_in_float64(updates, batch().to("cuda")) for _ in range(5)]
        results.append((history, model.state_dict(), torch.cuda.get_rng_state()))
    (expected, expected_state, expected_rng), (history, state, rng) = results
    assert torch.equal(rng, expected_rng)
    for ours, theirs in zip(history, expected, strict=True):
        same(ours, theirs)
    for name, value in expected_state.items():
        torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-7)
