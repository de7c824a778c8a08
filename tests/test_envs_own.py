"""Environments that users bring: any picture, any TorchRL or gymnasium environment, one door."""

from __future__ import annotations

from copy import copy
from functools import partial
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Text
from tensordict import TensorDict
from torchrl.data import Binary, Bounded, Composite, Unbounded
from torchrl.envs import (
    Compose,
    EnvBase,
    RenameTransform,
    RewardSum,
    SerialEnv,
    StepCounter,
    TransformedEnv,
)
from torchrl.envs.utils import check_env_specs

from prelar_trl.envs import make_env
from prelar_trl.envs.pictures import PictureConverter
from tests.test_envs import Counter

VECTOR = Box(-1, 1, (3,), np.float32)
ACTIONS = Box(-1, 1, (2,), np.float32)
RAMP = np.arange(64 * 64 * 3, dtype=np.float64).reshape(64, 64, 3) % 256  # [H, W, C]
BYTES = RAMP.astype(np.uint8)
RGB = torch.from_numpy(BYTES).permute(2, 0, 1)  # [3, H, W]


class Gym(gymnasium.Env):
    """A gymnasium environment that observes and draws what it is told."""

    def __init__(
        self,
        space: gymnasium.Space = VECTOR,
        observation: Any = None,
        picture: Any = BYTES,
        info: dict[str, Any] | None = None,
        actions: gymnasium.Space = ACTIONS,
    ) -> None:
        self.observation_space, self.action_space = space, actions
        self.observation = space.sample() if observation is None else observation
        self.picture, self.info = picture, info or {}
        self.actions = []

    def reset(self, *, seed=None, options=None):
        return copy(self.observation), {}

    def step(self, action):
        self.actions.append(action)
        return copy(self.observation), 1.0, False, False, self.info

    def render(self):
        return self.picture


class Walkers(EnvBase):
    """Environments in one object: number i ends after ``ends[i]`` steps, a step pays 1."""

    def __init__(self, ends: tuple[int, ...] = (2, 5), **specs: Any) -> None:
        super().__init__(batch_size=[len(ends)])
        n = len(ends)
        self.ends = torch.tensor(ends)[:, None]
        pixels = Bounded(0, 255, (n, 3, 64, 64), dtype=torch.uint8)
        self.observation_spec = Composite(pixels=pixels, shape=(n,))
        self.action_spec = specs.get("action", Bounded(-1, 1, (n, 2), dtype=torch.float32))
        self.reward_spec = specs.get("reward", Unbounded((n, 1)))

    def _set_seed(self, seed):
        pass

    def _observe(self):
        pixels = self.count[..., None, None].expand(-1, 3, 64, 64)
        return {"pixels": pixels.to(torch.uint8).clone()}

    def _reset(self, tensordict, **kwargs):
        self.count = torch.zeros_like(self.ends)
        return TensorDict(self._observe(), batch_size=self.batch_size)

    def _step(self, tensordict):
        self.count = self.count + 1
        done = self.count == self.ends  # past it the environment forgets that it is over
        reward = torch.ones(self.reward_spec.shape, dtype=self.reward_spec.dtype)
        end = {"done": done, "terminated": done.clone(), "reward": reward}
        return TensorDict({**self._observe(), **end}, batch_size=self.batch_size)


Walker = partial(Counter, pay=1.0)


def test_an_environment_with_several_transforms_of_its_own():
    own = TransformedEnv(Counter(), Compose(StepCounter(), RewardSum(["reward"], ["total"])))
    for options in ({}, {"action_repeat": 2}, {"max_steps": 3}, {"pixels": 32}):
        check_env_specs(make_env(own, **options))
    for options, steps in (({"action_repeat": 2}, 3), ({"max_steps": 3}, 3), ({"pixels": 32}, 5)):
        rollout = make_env(own, **options).rollout(10)
        assert len(rollout) == steps
        assert torch.equal(rollout["next", "total"], rollout["next", "episode_reward"])
    assert rollout["pixels"].shape == (5, 3, 32, 32)  # turned, too
    assert rollout["next", "pixels"][:, 0, 0, 0].tolist() == [1, 2, 3, 4, 5]


def test_an_environment_may_pass_the_door_twice():
    env = make_env(make_env(Counter(), max_steps=4), max_steps=3)
    check_env_specs(env)
    rollout = env.rollout(10)
    assert rollout["next", "step_count"].flatten().tolist() == [1, 2, 3]
    assert torch.allclose(rollout["next", "episode_reward"], rollout["next", "reward"].cumsum(0))


