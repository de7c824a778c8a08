"""Discrete actions: one-hot vectors from the environment's door to the actor's gradient."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, Space
from torch.autograd import gradcheck
from torchrl.data import Categorical, OneHot
from torchrl.envs.utils import check_env_specs

from prelar_trl.data import ClipStore, EpisodeReplay
from prelar_trl.envs import make_env
from prelar_trl.fast import accelerate
from prelar_trl.models import make_agent
from prelar_trl.modules import OneHotActor, WorldModelPolicy, distributions
from prelar_trl.objectives import ActorLoss
from prelar_trl.recipes.collect_videos import collect
from prelar_trl.recipes.evaluate import evaluate
from prelar_trl.recipes.finetune import finetune
from prelar_trl.recipes.schema import CollectVideosConfig, EvaluateConfig
from prelar_trl.updates import BehaviorUpdate
from tests.test_envs_own import BYTES, Gym, Walkers
from tests.tiny import BONUS, TINY, batch, has_gradient
from tests.toy_runs import QUICK, checkpoint, finetune_config

LOGITS = torch.tensor([[0.0, 1.0, -1.0], [2.0, 2.0, 0.0]])


class Mission(Space):
    """As MiniGrid's: words, in a space that only it knows."""

    def sample(self, *args, **kwargs):
        return "get to the goal"

    def contains(self, x):
        return isinstance(x, str)


class GridWorld(Gym):
    """As MiniGrid's: what lies around, a direction, a mission in words; the whole is rendered."""

    def __init__(self):
        space = Dict(
            image=Box(0, 255, (7, 7, 3), np.uint8), direction=Discrete(4), mission=Mission()
        )
        super().__init__(space, picture=np.repeat(BYTES, 3, 0), actions=Discrete(7))


class Arcade(Gym):
    """As Atari's: the screen is the observation."""

    def __init__(self):
        screen = np.resize(BYTES, (210, 160, 3))
        super().__init__(Box(0, 255, (210, 160, 3), np.uint8), screen, None, actions=Discrete(6))


def tiny_agent(method: str, **options):
    return make_agent(method, action_dim=3, discrete=True, **{**TINY, **BONUS, **options})


def one_hot(index: int, count: int) -> torch.Tensor:
    return torch.eye(count)[index]


def test_the_distribution_is_that_of_torch():
    ours = distributions.OneHot(LOGITS)
    theirs = torch.distributions.OneHotCategorical(logits=LOGITS)
    value = torch.eye(3)[[1, 2]]
    torch.testing.assert_close(ours.log_prob(value), theirs.log_prob(value))
    torch.testing.assert_close(ours.entropy(), theirs.entropy())
    assert torch.equal(ours.mode[0], one_hot(1, 3))
    torch.manual_seed(0)
    drawn = distributions.OneHot(LOGITS.expand(40_000, 2, 3)).rsample()
    torch.testing.assert_close(drawn.mean(0), theirs.probs, atol=0.01, rtol=0)
    assert torch.equal(drawn.sum(-1), torch.ones(40_000, 2)) and drawn.unique().tolist() == [0, 1]
    stacked = distributions.OneHot.stack([ours, distributions.OneHot(-LOGITS)], 1)
    assert torch.equal(stacked.logits[:, 1], -LOGITS)


def test_the_gradient_of_a_sample_is_that_of_the_probabilities():
    weight, value = torch.randn(2, 3).double(), torch.eye(3)[[1, 2]].double()
    logits = LOGITS.double().requires_grad_()
    (straight,) = torch.autograd.grad(
        (distributions.OneHot(logits).rsample() * weight).sum(), logits
    )
    (expected,) = torch.autograd.grad((logits.softmax(-1) * weight).sum(), logits)
    torch.testing.assert_close(straight, expected)
    assert gradcheck(lambda x: distributions.OneHot(x).log_prob(value), (logits,))


@pytest.mark.parametrize(("start", "expected"), [(0, 2), (5, 7)])
def test_a_choice_of_gymnasium_is_a_one_hot_vector(start, expected):
    gym = Gym(actions=Discrete(4, start=start))
    env = make_env(gym, action_repeat=2, max_steps=6)
    assert type(env.action_spec) is OneHot and env.action_spec.dtype == torch.float32
    check_env_specs(env)
    step = env.step(env.reset().set("action", one_hot(2, 4)))
    assert [int(a) for a in gym.actions[-2:]] == [expected] * 2
    assert step["action"].tolist() == [0, 0, 1, 0]
    drawn = torch.stack([env.rand_action(env.reset())["action"] for _ in range(99)])
    assert torch.equal(drawn.sum(-1), torch.ones(99)) and (drawn.mean(0) > 0.05).all()


@pytest.mark.parametrize("shape", [(2,), (2, 1)])
def test_numbers_of_choices_and_one_hot_vectors_of_torchrl(shape):
    received = []

    class Own(Walkers):
        def _step(self, tensordict):
            received.append(tensordict["action"])
            return super()._step(tensordict)

    action = torch.eye(3)[[1, 2]]
    for spec in (Categorical(3, shape=shape), OneHot(3, (2, 3), dtype=torch.int64)):
        env = make_env(Own((4, 4), action=spec))
        check_env_specs(env)
        env.step(env.reset().set("action", action))
        assert received[-1].dtype == spec.dtype and received[-1].shape == spec.shape
    assert torch.equal(received[-1], action.long())
    env = make_env(Own((4, 4), action=Categorical(3, shape=shape)))
    env.step(env.reset().set("action", action))
    assert received[-1].flatten().tolist() == [1, 2]


