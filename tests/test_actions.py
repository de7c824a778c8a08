"""Latent actions from frames, and codes of real actions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from prelar_trl.modules.actions import ActionCode, ActionEncoder, LatentActionEncoder

B, T = 2, 4
VARIANTS: dict[str, tuple[dict[str, Any], int, tuple[int, ...] | None]] = {
    "gaussian": ({"variant": "gaussian", "size": 5}, 5, (5, 2)),
    "deterministic": ({"variant": "deterministic", "size": 5}, 5, None),
    "categorical": ({"variant": "categorical", "size": 5, "classes": 3}, 15, (5, 3)),
    "mixed": ({"variant": "mixed", "size": 5, "deter_size": 4}, 9, (5, 2)),
    "mixed categorical": (
        {"variant": "mixed", "size": 5, "classes": 3, "deter_size": 4},
        19,
        (5, 3),
    ),
}
FRAMES = ["concat", "diff", "catdiff", "flow"]


def make(frames: str = "concat", **code: Any) -> LatentActionEncoder:
    options = {"hidden": 6, "depth": 4, "layers": 1, "norm": "group"}
    return LatentActionEncoder(frames=frames, **options, **code)


def images() -> Tensor:
    return torch.rand(B, T, 3, 64, 64) - 0.5


@pytest.mark.parametrize("frames", FRAMES)
@pytest.mark.parametrize("name", VARIANTS)
def test_latent_actions_have_one_row_per_frame_and_are_zero_at_the_first(
    name: str, frames: str
) -> None:
    code, dim, statistics_shape = VARIANTS[name]
    encoder = make(frames, **code)
    action, statistics = encoder(images(), images())
    assert action.shape == (B, T, dim) == (B, T, encoder.code.dim)
    assert action[:, 0].abs().max() == 0
    assert (action[:, 1:].abs().sum(-1) > 0).all()
    if statistics_shape is None:
        assert statistics is None
    else:
        assert statistics.shape == (B, T - 1, *statistics_shape)


@pytest.mark.parametrize("frames", FRAMES)
def test_latent_action_depends_on_its_two_frames_only(frames: str) -> None:
    encoder, pixels, flow = make(frames), images(), images()
    before, _ = encoder(pixels, flow, sample=False)
    pixels[:, 2] += 0.3
    flow[:, 2] += 0.3
    after, _ = encoder(pixels, flow, sample=False)
    changed = (before != after).any(-1)
    expected = [False, False, True, frames != "flow"]
    assert changed.tolist() == [expected] * B


def test_diff_frames_do_not_see_the_scene() -> None:
    encoder, pixels = make("diff"), images()
    before, _ = encoder(pixels, sample=False)
    after, _ = encoder(pixels + 0.25, sample=False)  # brighter everywhere, same motion
    torch.testing.assert_close(before, after, atol=1e-5, rtol=1e-4)
    encoder = make("concat")
    assert not torch.allclose(
        encoder(pixels, sample=False)[0], encoder(pixels + 0.25, sample=False)[0], atol=1e-3
    )


def test_latent_action_tells_the_order_of_the_frames() -> None:
    encoder, pixels = make(), images()[:, :2]
    forward, _ = encoder(pixels, sample=False)
    backward, _ = encoder(pixels.flip(1), sample=False)
    assert not torch.allclose(forward, backward, atol=1e-4)


def test_flow_must_be_given() -> None:
    with pytest.raises(KeyError, match="key 'flow'"):
        make("flow")(images())


def test_unknown_names_are_errors() -> None:
    with pytest.raises(ValueError, match="frames='both' is unknown"):
        make("both")
    with pytest.raises(ValueError, match="variant='normal' is unknown"):
        ActionCode("normal")
    with pytest.raises(ValueError, match="classes=0"):
        ActionCode("categorical", 4)
    with pytest.raises(ValueError, match="window=0"):
        ActionEncoder(3, window=0)


def test_gaussian_code_has_no_least_std() -> None:
    code = ActionCode("gaussian", 2)
    _, statistics = code(torch.tensor([1.0, 2.0, 0.0, -40.0]))
    torch.testing.assert_close(
        statistics, torch.tensor([[1.0, 1.0], [2.0, 0.0]]), atol=1e-6, rtol=0
    )


def test_only_the_stochastic_part_of_a_code_is_drawn() -> None:
    code = ActionCode("mixed", size=3, deter_size=2)
    raw = torch.randn(8)
    first, second = code(raw)[0], code(raw)[0]
    assert torch.equal(first[:2], raw[:2]) and torch.equal(second[:2], raw[:2])
    assert (first[2:] != second[2:]).all()
    assert torch.equal(code(raw, sample=False)[0], raw[:5])


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("window", [1, 3])
def test_action_encoder_has_every_variant_and_a_window(name: str, window: int) -> None:
    code, dim, statistics_shape = VARIANTS[name]
    encoder = ActionEncoder(3, hidden=6, window=window, **code)
    encoded, statistics = encoder(torch.randn(B, T, 3))
    assert encoded.shape == (B, T, dim)
    assert (statistics is None) == (statistics_shape is None)
    if statistics is not None:
        assert statistics.shape == (B, T, *statistics_shape)


@pytest.mark.parametrize("window", [1, 2, 3])
def test_action_encoder_sees_the_last_actions_only(window: int) -> None:
    encoder, action = ActionEncoder(3, hidden=16, window=window), torch.randn(1, 8, 3)
    before, _ = encoder(action)
    action[:, 4] += 1
    after, _ = encoder(action)
    changed = (before - after).abs().amax(-1)[0] > 1e-6
    assert changed.nonzero().flatten().tolist() == list(range(4, 4 + window))


def test_action_window_starts_with_zeros() -> None:
    encoder, action = ActionEncoder(3, hidden=6, window=3), torch.randn(2, 4, 3)
    padded = torch.cat([torch.zeros(2, 5, 3), action], 1)
    torch.testing.assert_close(encoder(action)[0], encoder(padded)[0][:, 5:])


def test_action_encoder_without_a_window_takes_any_leading_shape() -> None:
    encoder, action = ActionEncoder(3, hidden=6), torch.randn(2, 4, 3)
    torch.testing.assert_close(encoder(action)[0][1, 2], encoder(action[1, 2])[0])
