"""What losses refuse: entries that would broadcast, layouts, numbers out of their range."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from prelar_trl.modules.latent_actions import GaussianActions
from prelar_trl.modules.pixels import normalize_pixels
from prelar_trl.objectives import (
    ActorLoss,
    CriticLoss,
    LambdaTarget,
    LatentActionLoss,
    RSSMWorldModelLoss,
    VideoBonus,
    functional,
)
from tests.tiny import batch, tiny_world_model


def world_model_loss(**options) -> RSSMWorldModelLoss:
    return RSSMWorldModelLoss(tiny_world_model("dreamerv2", "finetune"), **options)


def latent_action_loss(**options) -> LatentActionLoss:
    return LatentActionLoss(nn.Identity(), **options)


def video_bonus(**options) -> VideoBonus:
    return VideoBonus(8, **options)


def lambda_target(**options) -> LambdaTarget:
    return LambdaTarget(nn.Linear(3, 1), **options)


def test_the_action_must_be_one_vector_of_floats_a_frame() -> None:
    loss = RSSMWorldModelLoss(tiny_world_model("dreamerv2", "finetune"))
    given = batch()
    assert loss(given)["loss_kl"].isfinite()
    with pytest.raises(ValueError, match=r"action is float32 \[2, 4\]; its shape must be .*4, 2\]"):
        loss(given.clone().set("action", torch.zeros(2, 4)))
    with pytest.raises(TypeError, match=r"action is int64 \[2, 4, 2\]; it must be float"):
        loss(given.clone().set("action", torch.zeros(2, 4, 2, dtype=torch.long)))


def test_pixels_with_the_channels_last_are_told() -> None:
    with pytest.raises(ValueError, match=r"pixels have shape \[2, 4, 64, 64, 3\]; .*C, H, W\]"):
        normalize_pixels(torch.zeros(2, 4, 64, 64, 3, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (world_model_loss, {"weights": {"kl": -1.0}}, "kl=-1.0 must be at least 0"),
        (world_model_loss, {"weights": {"kl": float("nan")}}, "kl=nan must be at least 0"),
        (world_model_loss, {"weights": {"picture": 1.0}}, "picture.*image"),
        (world_model_loss, {"kl_balance": 2}, "kl_balance=2"),
        (world_model_loss, {"free_nats": -3}, "free_nats=-3 must be at least 0"),
        (world_model_loss, {"discount": 2}, "discount=2 must lie in"),
        (world_model_loss, {"bonus_scale": -1}, "bonus_scale=-1 must be at least 0"),
        (world_model_loss, {"latent": "foo"}, "latent='foo' is unknown; choose categorical or ga"),
        (latent_action_loss, {"weights": {"rank": 1.0}}, "weight 'rank'.*latent_kl"),
        (latent_action_loss, {"weights": {"latent_kl": -1.0}}, "latent_kl=-1.0 must be at least 0"),
        (latent_action_loss, {"negatives": 0}, "negatives=0"),
        (latent_action_loss, {"temperature": 0}, "temperature=0 must"),
        (latent_action_loss, {"latent": "foo"}, "latent='foo' is unk"),
        (latent_action_loss, {"consistency": "foo"}, "consistency="),
        (video_bonus, {"k": 0}, "k=0 must be at least 1"),
        (video_bonus, {"window": 0}, "window=0 must be at least 1"),
        (video_bonus, {"memory_size": 0}, "memory_size=0 must be at least 1"),
        (video_bonus, {"momentum": 2.0}, "momentum=2.0 must lie in"),
        (ActorLoss, {"gradient": "straight"}, "gradient='straight'"),
        (ActorLoss, {"entropy_scale": -1}, "entropy_scale=-1 must be at least 0"),
        (ActorLoss, {"mix": 2}, "mix=2 must lie in"),
        (lambda_target, {"lmbda": 1.5}, "lmbda=1.5"),
    ],
)
def test_settings_out_of_their_range_are_refused(make, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_points_that_do_not_match_and_empty_sets_are_refused() -> None:
    points, memory, valid = torch.rand(3, 4), torch.rand(5, 4), torch.ones(5, dtype=torch.bool)
    assert functional.knn_distance(points, memory, valid, 2).shape == (3,)
    for bad in (
        (points, memory[:, :3], valid),
        (points, memory, valid[:1]),
        (points, memory, valid.float()),
    ):
        with pytest.raises(ValueError, match=r"must be \[N, P\], \[M, P\], bool \[M\]"):
            functional.knn_distance(*bad, 2)
    with pytest.raises(ValueError, match="not be empty"):
        functional.action_state_consistency(torch.rand(0), torch.rand(0))
    with pytest.raises(ValueError, match="not empty"):
        functional.action_contrast(torch.rand(0, 3))


# Of behavior and labels

N, H = 4, 5


def trajectory(**entries: torch.Tensor) -> TensorDict:
    names = ("value_target", "value", "entropy", "log_prob", "weight")
    steps = {name: torch.rand(N, H + 1, 1) for name in names}
    return TensorDict({"feat": torch.rand(N, H + 1, 3), **steps, **entries}, batch_size=[N, H + 1])


@pytest.mark.parametrize("name", ["value_target", "value", "entropy", "log_prob", "weight"])
def test_the_actor_names_an_entry_of_another_shape(name: str) -> None:
    loss = ActorLoss(gradient="both")
    assert loss(trajectory())["loss_actor"].isfinite()
    with pytest.raises(ValueError, match=rf"{name} \[4, 6\].*shapes must be equal"):
        loss(trajectory(**{name: torch.rand(N, H + 1)}))


@pytest.mark.parametrize("name", ["value_target", "weight"])
def test_the_critic_names_an_entry_of_another_shape(name: str) -> None:
    loss = CriticLoss(nn.Linear(3, 1))
    assert loss(trajectory())["loss_critic"].isfinite()
    with pytest.raises(ValueError, match=rf"{name} \[4, 6\].*shapes must be equal"):
        loss(trajectory(**{name: torch.rand(N, H + 1)}))


def test_an_empty_batch_has_no_loss() -> None:
    for loss in (ActorLoss(), CriticLoss(nn.Linear(3, 1))):
        with pytest.raises(ValueError, match="not empty"):
            loss(trajectory()[:0])


def test_labels_must_fit_the_actions() -> None:
    options = {"weights": {"action_label": 1.0}, "action_dim": 2}
    loss = LatentActionLoss(nn.Identity(), GaussianActions(size=3), **options)
    given = {
        "latent_action": torch.rand(3, 4, loss.latent_actions.dim),
        "latent_action_statistics": torch.rand(3, 4, 2),
        "action": torch.rand(3, 4, 2),
        "labeled": torch.ones(3, 4, 1, dtype=torch.bool),
    }
    assert loss(TensorDict(given, [3, 4]))["loss_action_label"].isfinite()
    for name, bad in (("action", torch.rand(3, 4, 1)), ("labeled", given["labeled"][..., 0])):
        with pytest.raises(ValueError, match=f"{name} is .*its shape must be"):
            loss(TensorDict({**given, name: bad}, [3, 4]))


def test_a_trajectory_too_short_for_the_actor_is_told() -> None:
    with pytest.raises(ValueError, match="3 states at least"):
        ActorLoss()(trajectory()[:, :2])
