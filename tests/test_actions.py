"""Latent actions from frames, and codes of real actions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prelar_trl.models import make_agent, make_world_model
from prelar_trl.modules import ResNetEncoder, make_latent_actions
from prelar_trl.modules.actions import FRAME_CHANNELS, ActionEncoder, LatentActionEncoder
from prelar_trl.modules.latent_actions import GaussianActions

B, T = 2, 4
KINDS: dict[str, tuple[str, dict[str, Any], int, tuple[int, ...] | None]] = {
    "gaussian": ("gaussian", {"size": 5}, 5, (5, 2)),
    "deterministic": ("deterministic", {"size": 5}, 5, None),
    "categorical": ("categorical", {"size": 5, "classes": 3}, 15, (5, 3)),
    "mixed": ("mixed", {"size": 5, "deter_size": 4}, 9, (5, 2)),
    "mixed categorical": ("mixed", {"size": 5, "classes": 3, "deter_size": 4}, 19, (5, 3)),
    "fsq": ("fsq", {"size": 5, "levels": (8, 5, 5)}, 3, None),
    "vq": ("vq", {"size": 5, "codes": 7}, 5, (5,)),
}
FRAMES = ["concat", "diff", "catdiff", "flow"]


def make(
    frames: str = "concat", kind: str = "gaussian", shift: int = 0, **options: Any
) -> LatentActionEncoder:
    network = ResNetEncoder(FRAME_CHANNELS.get(frames, 3), depth=4, layers=1, norm="group")
    latent_actions = make_latent_actions(kind, **{"size": 5, **options})
    return LatentActionEncoder(network, latent_actions, frames=frames, hidden=6, shift=shift)


def action_encoder(kind: str = "deterministic", window: int = 1, **options: Any) -> ActionEncoder:
    latent_actions = make_latent_actions(kind, **{"size": 5, **options})
    return ActionEncoder(3, latent_actions, hidden=16, window=window)


def images() -> Tensor:
    return torch.rand(B, T, 3, 64, 64) - 0.5


@pytest.mark.parametrize("frames", FRAMES)
@pytest.mark.parametrize("name", KINDS)
def test_latent_actions_have_one_row_per_frame_and_are_zero_at_the_first(name, frames) -> None:
    kind, options, dim, params_shape = KINDS[name]
    encoder = make(frames, kind, **options)
    action, params = encoder(images(), images())
    assert action.shape == (B, T, dim) == (B, T, encoder.latent_actions.dim)
    assert not action[:, 0].any()
    assert kind == "fsq" or action[:, 1:].any(-1).all()  # whose middle level is zero
    assert params_shape == (None if params is None else params.shape[2:])
    assert params is None or (params.shape[:2] == (B, T) and not params[:, 0].any())


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
    pixels = images()
    for frames, blind in (("diff", True), ("concat", False)):
        encoder = make(frames)
        before, _ = encoder(pixels, sample=False)
        after, _ = encoder(pixels + 0.25, sample=False)  # brighter everywhere, same motion
        assert torch.allclose(before, after, atol=1e-5 if blind else 1e-3, rtol=1e-4) == blind


def test_shifted_frames_move_alike_and_in_training_only() -> None:
    encoder, pixels = make("catdiff", "deterministic", shift=4), images()
    seen = []
    encoder.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    encoder(pixels)
    before, after, difference = seen[0].chunk(3, 1)
    torch.testing.assert_close(after - before, difference)
    assert not torch.equal(before, pixels[:, :-1].flatten(0, 1))
    encoder.eval()(pixels)
    assert torch.equal(seen[1][:, :3], pixels[:, :-1].flatten(0, 1))


def test_bad_settings_are_errors() -> None:
    with pytest.raises(KeyError, match="key 'flow'"):
        make("flow")(images())
    with pytest.raises(ValueError, match="frames='both' is unknown"):
        make("both")
    with pytest.raises(ValueError, match="shift=-1"):
        make(shift=-1)
    with pytest.raises(ValueError, match="window=0"):
        action_encoder(window=0)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("window", [1, 3])
def test_action_encoder_has_every_kind_and_a_window(name: str, window: int) -> None:
    kind, options, dim, params_shape = KINDS[name]
    encoded, params = action_encoder(kind, window, **options)(torch.randn(B, T, 3))
    assert encoded.shape == (B, T, dim)
    assert params_shape == (None if params is None else params.shape[2:])


@pytest.mark.parametrize("window", [1, 2, 3])
def test_action_encoder_sees_the_last_actions_only_and_zeros_before_the_first(window) -> None:
    encoder, action = action_encoder(window=window), torch.randn(1, 8, 3)
    nn.init.normal_(encoder.hidden.weight)
    before, _ = encoder(action)
    padded = torch.cat([torch.zeros(1, 5, 3), action], 1)
    torch.testing.assert_close(before, encoder(padded)[0][:, 5:])
    action[:, 4] += 1
    changed = (before - encoder(action)[0]).abs().amax(-1)[0] > 1e-6
    assert changed.nonzero().flatten().tolist() == list(range(4, 4 + window))


def test_a_window_begins_as_an_encoder_of_the_last_action_alone_and_learns_the_others() -> None:
    torch.manual_seed(0)
    single = action_encoder()
    torch.manual_seed(0)
    encoder, action = action_encoder(window=3), torch.randn(2, 8, 3)
    single.out.load_state_dict(encoder.out.state_dict())
    torch.testing.assert_close(encoder(action)[0], single(action)[0])
    encoder(action)[0].square().sum().backward()
    assert (encoder.hidden.weight.grad[..., :-1] != 0).any()


def test_an_agents_action_window_begins_as_its_last_action_alone() -> None:
    sizes = {"stoch": 2, "classes": 2, "deter": 8, "head_units": 8, "depth": 2}
    agent = make_agent("prelar_plus", action_dim=3, size="mini", **sizes)
    encoder, action = agent.world_model.action_encoder, torch.randn(2, 12, 3)
    assert encoder.window == 8
    moved = action.clone()
    moved[:, :-1] += 1
    code, other = (encoder(x, sample=False)[0][:, -1] for x in (action, moved))
    assert code.abs().sum() > 0
    torch.testing.assert_close(code, other, rtol=0, atol=0)


class OwnWeights(GaussianActions):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.own = nn.Linear(2, 2)
        nn.init.eye_(self.own.weight)


def test_a_kind_of_latent_action_keeps_its_own_initialization() -> None:
    kind = f"{__name__}:{OwnWeights.__name__}"
    model = make_world_model("prelar", "pretrain", action_dim=0, size="mini", latent_action=kind)
    assert torch.equal(model.latent_action_encoder.latent_actions.own.weight, torch.eye(2))


@pytest.mark.parametrize("window", [1, 3])
def test_the_last_actions_alone_give_what_a_sequence_of_them_does(window: int) -> None:
    encoder, action = action_encoder(window=window), torch.randn(2, 5, 3)
    nn.init.normal_(encoder.hidden.weight)
    whole = encoder(action)[0]
    last = action[:, -window:]
    torch.testing.assert_close(encoder.encode(last)[0], whole[:, -1])
    torch.testing.assert_close(encoder.encode(last[None])[0], whole[None, :, -1])
    assert encoder.encode(last[0])[0].shape == whole.shape[-1:]
    for wrong in (torch.randn(2, window + 1, 3), torch.randn(2, window, 4)):
        with pytest.raises(ValueError, match=f"the window {window} and the action's size 3"):
            encoder.encode(wrong)


def test_action_encoder_without_a_window_takes_any_leading_shape() -> None:
    encoder, action = action_encoder(), torch.randn(2, 4, 3)
    torch.testing.assert_close(encoder(action)[0][1, 2], encoder(action[1, 2])[0])