@pytest.mark.parametrize(
    "batched", [Walkers, lambda: SerialEnv(2, [partial(Walker, end) for end in (2, 5)])]
)
def test_action_repeat_stops_each_environment_of_a_batch_at_its_own_end(batched):
    env = make_env(batched(), action_repeat=3)
    step = env.rand_step(env.reset())["next"]
    assert step["reward"].flatten().tolist() == [2, 3]
    assert step["done"].flatten().tolist() == [True, False]
    assert step["terminated"].flatten().tolist() == [True, False]
    assert step["pixels"][:, 0, 0, 0].tolist() == [2, 3]


def test_action_repeat_with_renamed_reward_and_end():
    names, others = ["reward", "done", "terminated"], ["pay", "over", "dead"]
    renamed = TransformedEnv(Counter(), RenameTransform(names, others))
    env = make_env(TransformedEnv(renamed, RenameTransform(others, names)), action_repeat=2)
    rollout = env.rollout(10, policy=lambda td: td.set("action", torch.zeros(1)))
    assert rollout["next", "reward"].flatten().tolist() == [2, 2, 1]
    assert rollout["next", "done"].flatten().tolist() == [False, False, True]
    with pytest.raises(ValueError, match="no 'reward', only pay: rename it"):
        make_env(TransformedEnv(Counter(), RenameTransform(["reward"], ["pay"])))


GRAY = BYTES[..., :1]


@pytest.mark.parametrize(
    ("space", "observation", "expected"),
    [
        (Box(0, 255, (64, 64, 3), np.uint8), BYTES, RGB),
        (Box(0, 255, (3, 64, 64), np.uint8), BYTES.transpose(2, 0, 1), RGB),
        (Box(0, 255, (64, 64, 1), np.uint8), GRAY, RGB[:1].expand(3, -1, -1)),
        (Box(0, 255, (64, 64), np.uint8), GRAY[..., 0], RGB[:1].expand(3, -1, -1)),
        (Box(0, 1, (64, 64, 3), np.float32), (RAMP / 255).astype(np.float32), RGB),
        (Box(0, 255, (64, 64, 3), np.float32), RAMP.astype(np.float32), RGB),
    ],
)
def test_picture_observations_of_every_kind(space, observation, expected):
    env = make_env(Gym(space, observation), max_steps=4)
    check_env_specs(env)
    assert torch.equal(env.reset()["pixels"], expected)
    env = make_env(SerialEnv(2, lambda: make_env(Gym(space, observation))), max_steps=4)
    assert torch.equal(env.reset()["pixels"], expected.expand(2, -1, -1, -1))


def test_a_dict_gives_its_picture_and_its_vectors():
    space = Dict(
        image=Box(0, 255, (96, 128, 3), np.uint8),
        speed=Box(-9, 9, (2,), np.float64),
        gear=Discrete(3),
        map=Dict(near=Box(-1, 1, (2, 2), np.float32)),
        mission=Text(5),
    )
    env = make_env(Gym(space), max_steps=4, action_repeat=2)
    check_env_specs(env)
    start = env.reset()
    assert start["pixels"].shape == (3, 64, 64) and start["pixels"].dtype == torch.uint8
    assert start["state"].shape == (2 + 3 + 4,) and start["state"].dtype == torch.float32
    assert not {"image", "speed", "mission"} & set(start.keys())
    start = make_env(Gym(space), pixels=None).reset()
    assert start["state"].shape == (9,) and not {"image", "pixels"} & set(start.keys())


def test_one_of_several_pictures_is_chosen_by_its_name():
    picture = Box(0, 255, (64, 64, 3), np.uint8)
    space = Dict(left=picture, right=picture)
    observation = {"left": BYTES, "right": 255 - BYTES}
    with pytest.raises(ValueError, match="2 pictures, choose by camera=: left, right"):
        make_env(Gym(space, observation))
    env = make_env(Gym(space, observation), camera="right")
    check_env_specs(env)
    start = env.reset()
    assert torch.equal(start["pixels"], 255 - RGB) and "left" not in start.keys()
    with pytest.raises(ValueError, match="unknown camera 'top'; .* left, right"):
        make_env(Gym(space, observation), camera="top")


