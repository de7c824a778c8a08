"""Losses of behavior and labels refuse entries that would broadcast to plausible numbers."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from prelar_trl.objectives import ActorLoss, CriticLoss, LatentActionLoss

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
    loss = LatentActionLoss(nn.Identity(), weights={"action_label": 1.0}, action_dim=2)
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
