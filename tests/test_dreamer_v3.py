"""Latent actions on TorchRL's DreamerV3: layout, dynamics, losses."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.modules import RSSMPosteriorV3, RSSMPriorV3, RSSMRolloutV3

from prelar_trl.data import to_dreamer_v3
from prelar_trl.modules import (
    V3_KEYS,
    InferredActions,
    LatentActionEncoder,
    PriorV3Logits,
    make_latent_actions,
)
from prelar_trl.objectives import LatentActionLoss, total_loss
from tests.tiny import batch, has_gradient

S, K, D, U, E = 3, 4, 8, 5, 6


class Encoder(nn.Sequential):
    embed_dim = 10

    def __init__(self, channels: int) -> None:
        super().__init__(nn.AvgPool2d(32), nn.Flatten(), nn.Linear(channels * 4, self.embed_dim))


def make_rollout() -> RSSMRolloutV3:
    sizes = {"hidden_dim": 16, "rnn_hidden_dim": D, "num_categoricals": S, "num_classes": K}
    return RSSMRolloutV3(
        TensorDictModule(
            RSSMPriorV3(action_shape=(U,), action_dim=U, **sizes),
            ["state", "belief", "latent_action"],
            [("next", "prior_logits"), ("next", "state"), ("next", "belief")],
        ),
        TensorDictModule(
            RSSMPosteriorV3(obs_embed_dim=E, **sizes),
            [("next", "belief"), ("next", "encoded_latents")],
            [("next", "posterior_logits"), ("next", "state")],
        ),
    )


def predicted(kind: str = "gaussian") -> tuple[TensorDict, RSSMRolloutV3, InferredActions]:
    """A batch of frames of which TorchRL's rollout has seen the latent actions."""
    rollout = make_rollout()
    latent = make_latent_actions(kind, size=U)
    actions = InferredActions(LatentActionEncoder(Encoder(6), latent, hidden=16))
    data = to_dreamer_v3(batch(4, 5), state_dim=S * K, belief_dim=D)
    data["next", "encoded_latents"] = torch.randn(4, 5, E)
    return rollout(actions(data)), rollout, actions


def test_what_led_to_a_frame_lies_beside_it() -> None:
    frames = batch(2, 4)
    frames["is_first"][1, 2] = True  # a window of another episode
    frames["terminated"][0, 3] = True
    steps = to_dreamer_v3(frames, state_dim=6, belief_dim=7)
    assert steps["state"].shape == (2, 4, 6) and steps["belief"].shape == (2, 4, 7)
    torch.testing.assert_close(steps["action"], frames["action"])
    torch.testing.assert_close(steps["next", "pixels"], frames["pixels"])
    torch.testing.assert_close(steps["next", "reward"], frames["reward"])
    assert steps["is_init"].nonzero()[:, :2].tolist() == [[0, 0], [1, 0], [1, 2]]
    assert steps["next", "done"].nonzero()[:, :2].tolist() == [[0, 3], [1, 1]]
    assert steps["next", "terminated"].nonzero()[:, :2].tolist() == [[0, 3]]


def test_a_video_has_no_action_and_no_reward() -> None:
    steps = to_dreamer_v3(batch().select("pixels", "is_first"), state_dim=6, belief_dim=7)
    assert "action" not in steps.keys()
    assert not steps["next", "reward"].any() and not steps["next", "done"].any()


def test_the_own_action_steps_to_the_prior_of_the_rollout() -> None:
    out, rollout, _ = predicted()
    before = [out[V3_KEYS[key]][:, :-1].flatten(0, 1) for key in ("stoch", "deter")]
    dynamics = PriorV3Logits(rollout.rssm_prior.module)
    logits = dynamics(*before, out["latent_action"][:, 1:].flatten(0, 1))
    torch.testing.assert_close(logits, out[V3_KEYS["prior"]][:, 1:].flatten(0, 1))


@pytest.mark.parametrize("kind", ["gaussian", "deterministic"])
def test_no_action_leads_to_the_first_frame(kind: str) -> None:
    out, _, actions = predicted(kind)
    assert not out["latent_action"][:, 0].any() and out["latent_action"][:, 1:].all()
    assert ("latent_action_statistics" in out.keys()) == (kind == "gaussian")
    assert set(actions.out_keys) <= set(out.keys())


def test_the_losses_train_the_inverse_model_and_the_prior() -> None:
    out, rollout, actions = predicted()
    prior = rollout.rssm_prior.module
    weights = {"latent_kl": 1.0, "action_state_consistency": 1.0, "action_contrast": 1.0}
    loss = LatentActionLoss(
        PriorV3Logits(prior), actions.encoder.latent_actions, weights=weights, negatives=2
    )
    loss.set_keys(**V3_KEYS)
    losses = loss(out)
    assert set(weights) <= set(losses.keys())
    total_loss(losses).backward()
    assert has_gradient(actions) and has_gradient(prior)
