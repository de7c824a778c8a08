"""Networks that keep little for the backward pass: the same numbers, less memory."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from prelar_trl.fast import accelerate, convnets
from prelar_trl.fast.checkpointing import CheckpointedBatchNorm2d, checkpoint_convs
from prelar_trl.modules import ResNetDecoder, ResNetEncoder
from prelar_trl.modules.rssm import GRUCell


def plain(function: Callable, *inputs: Tensor) -> Tensor:
    return function(*inputs)


class LiveBytes(TorchDispatchMode):
    """Bytes of the results of operations that are alive, but for the weights."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.weights = {p.untyped_storage()._cdata for p in model.parameters()}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        result = operation(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            storage = x.untyped_storage()
            if storage._cdata not in self.sizes.keys() | self.weights:
                self.sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, storage._cdata, None)
        return result


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes that are kept between the forward and the backward pass, the result included."""
    with LiveBytes(model) as live:
        y = model(x)
        kept = sum(live.sizes.values())
    y.sum().backward()
    return kept


@pytest.mark.parametrize("norm", ["batch", "layer", "group", "none"])
@pytest.mark.parametrize("network", [ResNetEncoder, ResNetDecoder])
def test_gradients_and_statistics_are_those_of_keeping_everything(
    network: type, norm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = accelerate(network(3, depth=4, norm=norm)).train()
    theirs = copy.deepcopy(ours)
    x = torch.randn(5, 3, 64, 64) if network is ResNetEncoder else torch.randn(5, 3)
    results = []
    for model in (ours, theirs):
        for _ in range(2):  # the second pass reads the statistics of the first
            y = model(x)
            y.square().sum().backward()
        results.append((y, [p.grad for p in model.parameters()], model.state_dict()))
        monkeypatch.setattr(convnets, "checkpoint_convs", plain)
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_batch_norm_counts_a_batch_once() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), CheckpointedBatchNorm2d(4))
    x = torch.randn(2, 3, 8, 8)
    checkpoint_convs(model, x).sum().backward()
    assert model[1].num_batches_tracked == 1
    torch.testing.assert_close(model[1].running_mean, 0.1 * model[0](x).mean((0, 2, 3)))


def test_an_evaluated_batch_norm_uses_its_statistics_both_times() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), CheckpointedBatchNorm2d(4)).eval()
    x = torch.randn(2, 3, 8, 8)
    checkpoint_convs(model, x).square().sum().backward()
    ours = model[0].weight.grad.clone()
    model.zero_grad()
    model(x).square().sum().backward()
    torch.testing.assert_close(ours, model[0].weight.grad, rtol=0, atol=0)


@pytest.mark.parametrize("network", [ResNetEncoder, ResNetDecoder])
def test_more_than_half_of_the_memory_is_saved(
    network: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = accelerate(network(3)).train()  # of the published width
    x = torch.randn(4, 3, 64, 64) if network is ResNetEncoder else torch.randn(4, 3)
    ours = kept_bytes(model, x)
    monkeypatch.setattr(convnets, "checkpoint_convs", plain)
    assert 0 < ours < 0.45 * kept_bytes(model, x)


@pytest.mark.parametrize("network", [ResNetEncoder, ResNetDecoder])
def test_no_convolution_with_many_products_runs_twice(
    network: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    def count() -> int:
        model = accelerate(network(3)).train()  # of the published width
        x = torch.randn(2, 3, 64, 64) if network is ResNetEncoder else torch.randn(2, 3)
        with FlopCounterMode(display=False) as counter:
            model(x).sum().backward()
        return counter.get_total_flops()

    ours = count()
    monkeypatch.setattr(convnets, "checkpoint_convs", plain)
    assert count() <= ours < 1.05 * count()


def test_the_last_output_is_freed_before_earlier_layers_get_gradients() -> None:
    first, last = nn.Conv2d(3, 4, 8), nn.Conv2d(4, 4, 8)  # the last is not computed twice
    alive: list[bool] = []

    def function(x: Tensor) -> Tensor:
        hidden = first(x)
        hidden.register_hook(lambda _: alive.append(kept() is not None))
        return last(hidden.relu())

    y = checkpoint_convs(function, torch.randn(2, 3, 20, 20))
    kept = weakref.ref(y.untyped_storage())
    loss = y.square().sum()
    del y
    assert kept() is not None
    loss.backward()
    assert alive == [False]


def test_a_step_of_imagination_keeps_the_gates_only_once() -> None:
    size, rows = 32, 5
    plain = GRUCell(size, size)
    x, deter = torch.randn(2, rows, size, requires_grad=True)
    results, kept = [], []
    for cell in (accelerate(copy.deepcopy(plain)), plain):
        with LiveBytes(cell) as live:
            y = cell(x, deter)
            kept.append(sum(live.sizes.values()) / (4 * rows * size))
        weights = list(cell.parameters())
        results.append((y, torch.autograd.grad(y.square().sum(), (x, deter, *weights))))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
    # Input (2), gates (3), new state (1); plainly also norm (3), both sigmoids, product and tanh.
    assert 6 <= kept[0] < 7 and kept[1] >= 12


def test_nothing_is_recomputed_where_no_gradient_is_wanted() -> None:
    model, x = accelerate(ResNetEncoder(3, depth=4)).eval(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert model(x).grad_fn is None


def test_a_network_may_run_twice_under_one_autocast() -> None:
    model, x = accelerate(ResNetEncoder(3, depth=4)).train(), torch.randn(2, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            model(x)
        loss = (model(x) + model(x)).float().sum()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("network", [ResNetEncoder, ResNetDecoder])
def test_without_checkpoints_everything_is_kept(network: type) -> None:
    x = torch.randn(2, 3, 64, 64) if network is ResNetEncoder else torch.randn(2, 3)
    with_them, without = (
        kept_bytes(accelerate(network(3, depth=4), checkpoint=on), x) for on in (True, False)
    )
    assert with_them < 0.7 * without
