"""Updates put through ``torch.compile`` equal eager ones."""

from __future__ import annotations

import shutil
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


class Plain(Update):
    """An update with one parameter."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(3, 1), "32", 100.0)

    def losses(self, x: torch.Tensor) -> TensorDict:
        return TensorDict({"loss_x": self.module(x).square().sum()})


def test_on_raises_where_compiling_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile(function: Callable, **how: Any) -> Callable:
        def compiled(*inputs: Any) -> TensorDict:
            raise RuntimeError("no C++ compiler\nand more")

        return compiled

    monkeypatch.setattr(torch, "compile", compile)
    message = r"^compile=on failed \(RuntimeError: no C\+\+ compiler and more\); use compile=off$"
    with pytest.raises(RuntimeError, match=message):
        compile_update(Plain(), "on").forward_backward(torch.ones(3))


def test_auto_is_eager_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda *args, **how: pytest.fail("compiled"))
    compile_update(Plain(), "auto").forward_backward(torch.ones(3))


def test_an_unknown_mode_is_named() -> None:
    with pytest.raises(ValueError, match="compile='yes' is unknown; choose auto, on or off"):
        compile_update(Plain(), "yes")


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
