"""torch's private interfaces: which of them the installed torch has, and what happens without."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from prelar_trl.fast import accelerate, checkpointing, linear, private, rssm
from tests.tiny import batch, tiny_world_model


def broken(what: str, instead: str) -> str:
    return f"torch {torch.__version__} broke {what}: prelar_trl.fast now {instead}"


def test_the_installed_torch_has_all_of_them() -> None:
    assert hasattr(torch._C, "_are_functorch_transforms_active"), broken(
        "torch._C._are_functorch_transforms_active", "never uses oneDNN, nor checkpoints"
    )
    if torch.backends.mkldnn.is_available():
        assert private.onednn_linear() is not None, broken(
            "torch.ops.mkldnn._linear_pointwise", "multiplies through MKL"
        )
    assert private.fused_adam_skips("cpu"), broken(
        "found_inf of the fused Adam", "waits for the GPU to know whether an update is skipped"
    )
    assert hasattr(torch.ops.aten, "_unsafe_view"), broken(
        "torch.ops.aten._unsafe_view", "copies what a linear layer of three dimensions gives"
    )
    assert private.layer_norm_ops() is not None, broken(
        "torch.ops.aten.native_layer_norm", "keeps the GRU's gates for the backward pass"
    )
    assert private.selective_checkpointing() is not None, broken(
        "torch.utils.checkpoint.create_selective_checkpoint_contexts", "keeps all activations"
    )


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
def test_onednn_is_found_whatever_the_default_device_and_dtype_are() -> None:
    private.onednn_linear.cache_clear()
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            assert private.onednn_linear() is not None
    finally:
        torch.set_default_dtype(before)
        private.onednn_linear.cache_clear()


def test_functorch_is_seen() -> None:
    seen: list[bool] = [private.functorch_is_active()]
    torch.vmap(lambda x: seen.append(private.functorch_is_active()) or x)(torch.ones(2))
    assert seen == [False, True]


def test_without_an_answer_functorch_counts_as_active(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.delattr(torch._C, "_are_functorch_transforms_active")
        active = private.functorch_is_active()
    assert active


def test_an_operation_that_changed_its_arguments_is_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Changed:
        @staticmethod
        def default(x: torch.Tensor) -> torch.Tensor:
            return x

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", Changed)
    assert private.onednn_linear.__wrapped__() is None


def without_functorch(monkeypatch: pytest.MonkeyPatch) -> None:
    for user in (checkpointing, linear, rssm):
        monkeypatch.setattr(user, "functorch_is_active", lambda: True)


def without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "onednn_linear", lambda: None)


def without_unsafe_view(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "unsafe_view", lambda x, shape: x.view(shape).clone())


def without_layer_norm_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rssm, "layer_norm_ops", lambda: None)


def without_selective_checkpointing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpointing, "selective_checkpointing", lambda: None)


@pytest.mark.parametrize(
    "take_away",
    [
        without_functorch,
        without_onednn,
        without_unsafe_view,
        without_layer_norm_ops,
        without_selective_checkpointing,
    ],
)
def test_without_one_of_them_the_model_is_the_same(
    take_away, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = tiny_world_model(sample=False, norm="none")
    fast, data = accelerate(copy.deepcopy(plain)), batch()
    take_away(monkeypatch)
    results = []
    for model in (plain, fast):
        out = model(data.clone())
        out["prediction", "pixels"].square().sum().backward()
        results.append((out["prediction", "pixels"], [p.grad for p in model.parameters()]))
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-3)


def test_a_copy_instead_of_the_private_view(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.arange(6.0)
    assert torch.equal(private.unsafe_view(x, [2, 3]), x.view(2, 3))
    monkeypatch.setattr(torch.ops, "aten", nn.Module())
    assert torch.equal(private.unsafe_view(x, [2, 3]), x.view(2, 3))
