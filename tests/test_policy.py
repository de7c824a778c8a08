"""Acting: the recurrent policy in TorchRL's environments."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tensordict import TensorDict
from torchrl.envs import EnvBase, SerialEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type

from prelar_trl.envs import make_env
from prelar_trl.modules import WorldModelPolicy
from tests.tiny import tiny_agent

AGENTS: dict[str, tuple[str, dict]] = {
    "dreamerv2": ("dreamerv2", {}),
    "prelar": ("prelar", {}),
    "window": ("prelar", {"action_window": 3}),
    "stacked": ("apv", {}),
    "context": ("contextwm", {}),
    "gaussian": ("prelar", {"classes": 0}),
}


def make_policy(name: str, mode: str = "sample", sample: bool = False) -> WorldModelPolicy:
    method, options = AGENTS[name]
    agent = tiny_agent(method, sample=sample, **options).eval()
    return WorldModelPolicy(agent.world_model, agent.actor, mode)


def with_belief(env: EnvBase, policy: WorldModelPolicy) -> EnvBase:
    return env.append_transform(policy.make_primer())


def toy(policy: WorldModelPolicy, **options) -> EnvBase:
    return with_belief(make_env("toy", **options), policy)


def training_batch(rollout: TensorDict) -> TensorDict:
    """A rollout ``[B, T]`` in the layout of training: the action that led to the frame."""
    action = torch.roll(rollout["action"], 1, dims=1)
    action[:, 0] = 0
    first = rollout["is_first"]
    action = action * ~first
    return TensorDict(
        {"pixels": rollout["pixels"], "is_first": first, "action": action},
        batch_size=rollout.batch_size,
    )


def observed(policy: WorldModelPolicy, rollout: TensorDict) -> TensorDict:
    with torch.no_grad():
        return policy.world_model(training_batch(rollout))


def assert_beliefs_are_those_of(
    observation: TensorDict, rollout: TensorDict, policy: WorldModelPolicy
) -> None:
    belief = rollout["next", "belief"]
    for key in ("stoch", "deter"):
        torch.testing.assert_close(belief[key], observation[key], atol=1e-5, rtol=1e-4)
        if policy.world_model.lower_rssm is not None:
            lower = observation["lower", key]
            torch.testing.assert_close(belief[f"lower_{key}"], lower, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", AGENTS)
def test_the_belief_of_a_rollout_is_what_training_observes(name: str) -> None:
    policy = make_policy(name)
    rollout = toy(policy).rollout(6, policy)
    assert rollout["action"].shape == (6, 2)
    assert rollout["action"].abs().max() < 1
    rollout = rollout.unsqueeze(0)
    assert_beliefs_are_those_of(observed(policy, rollout), rollout, policy)


@pytest.mark.parametrize("name", ["dreamerv2", "window", "stacked"])
def test_several_environments_at_once_give_each_its_own_belief(name: str) -> None:
    policy = make_policy(name)
    makers: list[Callable[[], EnvBase]] = [
        lambda seed=seed: make_env("toy", seed=seed) for seed in range(3)
    ]
    env = with_belief(SerialEnv(3, makers), policy)
    rollout = env.rollout(4, policy)
    assert rollout.batch_size == (3, 4)
    assert not torch.equal(rollout["pixels"][0], rollout["pixels"][1])
    assert_beliefs_are_those_of(observed(policy, rollout), rollout, policy)


@pytest.mark.parametrize("name", ["dreamerv2", "window", "stacked"])
def test_a_new_episode_forgets_the_one_before(name: str) -> None:
    policy = make_policy(name)
    env = toy(policy, max_steps=3)
    rollout = env.rollout(7, policy, break_when_any_done=False)
    first = rollout["is_first"].squeeze(-1)
    assert first.nonzero().flatten().tolist() == [0, 3, 6]
    episode = rollout[3:6].unsqueeze(0)
    assert_beliefs_are_those_of(observed(policy, episode), episode, policy)


def test_is_first_resets_the_belief_by_itself() -> None:
    policy = make_policy("window", mode="mode")
    td = toy(policy).reset()
    fresh = policy(td.clone())
    dirty = td.clone()
    dirty["belief"] = dirty["belief"].apply(torch.randn_like)
    assert torch.equal(policy(dirty.clone())["action"], fresh["action"])
    for key in ("stoch", "deter", "actions"):
        assert torch.equal(
            policy(dirty.clone())["next", "belief", key], fresh["next", "belief", key]
        )
    dirty["is_first"] = torch.zeros_like(dirty["is_first"])
    assert not torch.equal(
        policy(dirty)["next", "belief", "deter"], fresh["next", "belief", "deter"]
    )


def test_the_belief_matters_for_the_action() -> None:
    policy = make_policy("dreamerv2", mode="mode")
    td = toy(policy).reset()
    td["is_first"] = torch.zeros_like(td["is_first"])
    before = policy(td.clone())["action"]
    td["belief", "deter"] = torch.randn_like(td["belief", "deter"])
    assert not torch.equal(policy(td)["action"], before)


def test_mode_gives_the_same_action_twice_and_sample_does_not() -> None:
    for mode, same in (("mode", True), ("sample", False)):
        policy = make_policy("prelar", mode=mode)
        td = toy(policy).reset()
        first, second = policy(td.clone())["action"], policy(td.clone())["action"]
        assert torch.equal(first, second) == same
    with pytest.raises(ValueError, match="mode='greedy' is unknown; choose sample or mode"):
        make_policy("prelar", mode="greedy")


@pytest.mark.parametrize("kind", [ExplorationType.DETERMINISTIC, ExplorationType.MODE])
def test_the_exploration_type_of_torchrl_is_followed(kind: ExplorationType) -> None:
    policy = make_policy("prelar")
    td = toy(policy).reset()
    mode = make_policy("prelar", mode="mode")
    mode.load_state_dict(policy.state_dict())
    with set_exploration_type(kind):
        assert torch.equal(policy(td.clone())["action"], mode(td.clone())["action"])
    with set_exploration_type(ExplorationType.RANDOM):
        assert not torch.equal(policy(td.clone())["action"], mode(td.clone())["action"])
        assert torch.equal(mode(td.clone())["action"], mode(td.clone())["action"])


def test_latents_are_drawn_in_evaluation_too() -> None:
    policy = make_policy("prelar", mode="mode", sample=True)
    td = toy(policy).reset()
    drawn = {
        tuple(policy(td.clone())["next", "belief", "stoch"].flatten().tolist()) for _ in range(9)
    }
    assert len(drawn) > 1


def test_the_policy_remembers_the_last_actions_of_its_window() -> None:
    policy = make_policy("window")
    rollout = toy(policy).rollout(4, policy)
    actions = rollout["next", "belief", "actions"]  # [T, window, A]
    for t in range(4):
        recent = torch.cat([torch.zeros(3, 2), rollout["action"][: t + 1]])[-3:]
        torch.testing.assert_close(actions[t], recent)


def test_acting_needs_no_gradient_and_changes_no_network() -> None:
    policy = make_policy("prelar")
    before = {name: x.clone() for name, x in policy.state_dict().items()}
    rollout = toy(policy).rollout(3, policy)
    assert not rollout["action"].requires_grad
    for name, value in policy.state_dict().items():
        assert torch.equal(value, before[name])
