"""NaN and infinity stay out of weights, checkpoints and environments."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.envs import SerialEnv

from prelar_trl.envs import make_env
from prelar_trl.envs.toy import ToyEnv
from prelar_trl.updates import BehaviorUpdate, Update, WorldModelUpdate
from tests.test_updates import start
from tests.tiny import batch, tiny, tiny_agent


def poisoned(data: TensorDict) -> TensorDict:
    """With a reward that the model cannot be trained on."""
    data = data.clone()
    data["reward"][0, 1] = torch.nan
    return data


def state(update: Update, module: nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor that an update moves."""
    tensors = {f"module.{name}": x.clone() for name, x in module.state_dict().items()}
    for name, optimizer in update.optimizers.items():
        for number, moments in copy.deepcopy(optimizer.state_dict()["state"]).items():
            tensors |= {f"{name}.{number}.{key}": x for key, x in moments.items()}
    return tensors


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> list[str]:
    return [name for name, x in before.items() if not torch.equal(x, after[name])]


@pytest.mark.parametrize("method", ["dreamerv2", "prelar"])
def test_an_update_that_is_not_finite_moves_nothing(method: str) -> None:
    torch.manual_seed(0)
    agent, loss = tiny(method, "finetune")
    update = WorldModelUpdate(loss, frozen_updates=0)
    update(batch())
    before = state(update, loss)
    for count in (1, 2):
        losses = update(poisoned(batch()))
        assert not losses["loss_reward"].isfinite()
        assert changed(before, state(update, loss)) == []
        assert (int(update.skipped), int(update.skipped_in_a_row)) == (count, count)
    update(batch())
    assert (int(update.skipped), int(update.skipped_in_a_row)) == (2, 0)
    assert changed(before, state(update, loss))
    assert all(x.isfinite().all() for x in loss.state_dict().values())
    again = WorldModelUpdate(loss, frozen_updates=0)
    again.load_state_dict(update.state_dict())
    assert int(again.skipped) == 2


def test_statistics_of_a_skipped_batch_are_forgotten() -> None:
    _, loss = tiny("prelar", "finetune")
    norms = [m for m in loss.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and loss.video_bonus is not None
    update = WorldModelUpdate(loss)
    update(batch())
    before = state(update, loss)
    with torch.no_grad():
        hooks = [loss.world_model.encoder.register_forward_hook(lambda *x: x[2] * torch.nan)]
    update(batch())
    assert changed(before, state(update, loss)) == []
    hooks[0].remove()


def test_the_scale_of_rewards_knows_no_skipped_batch() -> None:
    agent = tiny_agent()
    update = BehaviorUpdate(agent, horizon=3, reward_norm_momentum=0.9)
    update(start())
    before = update.reward_norm.magnitude.clone()
    bad = start()
    bad["deter"][0, 0] = torch.nan
    update(bad)
    assert int(update.skipped_in_a_row) == 1
    assert torch.equal(update.reward_norm.magnitude, before)
    update(start())
    assert int(update.skipped) == 1 and not torch.equal(update.reward_norm.magnitude, before)


def test_the_actor_and_the_critic_skip_together() -> None:
    agent = tiny_agent()
    update = BehaviorUpdate(agent, horizon=3)
    update(start())
    before = state(update, agent)
    bad = start()
    bad["deter"][0, 0] = torch.nan
    update(bad)
    assert int(update.skipped_in_a_row) == 1 and changed(before, state(update, agent)) == []


def test_a_huge_gradient_is_skipped_too() -> None:
    _, loss = tiny("dreamerv2", "finetune")
    update, data = WorldModelUpdate(loss), batch()
    before = state(update, loss)
    data["reward"][:] = 1e30
    update(data)
    assert int(update.skipped) == 1 and changed(before, state(update, loss)) == []


class Rewards(ToyEnv):
    """The toy, whose third step gives another reward."""

    reward, steps = 0.0, 0

    def _step(self, tensordict: TensorDict) -> TensorDict:
        out = super()._step(tensordict)
        type(self).steps += 1
        if type(self).steps == 3:
            out["reward"] = torch.full_like(out["reward"], self.reward)
        return out


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (float("nan"), "is NaN or infinite: mend the environment"),
        (-float("inf"), "is NaN or infinite"),
        (1e30, r"1e\+30 is beyond 1e\+08: scale the environment's rewards"),
        (-1e9, r"-1e\+09 is beyond"),
    ],
)
def test_a_bad_reward_is_named_where_it_enters(
    reward: float, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Rewards, "reward", reward)
    monkeypatch.setattr(Rewards, "steps", 0)
    env = make_env(Rewards, max_steps=10)
    place = "the reward at step 3 of an episode of environment Rewards "
    with pytest.raises(ValueError, match=re.escape(place) + message):
        env.rollout(5)


def test_rewards_up_to_the_bound_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rewards, "reward", -1e8)
    monkeypatch.setattr(Rewards, "steps", 0)
    assert make_env(Rewards, max_steps=10).rollout(5)["next", "reward"].min() == -1e8


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_environment_sees_an_action_that_is_not_finite(
    value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Rewards, "steps", 0)
    env = make_env(Rewards, max_steps=10)
    td, td_next = env.step_and_maybe_reset(env.rand_action(env.reset()))
    td_next["action"] = torch.tensor([0.0, value])
    with pytest.raises(ValueError, match="action is NaN or infinite at step 2 of an episode"):
        env.step(td_next)
    assert Rewards.steps == 1


def test_of_several_environments_the_one_is_named() -> None:
    env = make_env(SerialEnv(2, ToyEnv), max_steps=10)
    place = "step 1 of an episode, worker 1, of environment SerialEnv"
    try:
        td = env.rand_action(env.reset())
        td["action"][1, 0] = torch.nan
        with pytest.raises(ValueError, match=f"action is NaN or infinite at {place}"):
            env.step(td)
        following = TensorDict(
            {"reward": torch.tensor([[1.0], [1e30]]), "step_count": torch.ones(2, 1)}, [2]
        )
        with pytest.raises(ValueError, match=f"the reward at {place} "):
            env.transform[-1]._step(td, following)
    finally:
        env.close(raise_if_closed=False)
