"""CNNs of non-overlapping kernels: shapes, the convolutions they are, and size=mini."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from prelar_trl.models import make_agent, make_world_model, make_world_model_loss
from prelar_trl.modules.patchnets import PatchDecoder, PatchEncoder
from prelar_trl.objectives import total_loss
from prelar_trl.updates import WorldModelUpdate
from tests.tiny import ACTION_DIM, PHASES, batch


def test_shapes_of_images_and_weights() -> None:
    encoder, decoder = PatchEncoder(6, depth=4), PatchDecoder(7, depth=4)
    assert encoder(torch.randn(2, 6, 64, 64)).shape == (2, 256) and encoder.embed_dim == 256
    assert decoder(torch.randn(2, 7)).shape == (2, 3, 64, 64)
    shapes = [[tuple(x.shape) for x in net.parameters()] for net in (encoder, decoder)]
    assert shapes[0] == [(4, 6, 4, 4), (4,), (16, 4, 4, 4), (16,)]
    assert shapes[1] == [(256, 7), (256,), (64, 16), (64,), (48, 4), (48,)]


def test_the_encoder_reads_each_patch_by_itself() -> None:
    encoder, image = PatchEncoder(3, depth=4), torch.randn(1, 3, 64, 64)
    other = image.clone()
    other[..., 16:32, 48:] += 1  # the patch in row 1 and column 3 of the last map
    before, after = (encoder(x).view(16, 4, 4) for x in (image, other))
    changed = (before != after).any(0)
    assert changed.nonzero().tolist() == [[1, 3]]


def test_the_decoder_is_two_transposed_convolutions() -> None:
    decoder, feat = PatchDecoder(7, depth=4).double(), torch.randn(2, 7).double()
    x = decoder.linear_in(feat).view(2, 4, 4, 16).permute(0, 3, 1, 2)
    for layer in decoder.patches:
        c_in, c_out = layer.in_features, layer.out_features // 16
        conv = nn.ConvTranspose2d(c_in, c_out, 4, stride=4).double()
        # A row of the layer is (row, column, channel) of the patch; its bias may differ by place.
        weight = layer.weight.view(4, 4, c_out, c_in).permute(3, 2, 0, 1)
        conv.weight.data, conv.bias = weight, None
        bias = layer.bias.view(4, 4, c_out).permute(2, 0, 1)
        x = conv(F.elu(x)) + bias.repeat(1, x.shape[2], x.shape[3])
    torch.testing.assert_close(decoder(feat), x)


@pytest.mark.parametrize(("method", "phase"), PHASES)
def test_size_mini_has_patch_networks_and_trains_every_method(method: str, phase: str) -> None:
    sizes, bonus = {"action_dim": ACTION_DIM, "size": "mini"}, None
    if phase == "pretrain":
        model = make_world_model(method, phase, **sizes)
    else:
        agent = make_agent(method, **sizes)
        model, bonus = agent.world_model, agent.video_bonus
    for network, kind in ((model.encoder, PatchEncoder), (model.decoder, PatchDecoder)):
        assert isinstance(network, kind) == (method != "contextwm")
    loss = make_world_model_loss(method, phase, model, video_bonus=bonus)
    assert total_loss(WorldModelUpdate(loss)(batch(2, 6))).isfinite()
