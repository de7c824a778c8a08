"""Batched environments of users, and what is given in place of a function that makes one."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box
from torchrl.envs import GymWrapper
from torchrl.envs.utils import check_env_specs

from prelar_trl.envs import ToyEnv, make_env
from prelar_trl.recipes.environments import build_env
from tests.test_envs_own import BYTES, Gym

PICTURE = Box(0, 255, (64, 64, 3), np.uint8)


@pytest.mark.parametrize("mode", list(gymnasium.vector.AutoresetMode)[:2])
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
        autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP,
    )
    env = make_env(GymWrapper(vector))
    step = env.rand_step(env.reset())["next"]
    assert step["done"].all() and step["success"].tolist() == [[True], [True]]


@pytest.mark.parametrize("given", [ToyEnv(), Gym(), "toy", None])
def test_what_makes_no_environment_is_told_in_one_line(given) -> None:
    with pytest.raises(ValueError, match="env_factory must be a function .* got") as error:
        build_env(given, "mine", seed=0, num_workers=1)
    assert "\n" not in str(error.value)
