"""Image networks: shapes, norms and initial weights."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from prelar_trl.models import make_world_model
from prelar_trl.modules import CNNDecoder, CNNEncoder, ResNetDecoder, ResNetEncoder, convnets
from prelar_trl.modules.convnets import ResidualLayer, UpsampledConv2d

NORMS = ["batch", "layer", "group", "none"]


@pytest.mark.parametrize("norm", NORMS)
def test_resnet_encoder_gives_embed_dim_and_a_map_per_stage(norm: str) -> None:
    encoder = ResNetEncoder(3, depth=4, layers=2, norm=norm)
    images = torch.rand(2, 3, 64, 64) - 0.5
    assert encoder(images).shape == (2, encoder.embed_dim) == (2, 16 * 4 * 4)
    shapes = [tuple(x.shape[1:]) for x in encoder.feature_maps(images)]
    assert shapes == [(4, 32, 32), (8, 16, 16), (16, 8, 8), (16, 4, 4)]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("layers", [1, 2])
def test_resnet_decoder_gives_an_image(norm: str, layers: int) -> None:
    decoder = ResNetDecoder(10, depth=4, layers=layers, norm=norm)
    assert decoder(torch.randn(2, 10)).shape == (2, 3, 64, 64)


def test_stages_set_the_size_of_embedding_and_first_map() -> None:
    encoder, decoder = ResNetEncoder(3, depth=4, stages=2), ResNetDecoder(10, depth=4, stages=2)
    assert encoder(torch.zeros(1, 3, 64, 64)).shape == (1, encoder.embed_dim) == (1, 8 * 8 * 8)
    assert decoder.first_map == (8, 8, 8)
    assert decoder(torch.zeros(1, 10)).shape == (1, 3, 64, 64)


def test_plain_cnn_has_the_shapes_of_dreamerv2() -> None:
    encoder, decoder = CNNEncoder(3, depth=4), CNNDecoder(10, depth=4)
    assert encoder(torch.zeros(2, 3, 64, 64)).shape == (2, encoder.embed_dim) == (2, 32 * 4)
    assert decoder(torch.randn(2, 10)).shape == (2, 3, 64, 64)
    assert CNNEncoder().embed_dim == 1536
    assert ResNetEncoder().embed_dim == 3072


def test_embedding_is_flattened_channels_first() -> None:
    encoder = ResNetEncoder(3, depth=4, norm="none")
    images = torch.rand(2, 3, 64, 64)
    last = encoder.feature_maps(images)[-1]
    expected = torch.stack([last[:, c] for c in range(16)], 1).reshape(2, -1)
    torch.testing.assert_close(encoder(images), expected)


@pytest.mark.parametrize(
    ("norm", "kind", "count"),
    [("batch", nn.BatchNorm2d, 8), ("layer", nn.LayerNorm, 8), ("group", nn.GroupNorm, 8)],
)
def test_norm_is_the_one_asked_for(norm: str, kind: type[nn.Module], count: int) -> None:
    modules = list(ResNetEncoder(3, depth=4, layers=1, norm=norm).modules())
    norms = (nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)
    assert sum(isinstance(m, kind) for m in modules) == count
    assert sum(isinstance(m, norms) for m in modules) == count


def test_unknown_norm_is_an_error() -> None:
    with pytest.raises(ValueError, match="norm='instance' is unknown"):
        ResNetEncoder(3, depth=4, norm="instance")


def test_only_batch_norm_mixes_images() -> None:
    images = torch.rand(3, 3, 64, 64)
    for norm in NORMS:
        encoder = ResNetEncoder(3, depth=4, layers=1, norm=norm)
        alone, together = encoder(images[:1]), encoder(images)[:1]
        assert torch.allclose(alone, together, atol=1e-5) == (norm != "batch"), norm


def test_residual_layer_changes_channels_first_in_the_encoder_and_last_in_the_decoder() -> None:
    encoder, decoder = ResNetEncoder(3, depth=4), ResNetDecoder(10, depth=4)
    assert [len(layer.skip) for layer in encoder.stages[1]] == [2, 0]
    assert [len(layer.skip) for layer in decoder.stages[1]] == [0, 2]


def test_weights_start_xavier_uniform_and_biases_zero() -> None:
    model = make_world_model("apv", "pretrain", action_dim=2, size="tiny")
    checked = 0
    for layer in model.modules():
        if not isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            continue
        receptive = math.prod(layer.weight.shape[2:])
        fans = (layer.weight.shape[0] + layer.weight.shape[1]) * receptive
        bound = math.sqrt(6 / fans)
        assert layer.weight.abs().max() <= bound
        if layer.weight.numel() > 2000:
            assert layer.weight.abs().max() > 0.98 * bound
            assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.06)
            checked += 1
        if layer.bias is not None:
            assert layer.bias.abs().max() == 0
    assert checked > 10


def test_norm_layers_start_at_their_defaults() -> None:
    model = make_world_model("prelar", "pretrain", action_dim=2, size="tiny")
    for layer in model.modules():
        if isinstance(layer, (nn.BatchNorm2d, nn.LayerNorm)):
            assert (layer.weight == 1).all() and (layer.bias == 0).all()
    assert model.rssm.cell.norm.eps == 1e-3


def test_convolving_an_upsampled_map_needs_no_upsampling() -> None:
    conv = UpsampledConv2d(3, 5, 3, padding=1, bias=False).double()
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    larger = nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")
    plain = nn.functional.conv2d(larger, conv.weight, padding=1)
    torch.testing.assert_close(conv(x), plain)
    mix = torch.randn_like(plain)
    for a, b in zip(
        torch.autograd.grad((conv(x) * mix).sum(), (x, conv.weight)),
        torch.autograd.grad((plain * mix).sum(), (x, conv.weight)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", ["batch", "none"])
@pytest.mark.parametrize("channels", [6, 4])
def test_residual_layer_is_its_formula(channels: int, norm: str, training: bool) -> None:
    layer = ResidualLayer(6, channels, norm, 8, upsample=True).double().train(training)
    x = torch.randn(3, 6, 4, 4, dtype=torch.float64)
    up = F.interpolate(x, scale_factor=2.0)
    first, *rest = layer.block
    y = F.conv2d(up, first.weight, padding=1)
    for module in rest:
        y = module(y)
    expected = (layer.skip(up) + y).relu()
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.by_branches(x), expected)


@pytest.mark.parametrize("layers", [1, 2])
def test_resnet_decoder_is_its_chain_of_layers(layers: int) -> None:
    decoder = ResNetDecoder(3, depth=4, layers=layers)
    feat = torch.randn(2, 3)
    x = decoder.linear_in(feat).unflatten(1, decoder.first_map)
    for stage in decoder.stages:
        x = stage(x)
    torch.testing.assert_close(decoder(feat), decoder.conv_out(x))


def test_plain_decoder_is_its_chain_of_transposed_convolutions() -> None:
    decoder, feat = CNNDecoder(6, depth=2), torch.randn(3, 6)
    x = decoder.linear_in(feat)[..., None, None]
    for i, conv in enumerate(decoder.convs):
        torch.nn.init.normal_(conv.bias)
        x = conv(nn.functional.elu(x) if i else x)
    torch.testing.assert_close(decoder(feat), x)


def test_plain_decoder_works_under_vmap() -> None:
    decoder, feat = CNNDecoder(4, depth=2), torch.randn(2, 3, 4)
    torch.testing.assert_close(torch.vmap(decoder)(feat)[1], decoder(feat[1]))


@pytest.mark.parametrize("network", [CNNEncoder, CNNDecoder])
def test_plain_networks_take_some_frames_at_a_time(
    network: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network(3, depth=4)
    x = torch.randn(7, 3, 64, 64) if network is CNNEncoder else torch.randn(7, 3)
    results, frames = [], []
    for conv in model.convs:
        conv.register_forward_hook(lambda _, inputs, __: frames.append(len(inputs[0])))
    for part in (7, 3):
        monkeypatch.setattr(convnets, "PART", part)
        frames.clear()
        y = model(x)
        results.append((y, torch.autograd.grad(y.square().sum(), tuple(model.parameters()))))
        assert max(frames) == part
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
