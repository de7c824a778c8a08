"""ContextWM's context branch: augmentations, which sequence gets which context, masking."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prelar_trl.modules import context
from prelar_trl.modules.context import ContextDecoder, ContextEncoder, ContextLayer, augment

AUGMENTATIONS = ["shift", "shift4", "flip", "scale", "erasing"]


def context_maps() -> list[Tensor]:
    return [torch.randn(2, c, side, side) for c, side in ((4, 32), (8, 16), (16, 8))]


def pictures(count: int = 16) -> Tensor:
    return torch.rand(count, 3, 64, 64) - 0.5


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_each_image_is_changed_by_a_draw_of_its_own_and_keeps_its_range(name: str) -> None:
    images = pictures(1).expand(16, 3, 64, 64)
    out = augment(images, name)
    assert out.shape == images.shape
    assert out.abs().max() <= 0.5 + 1e-6
    changed = (out != images).flatten(1).any(1).sum()
    assert changed >= (4 if name in ("flip", "erasing") else 12)
    different = {tuple(x.flatten()[::97].tolist()) for x in out}
    assert len(different) >= (2 if name == "flip" else 5)


def test_no_augmentation_is_the_identity_and_an_unknown_one_an_error() -> None:
    images = pictures(2)
    assert augment(images, "none") is images
    with pytest.raises(ValueError, match="augmentation='blur' is unknown"):
        ContextEncoder(depth=4, augmentation="blur")


@pytest.mark.parametrize(("name", "pad"), [("shift", 8), ("shift4", 4)])
def test_shift_moves_the_picture_by_at_most_its_pad(name: str, pad: int) -> None:
    rows = torch.linspace(-0.5, 0.5, 64).view(1, 1, 64, 1).expand(200, 3, 64, 64)
    out = augment(rows, name)
    assert torch.equal(out[..., 0], out[..., -1])  # rows stay rows
    moved = ((out[:, 0, 32, 0] - rows[:, 0, 32, 0]) * 63).round()
    assert set(moved.tolist()) == set(float(x) for x in range(-pad, pad + 1))


def test_flip_mirrors_about_half_of_the_images() -> None:
    images = pictures(200)
    out = augment(images, "flip")
    flipped, same = ((out == x).flatten(1).all(1) for x in (images.flip(-1), images))
    assert (flipped ^ same).all() and 70 < flipped.sum() < 130


def test_erasing_grays_a_rectangle_of_the_right_area() -> None:
    images = torch.full((400, 3, 64, 64), 0.3)
    erased = augment(images, "erasing")[:, 0] == 0  # [400, 64, 64]
    area = erased.flatten(1).float().mean(1)
    assert 150 < (area > 0).sum() < 250
    seen = area[area > 0]
    assert seen.min() < 0.06 and seen.max() < 0.36 and seen.max() > 0.25
    rows, columns = erased.any(2), erased.any(1)
    assert torch.equal(erased, rows[:, :, None] & columns[:, None, :])


def test_scale_zooms_into_a_part_of_the_picture() -> None:
    ramp = torch.linspace(-0.5, 0.5, 64).expand(100, 3, 64, 64)
    out = augment(ramp, "scale")
    width = out[:, 0, 0, -1] - out[:, 0, 0, 0]  # the share of the width that is left
    assert (width <= 1 + 1e-5).all() and width.min() < 0.85 and width.min() > 0.65


def test_context_is_one_frame_of_each_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = ContextEncoder(depth=4, layers=1, norm="group")
    images = pictures(6).unflatten(0, (2, 3))
    monkeypatch.setattr(context, "draw_frames", lambda *args: torch.tensor([2, 0]))
    maps = encoder(images)
    expected = encoder.net.feature_maps(torch.stack([images[0, 2], images[1, 0]]))[:-1]
    assert [tuple(x.shape[1:]) for x in maps] == [(4, 32, 32), (8, 16, 16), (16, 8, 8)]
    for ours, theirs in zip(maps, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_context_frames_are_drawn_uniformly() -> None:
    drawn = context.draw_frames(4000, 5, torch.device("cpu"))
    assert (drawn.bincount(minlength=5).sub(800).abs() < 120).all()


def test_a_context_reaches_the_frames_of_its_own_sequence_only() -> None:
    decoder = ContextDecoder(10, depth=4, layers=1, norm="none", dropout=0.0)
    feat, maps = torch.randn(2 * 3, 10), context_maps()  # 2 sequences of 3 frames
    outputs = []
    for change in (0, 1):
        for x in maps:
            x[1] += change
        torch.manual_seed(1)
        outputs.append(decoder(feat, maps).unflatten(0, (2, 3)))
    before, after = outputs
    torch.testing.assert_close(before[0], after[0])
    assert ((before[1] - after[1]).abs().amax((1, 2, 3)) > 1e-5).all()


def test_each_frame_sees_its_own_quarter_of_the_context_or_without_a_mask_all() -> None:
    x = torch.randn(1, 8, 8, 8).expand(6, 8, 8, 8)  # six times the same frame
    source = torch.randn(1, 8, 8, 8, requires_grad=True)
    for mask, count in ((0.75, 16), (0.0, 64)):
        out = ContextLayer(8, 8, "none", 8, mask=mask, dropout=0.0)(x, source)
        assert torch.allclose(out[0], out[1]) == (mask == 0)
        (gradient,) = torch.autograd.grad(out[0].square().sum(), source)
        assert (gradient.abs().sum(1) > 0).sum() == count


def test_only_even_layers_below_32_attend_and_positions_start_at_zero() -> None:
    decoder = ContextDecoder(10, depth=4, layers=2, norm="none")
    attends = [[isinstance(layer, ContextLayer) for layer in stage] for stage in decoder.stages]
    assert attends == [[True, False], [True, False], [False, False]]
    layer = decoder.stages[0][0]
    decoder(torch.randn(2, 10), context_maps()).square().sum().backward()
    for position in (layer.query_position, layer.key_position):
        assert not position.any() and position.grad.any()
