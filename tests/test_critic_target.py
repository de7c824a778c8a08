"""The critic loss's target parameters, under TorchRL's updaters."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import pytest
import torch
from tensordict import TensorDict
from torchrl.objectives import HardUpdate, SoftUpdate

from prelar_trl.modules import MLP
from prelar_trl.objectives import CriticLoss, LambdaTarget
from tests.tiny import has_gradient

N, H, F = 4, 5, 6


def trajectory() -> TensorDict:
    scalars = {name: torch.rand(N, H + 1, 1) for name in ("reward", "discount", "weight")}
    feat = torch.randn(N, H + 1, F, requires_grad=True)
    return TensorDict({"feat": feat, **scalars}, batch_size=[N, H + 1])


@pytest.mark.parametrize(
    ("make_updater", "steps", "moved"),
    [
        (partial(SoftUpdate, tau=0.25), 1, 0.25),
        (partial(HardUpdate, value_network_update_interval=3), 3, 0.0),
        (partial(HardUpdate, value_network_update_interval=3), 4, 1.0),
    ],
)
def test_torchrls_updaters_move_the_target(make_updater: Callable, steps: int, moved: float):
    td, loss = trajectory(), CriticLoss(MLP(F, 1, 1, 8))
    updater, target = make_updater(loss), LambdaTarget(loss.target_value)
    before = [p.clone() for p in loss.target_critic_params.values(True, True)]
    optimizer = torch.optim.SGD(loss.parameters(), lr=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # TorchRL's, that no updater is associated
        loss(target(td))["loss_critic"].backward()
    optimizer.step()
    for _ in range(steps):
        updater.step()
    own = loss.critic_params.values(True, True)
    targets = loss.target_critic_params.values(True, True)
    for old, new, parameter in zip(before, targets, own, strict=True):
        assert (parameter - old).abs().max() > 0
        torch.testing.assert_close(new, torch.lerp(old, parameter.data, moved))


def test_the_target_is_the_critic_at_first_and_stands_still_while_it_learns() -> None:
    td, critic = trajectory(), MLP(F, 1, 1, 8)
    loss = CriticLoss(critic)
    first = critic(td["feat"]).detach()
    torch.testing.assert_close(loss.target_value(td["feat"]), first)
    with torch.no_grad():
        critic.out.bias += 1
    torch.testing.assert_close(loss.value(td["feat"]), first + 1)
    torch.testing.assert_close(loss.target_value(td["feat"]), first)


def test_target_parameters_get_no_gradient_but_the_features_do() -> None:
    td, critic = trajectory(), MLP(F, 1, 1, 8)
    loss = CriticLoss(critic)
    assert {id(p) for p in loss.parameters()} == {id(p) for p in critic.parameters()}
    loss.target_value(td["feat"]).sum().backward()
    assert td["feat"].grad.abs().max() > 0 and not has_gradient(critic)


def test_the_target_is_saved() -> None:
    td, loss = trajectory(), CriticLoss(MLP(F, 1, 1, 8))
    with torch.no_grad():
        loss.critic.out.bias += 1
    other = CriticLoss(MLP(F, 1, 1, 8))
    other.load_state_dict(loss.state_dict())
    torch.testing.assert_close(other.target_value(td["feat"]), loss.target_value(td["feat"]))
    torch.testing.assert_close(other.value(td["feat"]), loss.value(td["feat"]))


def test_without_target_parameters_the_loss_is_the_same() -> None:
    td, critic = trajectory(), MLP(F, 1, 1, 8)
    plain, delayed = CriticLoss(critic, delay_value=False), CriticLoss(critic)
    td = LambdaTarget(delayed.target_value)(td)
    torch.testing.assert_close(plain(td)["loss_critic"], delayed(td)["loss_critic"])
    with pytest.raises(RuntimeError, match="delay_value"):
        plain.target_value(td["feat"])