def test_masked_choices_are_refused_in_one_line():
    spec = OneHot(3, (2, 3), mask=torch.tensor([True, False, True]).expand(2, 3))
    with pytest.raises(ValueError, match="masks its actions"):
        make_env(Walkers(action=spec))


@pytest.mark.parametrize("method", ["dreamerv2", "prelar", "apv"])
def test_imagined_actions_are_one_hot_and_the_actor_learns_through_the_dynamics(method):
    agent = accelerate(tiny_agent(method).eval())
    start = agent.world_model(batch(action=torch.eye(3)[torch.randint(3, (2, 4))])).detach()
    imagined = agent.world_model.imagine(agent.actor, start.select("stoch", "deter"), horizon=3)
    actions = imagined["action"][:, 1:]  # [N, H, A]
    assert actions.unique().tolist() == [0, 1] and (actions.sum(-1) == 1).all()
    policy = agent.actor(imagined["feat"][:, :-1].detach())
    expected = (policy.logits.log_softmax(-1) * actions).sum(-1, keepdim=True)
    torch.testing.assert_close(imagined["log_prob"][:, 1:], expected)
    assert not imagined["action"][:, 0].any()
    imagined["reward"].sum().backward()
    assert has_gradient(agent.actor)


@pytest.mark.parametrize("gradient", ["dynamics", "reinforce", "both"])
def test_each_gradient_moves_a_one_hot_actor(gradient):
    agent = tiny_agent("dreamerv2")
    start = agent.world_model(batch(action=torch.eye(3)[torch.randint(3, (2, 4))])).detach()
    update = BehaviorUpdate(agent, horizon=3, gradient=gradient, entropy_scale=0.0)
    before = agent.actor.out.weight.clone()
    update(start.select("stoch", "deter"))
    assert not torch.equal(before, agent.actor.out.weight)


def test_reinforce_makes_a_choice_that_paid_more_likely():
    actor = OneHotActor(2, 3, layers=1, units=8)
    feat, action = torch.ones(1, 4, 2), one_hot(2, 3).expand(1, 4, 3)
    before = actor(feat[0, 0]).logits.softmax(-1)[2]
    log_prob = actor(feat).log_prob(action).unsqueeze(-1)  # [1, 4, 1]
    ones = torch.ones(1, 4, 1)
    loss = ActorLoss(gradient="reinforce", entropy_scale=0.0)(
        value_target=ones, value=0 * ones, log_prob=log_prob, entropy=0 * ones, weight=ones
    )
    loss = loss["loss_actor"] if hasattr(loss, "keys") else loss[0]
    loss.backward()
    with torch.no_grad():
        for p in actor.parameters():
            p -= 0.1 * p.grad
    assert actor(feat[0, 0]).logits.softmax(-1)[2] > before


def test_the_policy_acts_by_one_hot_vectors_and_the_replay_keeps_them(tmp_path):
    agent = tiny_agent("prelar", action_window=2)
    policy = WorldModelPolicy(agent.world_model, agent.actor)
    env = make_env(Gym(actions=Discrete(3)), max_steps=5).append_transform(policy.make_primer())
    rollout = env.rollout(5, policy)
    replay = EpisodeReplay(tmp_path / "replay", window=6, batch_size=1, capacity=100)
    replay.extend(rollout.exclude("belief", ("next", "belief")))
    actions = replay.sample()["action"][0]
    assert torch.equal(actions[1:], rollout["action"]) and not actions[0].any()
    assert torch.equal(actions[1:].sum(-1), torch.ones(5))


@pytest.mark.parametrize(
    ("env", "method", "count"),
    [("gym/CartPole-v1", "dreamerv2", 2), (GridWorld, "prelar", 7), (Arcade, "apv", 6)],
)
def test_the_recipes_learn_and_evaluate_with_choices(env, method, count, tmp_path):
    name = env if isinstance(env, str) else "mine"
    factory = make_env if isinstance(env, str) else lambda: env()
    changes = {"actor_gradient": "both", "entropy_scale": 1e-3, "method": method, **QUICK}
    model = {"bonus_window": 2, "depth": 2, "head_layers": 1}
    cfg = finetune_config(tmp_path / "a", env=name, model=model, **changes)
    finetune(cfg, env_factory=factory)
    state = checkpoint(tmp_path / "a")
    assert (state["action_dim"], state["discrete"]) == (count, True)
    config = EvaluateConfig(run=cfg.run, episodes=1, device="cpu")
    assert evaluate(config, env_factory=factory)["records"][0]["length"] <= 8
    with pytest.raises(ValueError, match=f"has 2 action dimensions, .* has {count} choices of act"):
        evaluate(EvaluateConfig(run=cfg.run, episodes=1, device="cpu", env="toy"))


def test_random_videos_of_an_environment_with_choices(tmp_path):
    collect(
        CollectVideosConfig(
            data=str(tmp_path / "clips"), env="tests.test_discrete_actions:Arcade", episodes=1,
            max_steps=6, pixels=16,
        )
    )  # fmt: skip
    actions = ClipStore(tmp_path / "clips").read(0, "actions")
    assert np.array_equal(actions[1:].sum(-1), np.ones(6)) and not actions[0].any()
    assert set(np.unique(actions)) == {0, 1}


def test_cartpole_is_drawn_by_its_render_function():
    env = make_env("gym/CartPole-v1", max_steps=3)
    rollout = env.rollout(3)
    assert rollout["pixels"].shape == (3, 3, 64, 64)
    assert rollout["pixels"].float().std() > 1
    assert rollout["state"].shape == (3, 4)
