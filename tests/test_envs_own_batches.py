"""What users bring besides: batches, any form of success, what is no environment."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Tuple
from torchrl.data import Binary, TensorSpec, Unbounded
from torchrl.envs import GymWrapper
from torchrl.envs.utils import check_env_specs

from prelar_trl.envs import ToyEnv, make_env
from prelar_trl.recipes.environments import build_env
from tests.test_envs_own import BYTES, RGB, Gym, Walkers

MODES = gymnasium.vector.AutoresetMode
PICTURE = Box(0, 255, (64, 64, 3), np.uint8)


@pytest.mark.parametrize("mode", [MODES.SAME_STEP, MODES.DISABLED])  # those that TorchRL wraps
@pytest.mark.parametrize("key", ["success", "is_success"])
def test_success_is_read_from_the_info_of_a_vector_environment(key: str, mode) -> None:
    infos = [{key: True}, {key: False}, {}]
    makers = [lambda info=info: Gym(PICTURE, BYTES, info=info) for info in infos]
    vector = gymnasium.vector.SyncVectorEnv(makers, autoreset_mode=mode)
    env = make_env(GymWrapper(vector), max_steps=4)
    check_env_specs(env)
    step = env.rand_step(env.reset())["next"]
    assert step["success"].tolist() == [[True], [False], [False]]


def test_success_at_the_end_of_an_episode_that_was_reset_at_once() -> None:
    class Ends(Gym):
        def step(self, action):
            observation, reward, *_ = super().step(action)
            return observation, reward, True, False, {"success": True}

    vector = gymnasium.vector.SyncVectorEnv(
        [lambda: Ends(PICTURE, BYTES)] * 2,
        autoreset_mode=MODES.SAME_STEP,
    )
    env = make_env(GymWrapper(vector))
    step = env.rand_step(env.reset())["next"]
    assert step["done"].all() and step["success"].tolist() == [[True], [True]]


def test_an_action_repeat_of_a_vector_environment_is_refused() -> None:
    vector = gymnasium.vector.SyncVectorEnv(
        [lambda: Gym(PICTURE, BYTES)] * 2, autoreset_mode=MODES.DISABLED
    )
    with pytest.raises(ValueError, match="action_repeat=2: .* repeat inside each environment$"):
        make_env(GymWrapper(vector), action_repeat=2)


def test_a_reset_that_loses_the_last_picture_of_an_episode_is_refused() -> None:
    class Ends(Gym):
        def step(self, action):
            observation, reward, *_ = super().step(action)
            return observation, reward, True, False, {}

    pictures = gymnasium.spaces.Dict(image=PICTURE)
    makers = [lambda: Ends(pictures, {"image": BYTES})] * 2
    vectors = {mode: gymnasium.vector.SyncVectorEnv(makers, autoreset_mode=mode) for mode in MODES}
    with pytest.raises(ValueError, match="autoreset_mode=AutoresetMode.DISABLED$"):
        make_env(GymWrapper(vectors[MODES.SAME_STEP]))
    env = make_env(GymWrapper(vectors[MODES.DISABLED]))
    step = env.rand_step(env.reset())["next"]
    assert step["done"].all() and torch.equal(step["pixels"][0], RGB)


class OneBuffer(Walkers):
    """Draws all pictures into one buffer."""

    buffer = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)

    def _observe(self):
        self.buffer[:] = super()._observe()["pixels"]
        return {"pixels": self.buffer}


class OneGymBuffer(Gym):
    def reset(self, **_):
        self.observation[:] = 0
        return self.observation, {}

    def step(self, action):
        self.observation += 1
        return self.observation, 1.0, False, False, {}


@pytest.mark.parametrize(
    "make",
    [
        lambda: OneBuffer(ends=(3, 3)),
        lambda: OneGymBuffer(Box(0, 255, (3, 64, 64), np.uint8)),
    ],
)
def test_pictures_that_are_drawn_into_one_buffer_are_kept(make) -> None:
    rollout = make_env(make()).rollout(3)
    frames = rollout["pixels"].reshape(-1, 3, 3, 64, 64)[0, :, 0, 0, 0]
    assert frames.tolist() == [0, 1, 2]
    assert rollout["next", "pixels"].reshape(-1, 3, 3, 64, 64)[0, :, 0, 0, 0].tolist() == [1, 2, 3]


@pytest.mark.parametrize("given", [ToyEnv(), Gym(), "toy", None])
def test_what_makes_no_environment_is_told_in_one_line(given) -> None:
    with pytest.raises(ValueError, match="env_factory must be a function .* got") as error:
        build_env(given, "mine", seed=0, num_workers=1)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "spec", [Unbounded((2, 1)), Binary(2, (2,), dtype=torch.bool), Unbounded((2, 3))]
)
def test_success_of_any_type_and_shape_becomes_one_flag(spec: TensorSpec) -> None:
    class Succeeds(Walkers):
        def __init__(self) -> None:
            super().__init__()
            self.observation_spec["success"] = spec

        def _observe(self):
            success = torch.tensor([0, 1]).reshape(2, *[1] * (len(spec.shape) - 1))
            return {**super()._observe(), "success": success.expand(spec.shape).to(spec.dtype)}

    env = make_env(Succeeds(), max_steps=4)
    check_env_specs(env)
    assert env.reset()["success"].tolist() == [[False], [True]]


class Undrawn(Gym):
    def render(self):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (Undrawn(), "Undrawn gives no picture: neither its observations nor render"),
        (Gym(picture=[BYTES, None]), "gives list, which is no picture"),
        (Gym(Tuple((PICTURE, Box(-1, 1, (3,))))), "TorchRL cannot read the observations of Gym"),
        (Gym(Box(0, 9, (64, 64, 3), np.uint16)), "TorchRL cannot read .* uint16"),
    ],
)
def test_observations_and_pictures_that_cannot_be_read_are_told_in_one_line(env, message) -> None:
    with pytest.raises(ValueError, match=message) as error:
        make_env(env)
    assert "\n" not in str(error.value)
