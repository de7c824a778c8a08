"""RoboDesk's tasks (Kannan et al., 2021), from the package ``robodesk`` with its old gym interface.

Rewards and random starts are the package's own. Differences: pictures come from a renderer that is
kept, through the same view; joint positions of the objects are given as such (the package gives
their velocities twice); starts follow the seed, not numpy's global state.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import gymnasium
import mujoco
import numpy as np
import torch
from torchrl.envs import EnvBase, GymWrapper, Transform

from prelar_trl.envs.camera import Camera, RenderQuality
from prelar_trl.envs.transforms import Gather, Pixels, SuccessReader

EPISODE_STEPS = 500
LOOK_AT = (0.0, 0.535, 1.1)
# The package draws 120x120 pixels, and makes 64x64 of this part of them.
DRAWN, LEFT, TOP, RIGHT, BOTTOM = 120 / 64, 16.75 / 64, 25.0 / 64, 105.0 / 64, 88.75 / 64


class RoboDeskTask(gymnasium.Env):
    """One task. Actions: float32 [5] in [-1, 1]. Step 500 is truncated.

    Observations: ``qpos_robot`` [9], ``qvel_robot`` [9], ``end_effector`` [3] and ``qpos_objects``,
    ``qvel_objects``. ``info["success"]`` is what the package's own criterion says of the step.

    Args:
        task: such as ``open_slide``.
        reward: ``dense``, ``sparse`` or ``success`` (once an episode), as the package has them.

    Raises:
        ValueError: unknown task or reward; the message names the nearest tasks.
    """

    action_space = gymnasium.spaces.Box(-1.0, 1.0, (5,), np.float32)
    observation_space: gymnasium.spaces.Dict

    def __init__(self, task: str, *, reward: str = "dense") -> None:
        if reward not in ("dense", "sparse", "success"):
            raise ValueError(f"reward={reward!r} is unknown; choose dense, sparse or success")
        package = importlib.import_module("robodesk")

        class Unseen(package.RoboDesk):
            """Draws nothing by itself."""

            def _get_obs(self) -> dict[str, Any]:
                return {}

        self.sim: Any = Unseen(task, reward, episode_length=0)
        task = task.replace("-", "_")
        if task not in self.sim.all_tasks:
            near = difflib.get_close_matches(task, self.sim.all_tasks, n=3, cutoff=0.0)
            raise ValueError(f"unknown RoboDesk task {task!r}; the nearest are {', '.join(near)}")
        self.sim.task = task
        self.random = np.random.RandomState(0).get_state()
        self.steps = 0
        spaces = gymnasium.spaces
        self.observation_space = spaces.Dict(
            {
                name: spaces.Box(-np.inf, np.inf, value.shape, np.float32)
                for name, value in self._observe().items()
            }
        )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        if seed is not None:
            self.random = np.random.RandomState(seed).get_state()
        with self._own_random_numbers():
            self.sim.reset()
        self.steps = 0
        return self._observe(), {}

    def step(
        self, action: np.ndarray
    ) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        _, reward, _, _ = self.sim.step(action)
        self.steps += 1
        success = bool(self.sim._get_task_reward(self.sim.task, "success"))
        truncated = self.steps >= EPISODE_STEPS
        return self._observe(), float(reward), False, truncated, {"success": success}

    def _observe(self) -> dict[str, np.ndarray]:
        data, robot = self.sim.physics.data, self.sim.num_joints
        values = {
            "qpos_robot": data.qpos[:robot],
            "qvel_robot": data.qvel[:robot],
            "end_effector": self.sim.physics.named.data.site_xpos["end_effector"],
            "qpos_objects": data.qpos[robot:],
            "qvel_objects": data.qvel[robot:],
        }
        return {name: np.array(value, np.float32) for name, value in values.items()}

    @contextmanager
    def _own_random_numbers(self) -> Iterator[None]:
        """The package draws from numpy's global state, which is as it was afterwards."""
        before = np.random.get_state()  # noqa: NPY002
        np.random.set_state(self.random)  # noqa: NPY002
        try:
            yield
        finally:
            self.random = np.random.get_state()  # noqa: NPY002
            np.random.set_state(before)  # noqa: NPY002


class DeskCamera(Camera):
    """The package's view of the desk, uint8 [3, height, width], of about 64:88."""

    def __init__(self, task: RoboDeskTask, size: int, quality: RenderQuality) -> None:
        physics = task.sim.physics
        drawn = round(DRAWN * size)
        super().__init__(physics.model.ptr, physics.data.ptr, size=drawn, quality=quality)
        self.size = size
        view = mujoco.MjvCamera()
        view.type = mujoco.mjtCamera.mjCAMERA_FREE
        view.lookat[:] = LOOK_AT
        view.distance, view.azimuth, view.elevation = 1.8, 90, -60
        self._camera = view

    def __call__(self) -> torch.Tensor:
        left, top, right, bottom = (round(x * self.size) for x in (LEFT, TOP, RIGHT, BOTTOM))
        return super().__call__()[:, top:bottom, left:right]


def make_robodesk(
    name: str,
    *,
    pixels: int | None,
    cameras: Sequence[str],
    render_quality: RenderQuality,
    **kwargs: Any,
) -> tuple[EnvBase, list[Transform]]:
    """A task and the transforms that give it the project's keys; ``kwargs``: ``reward``."""
    if importlib.util.find_spec("robodesk") is None:
        raise ImportError(f"robodesk/{name} needs robodesk: pip install 'prelar_trl[robodesk]'")
    if cameras:
        raise ValueError(f"robodesk has one view, got cameras {', '.join(cameras)}")
    task = RoboDeskTask(name, **kwargs)
    env = GymWrapper(task)
    keys = [*task.observation_space.keys()]
    transforms: list[Transform] = [Gather("state", keys, drop=keys)]
    env.set_info_dict_reader(SuccessReader())
    if pixels is not None:
        transforms.append(Pixels([DeskCamera(task, pixels, render_quality)], pixels))
    return env, transforms
