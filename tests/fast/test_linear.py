"""Linear layers: equal to torch's own whatever the shape, layout or mode."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prelar_trl.fast import linear as module
from prelar_trl.fast.linear import (
    OneDNNLinear,
    TimeBatchedLinear,
    cached_autocast_weights,
    cast_to_autocast,
    linear,
)
from prelar_trl.fast.private import onednn_linear

IN, OUT = 24, 10


def gradients(function, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    y = function(x, weight, bias)
    inputs = [t for t in (x, weight, bias) if t is not None]
    return y, *torch.autograd.grad(y.square().sum(), inputs)


@pytest.fixture
def onednn_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each product that oneDNN computed."""
    calls: list[int] = []
    product = module._product
    monkeypatch.setattr(module, "_product", lambda *args: calls.append(1) or product(*args))
    return calls


@pytest.mark.parametrize("shape", [(1, IN), (7, IN), (3, 5, IN), (2, 3, 5, IN), (0, IN)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_values_and_gradients_are_those_of_torch(
    shape: tuple[int, ...], with_bias: bool, onednn_calls: list[int]
) -> None:
    x = torch.randn(shape, requires_grad=True)
    weight = torch.randn(OUT, IN, requires_grad=True)
    bias = torch.randn(OUT, requires_grad=True) if with_bias else None
    ours = gradients(linear, x, weight, bias)
    torch.testing.assert_close(ours, gradients(F.linear, x, weight, bias), rtol=1e-5, atol=1e-4)
    assert len(onednn_calls) == (2 if onednn_linear() else 0)


def test_slices_and_transposed_inputs() -> None:
    wide = torch.randn(OUT, IN + 3, requires_grad=True)
    x = torch.randn(IN, 7).t().requires_grad_()
    ours = gradients(linear, x, wide[:, :IN], None)
    theirs = gradients(F.linear, x, wide[:, :IN], None)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


def test_a_weight_by_columns_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    by_columns = torch.randn(IN, OUT, requires_grad=True)
    x = torch.randn(7, IN, requires_grad=True)
    expected = gradients(F.linear, x, by_columns.t(), None)
    weights: list[Tensor] = []
    product = module._product
    monkeypatch.setattr(
        module, "_product", lambda x, weight, *b: weights.append(weight) or product(x, weight, *b)
    )
    y = linear(x, by_columns.t())
    to_x, to_weight = torch.autograd.grad(y.square().sum(), (x, by_columns))
    torch.testing.assert_close((y, to_x, to_weight.t()), expected, rtol=1e-5, atol=1e-4)
    assert to_weight.is_contiguous()
    assert {w.data_ptr() for w in weights} <= {by_columns.data_ptr()}


def test_gradient_of_a_sum_is_no_stranger() -> None:
    x, layer = torch.randn(7, IN, requires_grad=True), OneDNNLinear(IN, OUT)
    (gradient,) = torch.autograd.grad(layer(x).sum(), x)  # an expanded gradient, strides of zero
    torch.testing.assert_close(gradient, layer.weight.sum(0).expand(7, IN))


def test_only_what_needs_a_gradient_gets_one(onednn_calls: list[int]) -> None:
    layer = OneDNNLinear(IN, OUT)
    layer(torch.randn(7, IN)).sum().backward()
    assert layer.weight.grad is not None
    assert len(onednn_calls) == (1 if onednn_linear() else 0)


def test_a_frozen_layer_keeps_no_input() -> None:
    frozen = OneDNNLinear(IN, OUT).requires_grad_(False)
    x = torch.randn(7, IN, requires_grad=True)
    hidden = 2 * x
    released = weakref.ref(hidden)
    y = frozen(hidden)
    del hidden
    assert released() is None
    y.sum().backward()
    torch.testing.assert_close(x.grad, 2 * frozen.weight.sum(0).expand(7, IN))


def test_other_modes_take_torch_s_kernels(onednn_calls: list[int]) -> None:
    layer, x = OneDNNLinear(IN, OUT), torch.randn(7, IN)
    expected = F.linear(x, layer.weight, layer.bias)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    torch.testing.assert_close(layer.double()(x.double()).float(), expected)
    layer.float()
    torch.testing.assert_close(torch.vmap(layer)(x), expected)
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager")(x), expected)
    assert layer.to("meta")(x.to("meta")).is_meta
    assert not onednn_calls


def test_frozen_weights_are_cached_in_the_type_of_autocast() -> None:
    frozen, trained = OneDNNLinear(IN, OUT).requires_grad_(False), OneDNNLinear(OUT, OUT)
    x = torch.randn(7, IN, requires_grad=True)

    def gradient() -> Tensor:
        return torch.autograd.grad(trained(frozen(x)).float().square().sum(), x)[0]

    with torch.autocast("cpu", torch.bfloat16):
        expected = gradient()
        with cached_autocast_weights(nn.Sequential(frozen, trained), None):
            assert frozen.cast[0].dtype == torch.bfloat16 and trained.cast is None
            torch.testing.assert_close(gradient(), expected, rtol=0, atol=0)
    assert frozen.cast is None
    with cached_autocast_weights(frozen):
        assert frozen.cast[0] is frozen.weight


def test_no_cached_weight_is_left_behind_when_a_cast_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layers = nn.Sequential(OneDNNLinear(IN, OUT), OneDNNLinear(OUT, OUT)).requires_grad_(False)
    casts = iter([layers[0].bias, layers[0].weight])
    monkeypatch.setattr(module, "cast_to_autocast", lambda x: next(casts))
    with pytest.raises(RuntimeError, match="StopIteration"), cached_autocast_weights(layers):
        pass
    assert all(layer.cast is None for layer in layers)


def test_cast_to_autocast_casts_what_autocast_would() -> None:
    assert cast_to_autocast(torch.ones(2)).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert cast_to_autocast(torch.ones(2)).dtype == torch.bfloat16
        assert cast_to_autocast(torch.ones(2).double()).dtype == torch.float64


def test_an_activation_may_work_in_place() -> None:
    layer = OneDNNLinear(IN, OUT)
    for shape in ((7, IN), (3, 5, IN)):
        x = torch.randn(shape, requires_grad=True)
        (ours,) = torch.autograd.grad(F.elu(layer(x), inplace=True).square().sum(), x)
        (theirs,) = torch.autograd.grad(
            F.elu(F.linear(x, layer.weight, layer.bias)).square().sum(), x
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_wrong_width_says_so() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        OneDNNLinear(IN, OUT)(torch.randn(7, IN + 1))


def test_time_batched_weight_gradients_are_those_of_every_step() -> None:
    weight = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, 2, 5, dtype=torch.float64, requires_grad=True)
    mix = torch.randn(5, 3, dtype=torch.float64)
    start = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def unroll(layer: Callable[[Tensor, int], Tensor]) -> Tensor:
        x, outputs = start, []
        for t in range(4):
            outputs.append(layer(x, t))
            x = torch.tanh(outputs[-1]) @ mix
        return torch.stack(outputs).square().sum()

    layer = TimeBatchedLinear(weight, bias)
    leaves = (weight, bias, start)
    ours = torch.autograd.grad(unroll(lambda x, t: layer(x)), leaves)
    plain = torch.autograd.grad(unroll(lambda x, t: x @ weight.t() + bias[t]), leaves)
    torch.testing.assert_close(ours, plain)
