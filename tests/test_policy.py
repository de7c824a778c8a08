"""Acting: the recurrent policy in TorchRL's environments."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tensordict import TensorDict
from torchrl.envs import EnvBase, SerialEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type

from prelar_trl.envs import make_env
from prelar_trl.fast import accelerate
from prelar_trl.modules import StatefulPolicy, WorldModelPolicy
from tests.tiny import tiny_agent
from tests.toy_runs import different

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


def assert_beliefs_are_what_training_observes(
    rollout: TensorDict, policy: WorldModelPolicy
) -> None:
    """A rollout ``[B, T]`` against its observation: each action led to the frame after it."""
    data = rollout.select("pixels", "is_first")
    action = torch.roll(rollout["action"], 1, dims=1) * ~rollout["is_first"]
    action[:, 0] = 0
    with torch.no_grad():
        observed = policy.world_model(data.set("action", action))
    belief = rollout["next", "belief"]
    for key in ("stoch", "deter"):
        torch.testing.assert_close(belief[key], observed[key], atol=1e-5, rtol=1e-4)
        if policy.world_model.lower_rssm is not None:
            lower = observed["lower", key]
            torch.testing.assert_close(belief[f"lower_{key}"], lower, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", AGENTS)
def test_the_belief_of_a_rollout_is_what_training_observes(name: str) -> None:
    policy = make_policy(name)
    before = {name: x.clone() for name, x in policy.state_dict().items()}
    rollout = toy(policy).rollout(6, policy)
    action = rollout["action"]
    assert action.shape == (6, 2) and action.abs().max() < 1 and not action.requires_grad
    assert different(before, dict(policy.state_dict())) == []
    assert_beliefs_are_what_training_observes(rollout.unsqueeze(0), policy)
    if name == "window":
        for t, recent in enumerate(rollout["next", "belief", "actions"]):  # [window, A]
            expected = torch.cat([torch.zeros(3, 2), action[: t + 1]])[-3:]
            torch.testing.assert_close(recent, expected)


@pytest.mark.parametrize("name", ["dreamerv2", "window", "stacked"])
def test_several_environments_at_once_give_each_its_own_belief(name: str) -> None:
    policy = make_policy(name)
    makers = [partial(make_env, "toy", seed=seed) for seed in range(3)]
    rollout = with_belief(SerialEnv(3, makers), policy).rollout(4, policy)
    assert rollout.batch_size == (3, 4)
    assert not torch.equal(rollout["pixels"][0], rollout["pixels"][1])
    assert_beliefs_are_what_training_observes(rollout, policy)


@pytest.mark.parametrize("name", ["dreamerv2", "window", "stacked"])
def test_a_new_episode_forgets_the_one_before(name: str) -> None:
    policy = make_policy(name)
    rollout = toy(policy, max_steps=3).rollout(7, policy, break_when_any_done=False)
    first = rollout["is_first"].squeeze(-1)
    assert first.nonzero().flatten().tolist() == [0, 3, 6]
    assert_beliefs_are_what_training_observes(rollout[3:6].unsqueeze(0), policy)


def test_is_first_resets_the_belief_by_itself_and_else_it_matters() -> None:
    policy = make_policy("window", mode="mode")
    td = toy(policy).reset()
    fresh, dirty = policy(td.clone()), td.clone()
    dirty["belief"] = dirty["belief"].apply(torch.randn_like)
    for key in ("action", *(("next", "belief", name) for name in ("stoch", "deter", "actions"))):
        assert torch.equal(policy(dirty.clone())[key], fresh[key])
    dirty["is_first"] = torch.zeros_like(dirty["is_first"])
    for key in ("action", ("next", "belief", "deter")):
        assert not torch.equal(policy(dirty.clone())[key], fresh[key])


@pytest.mark.parametrize("name", ["stacked", "window"])
def test_a_policy_that_keeps_its_belief_acts_as_in_a_rollout_of_torchrl(name: str) -> None:
    policy = make_policy(name, sample=True)
    rollouts = []
    for env, act in (
        (toy(policy, seed=0, max_steps=3), policy),
        (make_env("toy", seed=0, max_steps=3), StatefulPolicy(policy, torch.device("cpu"))),
    ):
        torch.manual_seed(0)
        rollouts.append(env.rollout(7, act, break_when_any_done=False))
    assert torch.equal(rollouts[0]["action"], rollouts[1]["action"])
    assert torch.equal(rollouts[0]["pixels"], rollouts[1]["pixels"])


def test_a_policy_that_begins_within_an_episode_begins_as_at_its_start() -> None:
    policy = make_policy("window", mode="mode")
    encoder = policy.world_model.action_encoder
    assert encoder is not None
    torch.nn.init.normal_(encoder.out.bias)  # no action is none that the dynamics is given at first
    td = make_env("toy").reset()
    fresh = StatefulPolicy(policy, "cpu")(td.clone())["action"]
    td["is_first"] = torch.zeros_like(td["is_first"])
    act = StatefulPolicy(policy, "cpu")
    assert torch.equal(act(td.clone())["action"], fresh)
    assert not td["is_first"].any()
    assert not torch.equal(act(td.clone())["action"], fresh)  # now it remembers


@pytest.mark.parametrize("size", [48, 128])
def test_frames_of_another_size_are_refused(size: int) -> None:
    policy = make_policy("prelar")
    td = make_env("toy", pixels=size).reset().set("belief", policy.zero_belief())
    with pytest.raises(ValueError, match=rf"pixels is uint8 .*{size}, {size}\]; its shape must"):
        policy(td)


@pytest.mark.parametrize("name", AGENTS)
def test_the_policy_never_asks_for_a_value(name: str) -> None:
    """Which is a wait for the GPU, and an error on the meta device."""
    policy = make_policy(name, sample=True)
    seen = make_env("toy").reset().select("pixels", "is_first")
    seen["belief"] = policy.zero_belief()
    accelerate(policy.world_model), accelerate(policy.actor)
    assert policy.to("meta")(seen.to("meta"))["action"].is_meta


def test_mode_gives_the_same_action_twice_and_sample_does_not() -> None:
    for mode, same in (("mode", True), ("sample", False)):
        policy = make_policy("prelar", mode=mode)
        td = toy(policy).reset()
        first, second = policy(td.clone())["action"], policy(td.clone())["action"]
        assert torch.equal(first, second) == same
    with pytest.raises(ValueError, match="mode='greedy' is unknown; choose sample or mode"):
        make_policy("prelar", mode="greedy")
    policy = make_policy("prelar", mode="mode", sample=True)  # latents are drawn all the same
    stoch = [policy(td.clone())["next", "belief", "stoch"] for _ in range(9)]
    assert any(not torch.equal(stoch[0], x) for x in stoch)


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


def test_the_mode_of_latents_is_that_of_latent_actions_too() -> None:
    torch.manual_seed(0)
    agent = tiny_agent("prelar", action_code="gaussian").eval()
    policy = WorldModelPolicy(agent.world_model, agent.actor, mode="mode", sample_state=False)
    given = TensorDict(
        {
            "pixels": torch.zeros(2, 3, 64, 64, dtype=torch.uint8),
            "is_first": torch.zeros(2, 1, dtype=torch.bool),
            "belief": policy.zero_belief([2]).apply(torch.ones_like),
        },
        [2],
    )
    assert torch.equal(*(policy(given.clone())["action"] for _ in range(2)))
