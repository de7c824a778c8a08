"""Sequences in other colors: what videos of another look are prepared for by."""

from __future__ import annotations

import pytest
import torch

from prelar_trl.modules.augmentation import recolor
from tests.tiny import batch, tiny_world_model


def sequences(count: int, views: int = 1, channels: int = 3) -> torch.Tensor:
    return torch.rand(count, 3, views * channels, 8, 8) * 0.1 - 0.05


def test_about_the_share_of_the_sequences_is_in_other_colors_and_the_rest_untouched() -> None:
    images = sequences(400)
    changed = (recolor(images, 0.25) != images).flatten(1)
    assert (changed.any(1) == changed.float().mean(1).gt(0.9)).all()  # all of a sequence, or none
    assert 60 < changed.any(1).sum() < 140
    assert torch.equal(recolor(images, 0.0), images)


def test_colors_keep_their_distances_from_frame_to_frame_up_to_a_contrast() -> None:
    images = sequences(50)
    out = recolor(images, 1.0)
    inside = (out.abs() < 0.5).flatten(1).all(1)  # nothing was cut off
    assert inside.sum() > 30

    def distances(x: torch.Tensor) -> torch.Tensor:
        """Between the colors of neighbouring pixels, and of one frame and the next."""
        across = x[..., 1:].sub(x[..., :-1]).norm(dim=2).flatten(1)
        return torch.cat([across, x.diff(dim=1).norm(dim=2).flatten(1)], 1)[inside]

    ratio = distances(out) / distances(images)
    contrast = ratio.mean(1, keepdim=True)
    torch.testing.assert_close(ratio, contrast.expand_as(ratio), rtol=1e-3, atol=1e-4)
    assert contrast.min() > 0.5 - 1e-3 and contrast.max() < 1.3 + 1e-3
    assert contrast.max() - contrast.min() > 0.4


def test_colors_turn_each_way_and_lie_anywhere() -> None:
    images = sequences(300)
    out = recolor(images, 1.0)
    red, means = images[:, :, :1].flatten(1), out.mean((1, 3, 4))
    alike = [
        torch.corrcoef(torch.stack([a, b.flatten()]))[0, 1]
        for a, b in zip(red, out[:, :, 0], strict=True)
    ]
    assert min(alike) < -0.8 and max(alike) > 0.8
    assert means.min() < -0.35 and means.max() > 0.35
    assert out.abs().max() <= 0.5


@pytest.mark.parametrize("channels", [1, 3])
def test_views_are_in_the_same_colors(channels: int) -> None:
    one = sequences(20, channels=channels)
    out = recolor(torch.cat([one, one], 2), 1.0, channels)
    torch.testing.assert_close(out[:, :, :channels], out[:, :, channels:])


@pytest.mark.parametrize("gray", [False, True])
def test_the_encoder_alone_sees_them_and_in_training_alone(gray: bool) -> None:
    model = tiny_world_model(
        "prelar", "pretrain", recolor=1.0, gray=gray, sample=False, norm="none"
    )
    data = batch()
    plain = tiny_world_model("prelar", "pretrain", gray=gray, sample=False, norm="none")
    plain.load_state_dict(model.state_dict())
    ours, theirs = model(data.clone()), plain(data.clone())
    assert torch.equal(ours["latent_action"], theirs["latent_action"])
    assert torch.equal(ours["pixels"], theirs["pixels"])
    assert not torch.allclose(ours["embed"], theirs["embed"])
    assert torch.equal(model.eval()(data.clone())["embed"], plain.eval()(data.clone())["embed"])
