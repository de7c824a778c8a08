"""What losses refuse: entries that would broadcast, layouts, numbers out of their range."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prelar_trl.modules.world_model import normalize_pixels
from prelar_trl.objectives import (
    ActorLoss,
    LatentActionLoss,
    RSSMWorldModelLoss,
    VideoBonus,
    functional,
)
from tests.tiny import batch, tiny_world_model


def latent_action_loss(**options) -> LatentActionLoss:
    return LatentActionLoss(nn.Identity(), **options)


def video_bonus(**options) -> VideoBonus:
    return VideoBonus(8, **options)


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
    ("options", "message"),
    [
        ({"weights": {"kl": -1.0}}, "kl=-1.0 must be at least 0"),
        ({"weights": {"kl": float("nan")}}, "kl=nan must be at least 0"),
        ({"free_nats": -3}, "free_nats=-3 must be at least 0"),
        ({"discount": 2}, "discount=2 must lie in"),
        ({"bonus_scale": -1}, "bonus_scale=-1 must be at least 0"),
        ({"latent": "foo"}, "latent='foo' is unknown; choose categorical or gaussian"),
    ],
)
def test_the_world_model_loss_knows_its_ranges(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RSSMWorldModelLoss(tiny_world_model("dreamerv2", "finetune"), **options)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (video_bonus, {"k": 0}, "k=0 must be at least 1"),
        (video_bonus, {"window": 0}, "window=0 must be at least 1"),
        (video_bonus, {"memory_size": 0}, "memory_size=0 must be at least 1"),
        (video_bonus, {"momentum": 2.0}, "momentum=2.0 must lie in"),
        (ActorLoss, {"entropy_scale": -1}, "entropy_scale=-1 must be at least 0"),
        (ActorLoss, {"mix": 2}, "mix=2 must lie in"),
        (
            latent_action_loss,
            {"temperature": 0},
            "temperature=0 must",
        ),
        (
            latent_action_loss,
            {"latent": "foo"},
            "latent='foo' is unk",
        ),
        (latent_action_loss, {"consistency": "foo"}, "consistency="),
        (
            latent_action_loss,
            {"weights": {"latent_kl": -1.0}},
            "latent_kl=-1.0 must be at least 0",
        ),
    ],
)
def test_the_other_losses_know_theirs(make, options: dict, message: str) -> None:
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
