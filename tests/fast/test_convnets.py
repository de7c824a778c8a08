"""Fast image networks: the plain ones' numbers with fewer products and less memory."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from prelar_trl.fast import accelerate, convnets
from prelar_trl.fast.convnets import upsampled_conv2d
from prelar_trl.modules import CNNDecoder, CNNEncoder, ResNetDecoder
from prelar_trl.modules.convnets import ResidualLayer


def test_convolving_an_upsampled_map_needs_no_upsampling() -> None:
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    plain = F.conv2d(F.interpolate(x, scale_factor=2.0), weight, padding=1)
    ours = upsampled_conv2d(x, weight)
    torch.testing.assert_close(ours, plain)
    mix = torch.randn_like(plain)
    gradients = [torch.autograd.grad((y * mix).sum(), (x, weight)) for y in (ours, plain)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", ["batch", "none"])
@pytest.mark.parametrize("channels", [6, 4])
def test_a_residual_layer_does_its_own_upsampling(channels: int, norm: str, training: bool) -> None:
    plain = ResidualLayer(6, channels, norm, 8).double().train(training)
    fast = accelerate(copy.deepcopy(plain))
    x = torch.randn(3, 6, 4, 4, dtype=torch.float64)
    expected = plain(F.interpolate(x, scale_factor=2.0))
    torch.testing.assert_close(fast(x, upsample=True), expected)
    torch.testing.assert_close(fast.checkpointed(x, upsample=True), expected)
    torch.testing.assert_close(fast(x), plain(x))


@pytest.mark.parametrize("layers", [1, 2])
def test_the_decoder_is_the_plain_one(layers: int) -> None:
    plain, feat = ResNetDecoder(3, depth=4, layers=layers).double(), torch.randn(2, 3).double()
    torch.testing.assert_close(accelerate(copy.deepcopy(plain))(feat), plain(feat))


def test_the_first_layer_of_the_plain_cnn_decoder_is_a_matrix_product() -> None:
    plain = CNNDecoder(6, depth=2)
    for conv in plain.convs:
        nn.init.normal_(conv.bias)
    fast, inputs = accelerate(copy.deepcopy(plain)), []
    for conv in fast.convs:
        conv.register_forward_hook(lambda _, x, __: inputs.append(x[0].shape[-1]))
    feat = torch.randn(2, 3, 6)
    torch.testing.assert_close(fast(feat[0]), plain(feat[0]), rtol=1e-4, atol=1e-5)
    assert inputs == [5, 13, 30]
    torch.testing.assert_close(torch.vmap(fast)(feat)[1], plain(feat[1]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("network", [CNNEncoder, CNNDecoder])
def test_plain_cnns_take_some_frames_at_a_time(
    network: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = accelerate(network(3, depth=4))
    x = torch.randn(7, 3, 64, 64) if network is CNNEncoder else torch.randn(7, 3)
    results, frames = [], []
    for conv in model.convs:
        conv.register_forward_hook(lambda _, inputs, __: frames.append(len(inputs[0])))
    for chunk in (7, 3):
        monkeypatch.setattr(convnets, "CHUNK", chunk)
        frames.clear()
        y = model(x)
        results.append((y, torch.autograd.grad(y.square().sum(), tuple(model.parameters()))))
        assert max(frames) == chunk
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


def test_images_are_computed_channels_last() -> None:
    model = accelerate(ResNetDecoder(3, depth=4))
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and min(module.weight.shape) > 1:
            assert module.weight.is_contiguous(memory_format=torch.channels_last)