@pytest.mark.parametrize(
    ("picture", "expected"),
    [
        (BYTES, RGB),
        (np.concatenate([BYTES, GRAY], -1), RGB),  # RGBA
        (GRAY[..., 0], RGB[:1].expand(3, -1, -1)),
        ((RAMP / 255).astype(np.float32), RGB),
        (RAMP.astype(np.float32), RGB),
        (BYTES.astype(np.int64), RGB),
        ([BYTES * 0, BYTES], RGB),  # rgb_array_list
        (BYTES.tolist(), RGB),
        (BYTES > 127, (RGB > 127) * 255),
        (BYTES.repeat(2, 0).repeat(2, 1), RGB),
    ],
)
def test_render_may_give_a_picture_of_any_kind(picture, expected):
    env = make_env(Gym(picture=picture), max_steps=4)
    check_env_specs(env)
    assert torch.equal(env.reset()["pixels"].int(), expected.int())


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (Gym(picture=None), "gives NoneType, .*render_mode='rgb_array'"),
        (Gym(picture="+--+"), "gives str, .*render_mode='rgb_array'"),
        (Gym(picture=[]), r"float64 \[0\], which is no picture"),
        (Gym(picture=BYTES[None]), r"uint8 \[1, 64, 64, 3\], which is no picture"),
        (Gym(picture=BYTES.astype(np.uint16) * 257), "int64 from 0 to 65535"),
        (Gym(picture=RAMP / 128 - 1), "from -1 to "),
        (Gym(picture=RAMP * np.nan), "from nan to nan"),
        (Gym(Box(0, 255, (84, 84, 4), np.uint8)), r"\[84, 84, 4\], .* four stacked frames"),
        (Gym(Box(0, 255, (84, 84, 12), np.uint8)), r"\[84, 84, 12\], which is no picture"),
        (Gym(Box(0, 255, (4, 84, 84, 3), np.uint8)), "which is no picture"),
        (Gym(actions=MultiDiscrete([2, 3])), r"MultiDiscrete\(\[2 3\]\): multi-discrete and mixed"),
        (Gym(actions=MultiBinary(3)), "multi-discrete and mixed actions do not work"),
        (Gym(actions=Dict(a=ACTIONS, b=Discrete(2))), "multi-discrete and mixed actions do not"),
        (Gym(actions=Box(0, 3, (2,), np.int64)), r"discrete \(.* int64 \[2\]\): only continuous"),
        (Gym(actions=Box(-1, 1, (2, 3), np.float32)), r"one vector \[A\].* \[2, 3\]"),
        (Gym(actions=Box(-np.inf, np.inf, (2,), np.float32)), "unbounded"),
        (Walkers(action=Bounded(-np.inf, 1, (2, 2), dtype=torch.float32)), "no bounds"),
        (Walkers(action=Unbounded((2, 2))), r"unbounded \(.* float32 \[2\]\)"),
        (Walkers(action=Binary(2, (2, 2))), "discrete"),
        (Walkers(reward=Unbounded((2, 3))), r"one number \[1\]; the environment gives \[3\]"),
        (3, "environment of TorchRL or gymnasium is needed, got int"),
        (dict, "environment of TorchRL or gymnasium is needed, got dict"),
    ],
)
def test_what_cannot_be_used_is_named_at_the_door_in_one_line(env, message):
    with pytest.raises(ValueError, match=message) as error:
        make_env(env)
    assert "\n" not in str(error.value)


def test_float64_environments_become_float32():
    space = Box(-1, 1, (3,), np.float64)
    gym = Gym(space, actions=Box(-2, 2, (2,), np.float64))
    env = make_env(gym, max_steps=4)
    check_env_specs(env)
    step = env.step(env.reset().set("action", torch.tensor([0.5, -1.0])))
    assert step["action"].dtype == step["next", "state"].dtype == torch.float32
    assert gym.actions[-1].dtype == np.float64 and gym.actions[-1].tolist() == [1, -2]
    own = Walkers(reward=Unbounded((2, 1), dtype=torch.float64))
    env = make_env(own)
    assert env.rand_step(env.reset())["next", "reward"].dtype == torch.float32


@pytest.mark.parametrize("render_mode", [False, True])
def test_a_picture_environment_may_know_no_render_mode(render_mode):
    class Plain(Gym):
        def __init__(self, **options):
            options = options if not render_mode else {}
            super().__init__(Box(0, 255, (64, 64, 3), np.uint8), BYTES, None, **options)

    gymnasium.register(f"test/Plain{render_mode}-v0", Plain, max_episode_steps=4)
    env = make_env(f"gym/test/Plain{render_mode}-v0")
    assert torch.equal(env.reset()["pixels"], RGB)


@pytest.mark.parametrize("key", ["success", "is_success"])
@pytest.mark.parametrize("value", [True, 1.0, np.array([True]), np.float32(1)])
def test_success_is_read_from_info(key, value):
    gym = Gym(info={key: value})
    env = make_env(gym, max_steps=4, action_repeat=2)
    check_env_specs(env)
    assert not env.reset()["success"].item()
    step = env.rand_step(env.reset())["next"]
    assert step["success"].tolist() == [True] and step["success"].dtype == torch.bool
    gym.info = {key: 0.0}
    assert not env.rand_step(env.reset())["next", "success"].item()


def test_a_black_first_picture_does_not_settle_the_range_of_floats():
    convert = PictureConverter(64)
    assert convert(RAMP * 0).eq(0).all()
    assert torch.equal(convert(RAMP), RGB)
    assert convert(RAMP * 0 + 1).eq(1).all()  # 1 of 255 from now on
