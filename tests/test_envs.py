"""Environments: what make_env promises for every family."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial

import gymnasium
import mujoco
import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.data import Binary, Bounded, Composite, Unbounded
from torchrl.envs import EnvBase
from torchrl.envs.utils import check_env_specs

from prelar_trl.envs import ToyEnv, make_env, toy_expert, toy_return
from prelar_trl.envs.toy import MOVES

KEYS = {"pixels", "is_first", "success", "step_count", "episode_reward", "done", "terminated"}


class Counter(EnvBase):
    """A user's environment: the picture shows the step, the reward is the action's sum, or ``pay``.

    A step past its end is an error, as in Meta-world. With ``success_at`` it also gives
    ``success`` at that step alone.
    """

    def __init__(
        self,
        end: int = 5,
        actions: int = 1,
        pay: float | None = None,
        success_at: int | None = None,
        with_pixels: bool = True,
    ) -> None:
        super().__init__(batch_size=[])
        self.end, self.pay, self.success_at = end, pay, success_at
        pixels, other = Bounded(0, 255, (3, 64, 64), dtype=torch.uint8), Unbounded((2,))
        self.observation_spec = Composite({"pixels": pixels} if with_pixels else {"height": other})
        if success_at is not None:
            self.observation_spec["success"] = Binary(1, (1,), dtype=torch.bool)
        self.action_spec = Bounded(-3, 5, (actions,), dtype=torch.float32)
        self.reward_spec = Unbounded((1,))

    def _set_seed(self, seed: int | None) -> None:
        self.seed = seed

    def _observe(self) -> dict[str, torch.Tensor]:
        observation = {"pixels": torch.full((3, 64, 64), self.count, dtype=torch.uint8)}
        if self.success_at is not None:
            observation["success"] = torch.tensor([self.count == self.success_at])
        return observation

    def _reset(self, tensordict, **kwargs):
        self.count = 0
        return TensorDict(self._observe())

    def _step(self, tensordict):
        assert self.count < self.end, "stepped past its end"
        self.count += 1
        over = torch.tensor([self.count == self.end])
        reward = tensordict["action"].sum(-1, keepdim=True)
        reward = reward if self.pay is None else torch.full_like(reward, self.pay)
        end = {"done": over, "terminated": over.clone()}
        return TensorDict({**self._observe(), "reward": reward, **end})


class Painter(gymnasium.Env):
    """A gymnasium environment whose observation is a picture: left half red, right half blue."""

    observation_space = gymnasium.spaces.Box(0, 255, (96, 128, 3), np.uint8)
    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    metadata = {"render_modes": ["rgb_array"]}

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode

    def _observation(self) -> np.ndarray:
        picture = np.zeros((96, 128, 3), np.uint8)
        picture[:, :64, 0] = picture[:, 64:, 2] = 200
        return picture

    def reset(self, *, seed=None, options=None):
        return self._observation(), {}

    def step(self, action):
        return self._observation(), 1.0, False, False, {}


gymnasium.register("test/Painter-v0", Painter, max_episode_steps=4)


def assert_keys(env: EnvBase) -> None:
    start = env.reset()
    step = env.rand_step(start)
    for tensordict in (start, step["next"]):
        assert KEYS <= set(tensordict.keys())
        assert tensordict["pixels"].dtype == torch.uint8
        assert tensordict["pixels"].shape == (3, 64, 64)
        for key in ("is_first", "success", "done", "terminated", "truncated"):
            assert tensordict[key].dtype == torch.bool and tensordict[key].shape == (1,)
    assert start["is_first"].item() and not step["next", "is_first"].item()
    assert step["next", "reward"].dtype == torch.float32 and step["next", "reward"].shape == (1,)
    assert step["action"].dtype == torch.float32
    assert (env.action_spec.space.low == -1).all() and (env.action_spec.space.high == 1).all()


@pytest.mark.parametrize(
    ("name", "needs"),
    [
        ("toy", None),
        ("gym/HalfCheetah-v5", None),
        ("gym/test/Painter-v0", None),
        ("gym/Pendulum-v1", "pygame"),
        ("dm_control/cheetah/run", "dm_control"),
    ],
)
def test_every_family_passes_check_env_specs_and_gives_the_same_keys(name, needs):
    if needs is not None:
        pytest.importorskip(needs)
    env = make_env(name)
    check_env_specs(env)
    assert_keys(env)
    if name == "gym/Pendulum-v1":  # rendered by gymnasium and resized: a red rod on white
        picture = env.reset()["pixels"].float()
        assert picture.mean() > 200 and picture.std() > 5
    env.close()


def test_missing_dm_control_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "dm_control", None)
    with pytest.raises(ImportError, match=r"prelar_trl\[dm_control\]"):
        make_env("dm_control/cheetah/run")


def test_picture_observations_keep_their_layout():
    env = make_env("gym/test/Painter-v0")
    picture = env.reset()["pixels"]
    assert picture[0, :, :32].eq(200).all() and picture[0, :, 32:].eq(0).all()
    assert picture[2, :, 32:].eq(200).all() and picture[1].eq(0).all()
    assert env.rollout(10)["next", "truncated"].squeeze(-1).tolist() == [False] * 3 + [True]


def test_a_users_environment_is_adopted():
    env = make_env(Counter())
    check_env_specs(env)
    assert_keys(env)
    assert env.rollout(10)["next", "pixels"][:, 0, 0, 0].tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(("action", "reward"), [(-1.0, -3.0), (0.0, 1.0), (1.0, 5.0)])
def test_actions_are_stretched_to_the_environments_bounds(action, reward):
    env = make_env(Counter())
    step = env.step(env.reset().set("action", torch.tensor([action])))
    assert step["next", "reward"].item() == pytest.approx(reward)
    assert step["action"].item() == action


def test_action_repeat_sums_rewards_and_stops_at_the_end():
    env = make_env(Counter(success_at=3), action_repeat=2)
    rollout = env.rollout(10, policy=lambda td: td.set("action", torch.zeros(1)))
    assert rollout["next", "reward"].squeeze(-1).tolist() == [2, 2, 1]
    assert rollout["next", "pixels"][:, 0, 0, 0].tolist() == [2, 4, 5]
    assert rollout["next", "episode_reward"][-1].item() == 5
    assert rollout["next", "success"].squeeze(-1).tolist() == [False, True, False]


def test_max_steps_truncates():
    last = make_env(Counter(), max_steps=3).rollout(10)[-1]["next"]
    assert last["step_count"].item() == 3
    assert last["truncated"].item() and not last["terminated"].item()


def test_toy_expert_reaches_the_target_and_its_return_is_the_documented_one():
    env = make_env("toy", pixels=None)
    rollouts = [env.rollout(60, policy=toy_expert) for _ in range(30)]
    for rollout in rollouts:
        assert len(rollout) == 50 and rollout["next", "truncated"][-1].item()
        assert rollout["next", "success"][-1].item()
        assert 0 < rollout["next", "reward"].min() and rollout["next", "reward"].max() <= 1
    mean = torch.stack([rollout["next", "reward"].sum() for rollout in rollouts]).mean().item()
    assert mean == pytest.approx(toy_return("expert"), abs=1.0)
    assert toy_return("expert") == pytest.approx(47.8, abs=0.1)
    assert toy_return("random") == pytest.approx(10.4, abs=0.3)


def test_toy_picture_shows_disc_and_target_where_the_state_says():
    env = make_env("toy", seed=1)
    pixels_per_unit = 64 / (2 * 1.26)
    checked = 0
    while checked < 5:
        start = env.reset()
        disc, target = start["state"].split(2)
        if torch.linalg.vector_norm(disc - target) < 0.8:  # the disc may hide the square
            continue
        red, green, _ = start["pixels"].float()
        for mask, (x, y) in ((red > green + 60, disc), (green > red + 60, target)):
            row, column = torch.nonzero(mask).float().mean(0) + 0.5
            assert column.item() == pytest.approx(32 + pixels_per_unit * x.item(), abs=0.7)
            assert row.item() == pytest.approx(32 - pixels_per_unit * y.item(), abs=0.7)
        checked += 1


def test_shifted_toy_is_the_same_task_in_another_look():
    envs = make_env("toy", seed=1), make_env("toy/shifted", seed=1)
    for action in torch.rand(6, 2) * 2 - 1:
        before = [env.reset() for env in envs]
        after = [
            env.step(x.set("action", action))["next"] for env, x in zip(envs, before, strict=True)
        ]
        for a, b in (before, after):
            assert torch.equal(a["state"], b["state"])
            difference = (a["pixels"].int() - b["pixels"].int()).abs().sum(0)  # [H, W]
            assert (difference > 60).all()  # disc, square and background
        assert torch.equal(after[0]["reward"], after[1]["reward"])


def test_discrete_toy_moves_by_the_velocity_that_is_chosen():
    envs = make_env("toy", seed=1, pixels=None), make_env("toy/discrete", seed=1, pixels=None)
    assert envs[1].action_spec.shape == (9,)
    assert sorted(map(tuple, MOVES.tolist())) == [(x, y) for x in (-1, 0, 1) for y in (-1, 0, 1)]
    for chosen, velocity in zip(torch.eye(9), MOVES, strict=True):
        states = [
            env.step(env.reset().set("action", action))["next", "state"]
            for env, action in zip(envs, (velocity, chosen), strict=True)
        ]
        assert torch.equal(*states)


def test_toy_background_of_two_colors_is_a_texture_and_the_disc_lies_on_it():
    env = make_env(partial(ToyEnv, background=((0, 0, 0), (0, 0, 200)), disc=(250, 0, 0)), seed=1)
    red, green, blue = env.reset()["pixels"]
    free = (red == 0) & (green == 0)
    assert len(blue[free].unique()) > 20 and blue[free].min() < 20 and blue[free].max() > 180
    assert ((red == 250) & (blue == 0)).any()


def test_same_seed_gives_the_same_episodes_and_another_seed_others():
    def states(seed: int) -> torch.Tensor:
        env = make_env("toy", seed=seed, pixels=None)
        return torch.stack([env.reset()["state"][:2] for _ in range(3)])  # where the disc is

    assert torch.equal(states(1), states(1))
    assert len(torch.cat([states(1), states(2)]).unique(dim=0)) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name_or_env": "nonsense"}, "write metaworld/<task>"),
        ({"name_or_env": "gym/Pendulun-v1"}, "Pendulum"),
        ({"name_or_env": "gym/HalfCheetah-v5", "camera": "up"}, "this environment has track"),
        ({"name_or_env": "toy", "camera": "corner"}, "no cameras"),
        ({"name_or_env": "toy/mirrored"}, "'toy/mirrored'; choose toy, toy/shifted, toy/dis"),
        ({"name_or_env": "toy", "num_workers": 0}, "at least 1"),
        ({"name_or_env": "toy", "action_repeat": 0}, "at least 1"),
        ({"name_or_env": "toy", "device": None}, "device=None must be a device"),
        ({"name_or_env": Counter(with_pixels=False)}, "no 'pixels', only height"),
        ({"name_or_env": Counter(), "num_workers": 2}, "needs a function"),
    ],
)
def test_bad_input_is_named_in_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        make_env(**arguments)
    assert "\n" not in str(error.value)


def test_workers_are_seeded_apart_and_feed_a_collector():
    env = make_env("toy", seed=7, num_workers=2)
    collector = Collector(env, None, frames_per_batch=8, total_frames=16)
    try:
        batches = list(collector)
    finally:
        collector.shutdown()
    assert [batch.shape for batch in batches] == [(2, 4), (2, 4)]
    assert batches[0]["pixels"].shape == (2, 4, 3, 64, 64)
    for worker in range(2):
        alone = make_env("toy", seed=7 + worker, pixels=None).reset()
        assert torch.equal(batches[0]["state"][worker, 0], alone["state"])


def test_workers_seeded_again_repeat_their_episodes_and_leave_the_threads_alone():
    torch.set_num_threads(3)
    env = make_env("toy", max_steps=3, num_workers=2, pixels=None)
    actions = iter(torch.rand(24, 2, 2) * 2 - 1)
    try:
        starts = []
        for _ in range(2):
            env.set_seed(5)
            rollout = env.rollout(
                8,
                lambda td: td.set("action", next(actions)),
                break_when_any_done=False,
            )
            starts.append(rollout["state"][rollout["is_first"].squeeze(-1)])
        assert torch.get_num_threads() == 3
    finally:
        env.close()
    assert starts[0].shape == (6, 4) and torch.equal(*starts)
    assert len(starts[0].unique(dim=0)) == 6  # each worker and episode its own


@pytest.mark.parametrize(("backend", "status"), [(None, 0), ("glfw", 1)])
def test_rendering_check_finds_a_backend_or_prints_the_remedy_in_one_line(backend, status):
    unset = ("DISPLAY", "MUJOCO_GL", "PYOPENGL_PLATFORM")
    environment = {key: value for key, value in os.environ.items() if key not in unset}
    if backend is not None:
        environment["MUJOCO_GL"] = backend
    command = [sys.executable, "-m", "prelar_trl.envs.rendering"]
    check = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert check.returncode == status, check.stderr
    assert len(check.stdout.splitlines()) == 1
    assert ("apt-get install -y" in check.stdout) == bool(status)


def test_make_env_says_what_to_do_where_nothing_can_be_drawn(monkeypatch):
    def broken(*arguments):
        raise mujoco.FatalError("no OpenGL\ncontext")

    monkeypatch.setattr(mujoco, "Renderer", broken)
    with pytest.raises(RuntimeError, match="apt-get install -y lib") as error:
        make_env("metaworld/reach")
    assert "\n" not in str(error.value)
    make_env("metaworld/reach", pixels=None).close()
