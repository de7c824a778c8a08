"""Meta-world v3 manipulation tasks."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import gymnasium
import mujoco
import numpy as np
from metaworld.env_dict import ALL_V3_ENVIRONMENTS
from torchrl.envs import EnvBase, GymWrapper, RenameTransform, Transform

from prelar_trl.envs.camera import Camera, RenderQuality
from prelar_trl.envs.transforms import Pixels, SuccessReader

METAWORLD_TASKS: tuple[str, ...] = tuple(
    sorted(name.removesuffix("-v3") for name in ALL_V3_ENVIRONMENTS)
)
# Where the authors of PreLAR, APV and most papers that name corner2 have put it.
MOVED = {"corner2_near": ("corner2", (0.75, 0.075, 0.7))}
# Mounted the wrong way up. The published agents saw the vertical flip, as here.
_UPSIDE_DOWN = ("corner", "corner2", "corner3", "corner4")


def task_name(name: str) -> str:
    """The task's name in Meta-world: ``drawer_open``, ``drawer-open-v3`` give ``drawer-open``.

    Raises:
        ValueError: no such task; the message names the nearest ones.
    """
    task = name.replace("_", "-").removesuffix("-v3").removesuffix("-v2")
    if task not in METAWORLD_TASKS:
        near = difflib.get_close_matches(task, METAWORLD_TASKS, n=3, cutoff=0.0)
        raise ValueError(f"unknown Meta-world task {name!r}; the nearest are {', '.join(near)}")
    return task


class MetaworldTask(gymnasium.Env):
    """One task with new object and goal positions at each reset, drawn from the seed.

    Observations: ``observation`` float32 [39], the goal included, and of it ``robot`` [4], what
    the robot feels of itself: the hand's position, and how far the gripper is open. Actions:
    float32 [4] in [-1, 1]. Step 500 is truncated. ``info["success"]`` is a bool.
    """

    action_space = gymnasium.spaces.Box(-1.0, 1.0, (4,), np.float32)
    observation_space = gymnasium.spaces.Dict(
        observation=gymnasium.spaces.Box(-np.inf, np.inf, (39,), np.float32),
        robot=gymnasium.spaces.Box(-np.inf, np.inf, (4,), np.float32),
    )

    def __init__(self, task: str) -> None:
        self.sim = ALL_V3_ENVIRONMENTS[f"{task}-v3"]()
        self.sim._freeze_rand_vec = False  # draw new positions at each reset
        self.sim.seeded_rand_vec = True  # from the seed
        self.sim._set_task_called = True
        self.sim._partially_observable = False  # the goal is part of the observation
        del self.sim.sawyer_observation_space  # cached while the goal was hidden: would clip it

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        if seed is not None:
            self.sim.seed(seed)
        observation, _ = self.sim.reset()
        # reset() draws the positions twice and observes the first draw: observe the second.
        mujoco.mj_forward(self.sim.model, self.sim.data)
        current = self.sim._get_curr_obs_combined_no_goal()
        self.sim._prev_obs = current
        return _observed(np.concatenate([current, current, observation[36:]])), {}

    def step(
        self, action: np.ndarray
    ) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        observation, reward, _, truncated, info = self.sim.step(action)
        success = {"success": bool(info["success"])}
        return _observed(observation), float(reward), False, truncated, success

    def close(self) -> None:
        self.sim.close()


def _observed(state: np.ndarray) -> dict[str, np.ndarray]:
    state = state.astype(np.float32)
    return {"observation": state, "robot": state[:4].copy()}


def make_metaworld(
    name: str, *, pixels: int | None, cameras: Sequence[str], render_quality: RenderQuality
) -> tuple[EnvBase, list[Transform]]:
    """A task and the transforms that give it the project's keys; see :func:`make_env`."""
    task = MetaworldTask(task_name(name))
    env = GymWrapper(task)
    env.set_info_dict_reader(SuccessReader())
    transforms: list[Transform] = [
        RenameTransform(["observation", "robot"], ["state", "proprio"]),
    ]
    if pixels is not None:
        clash = [name for name in cameras if name in MOVED and MOVED[name][0] in cameras]
        if clash:
            raise ValueError(f"{clash[0]} is {MOVED[clash[0]][0]} elsewhere: choose one of them")
        views = [_camera(task, name, pixels, render_quality) for name in cameras or ("corner",)]
        transforms.append(Pixels(views, pixels))
    return env, transforms


def _camera(task: MetaworldTask, name: str, size: int, quality: RenderQuality) -> Camera:
    model, data = task.sim.model, task.sim.data
    camera, place = MOVED.get(name, (name, None))
    if place is not None:
        model.camera(camera).pos = place
    flip = camera in _UPSIDE_DOWN
    return Camera(model, data, camera=camera, size=size, quality=quality, flip=flip)
