"""Image networks: shapes, norms and initial weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from prelar_trl.models import make_world_model
from prelar_trl.modules import CNNDecoder, CNNEncoder, ResNetDecoder, ResNetEncoder

NORMS = ["batch", "layer", "group", "none"]


@pytest.mark.parametrize("norm", NORMS)
def test_resnets_have_the_shapes_of_their_stages_and_the_norm_asked_for(norm: str) -> None:
    encoder = ResNetEncoder(3, depth=4, layers=2, norm=norm)
    images = torch.rand(2, 3, 64, 64) - 0.5
    maps = encoder.feature_maps(images)
    shapes = [tuple(x.shape[1:]) for x in maps]
    assert shapes == [(4, 32, 32), (8, 16, 16), (16, 8, 8), (16, 4, 4)]
    assert encoder(images).shape == (2, encoder.embed_dim) == (2, 16 * 4 * 4)
    if norm != "batch":  # channels first
        torch.testing.assert_close(encoder(images), maps[-1].reshape(2, -1))
    for layers in (1, 2):
        decoder = ResNetDecoder(10, depth=4, layers=layers, norm=norm)
        assert decoder(torch.randn(2, 10)).shape == (2, 3, 64, 64)
    kinds = {"batch": nn.BatchNorm2d, "layer": nn.LayerNorm, "group": nn.GroupNorm}
    found = {type(m) for m in encoder.modules() if isinstance(m, tuple(kinds.values()))}
    assert found == ({kinds[norm]} if norm in kinds else set())


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


def test_plain_decoder_works_under_vmap() -> None:
    decoder, feat = CNNDecoder(4, depth=2), torch.randn(2, 3, 4)
    torch.testing.assert_close(torch.vmap(decoder)(feat)[1], decoder(feat[1]))
