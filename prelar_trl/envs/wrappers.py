"""gymnasium and dm_control environments, with pictures."""

from __future__ import annotations

import difflib
import importlib.util
from functools import partial
from typing import Any

import gymnasium
import mujoco
import numpy as np
import torch
from gymnasium.envs.mujoco import MujocoEnv
from torchrl.envs import (
    CatTensors,
    DMControlEnv,
    DoubleToFloat,
    EnvBase,
    GymWrapper,
    RenameTransform,
    Transform,
)

from prelar_trl.envs.camera import Camera, RenderQuality
from prelar_trl.envs.transforms import NoSuccess, Pixels, to_pixels


class _ImageObservation(gymnasium.ObservationWrapper):
    """Image observations, uint8 [H, W, 3], as a dict with ``pixels`` uint8 [3, size, size]."""

    def __init__(self, env: gymnasium.Env, size: int) -> None:
        super().__init__(env)
        self._size = size
        box = gymnasium.spaces.Box(0, 255, (3, size, size), np.uint8)
        self.observation_space = gymnasium.spaces.Dict({"pixels": box})

    def observation(self, observation: np.ndarray) -> dict[str, np.ndarray]:
        return {"pixels": to_pixels(torch.from_numpy(observation), self._size).numpy()}


def make_gym(
    name: str,
    *,
    pixels: int | None,
    camera: str | None,
    render_quality: RenderQuality,
    **kwargs: Any,
) -> tuple[EnvBase, list[Transform]]:
    """A gymnasium environment and the transforms that give it the project's keys.

    Pictures come from the simulation (MuJoCo environments), from image observations, or from
    ``render()``, averaged over areas to the asked size. ``kwargs`` go to ``gymnasium.make``.
    """
    try:
        env = gymnasium.make(name, render_mode=None if pixels is None else "rgb_array", **kwargs)
        simulation = env.unwrapped
        is_mujoco = isinstance(simulation, MujocoEnv)
        if pixels is not None and not is_mujoco:
            env.reset()
            env.render()
    except gymnasium.error.DependencyNotInstalled as error:
        raise ImportError(f"gym/{name} needs another package: {error}") from error
    except gymnasium.error.Error as error:
        near = difflib.get_close_matches(name, gymnasium.registry, n=3)
        raise ValueError(
            f"gymnasium cannot make {name!r} ({error}); the nearest are {', '.join(near)}"
        ) from error
    if not isinstance(env.action_space, gymnasium.spaces.Box):
        raise ValueError(f"gym/{name} has actions {env.action_space}; only continuous ones work")
    if camera is not None and not is_mujoco:
        raise ValueError(f"gym/{name} has no cameras to choose from, got camera={camera!r}")

    space = env.observation_space
    if space.shape is not None and len(space.shape) == 3 and space.dtype == np.uint8:
        env = _ImageObservation(env, pixels or space.shape[0])
        return GymWrapper(env), [NoSuccess()]
    transforms = [
        DoubleToFloat(in_keys=["observation"]),
        RenameTransform(["observation"], ["state"]),
        NoSuccess(),
    ]
    if pixels is not None and is_mujoco:
        transforms.append(
            _camera(simulation.model, simulation.data, camera, pixels, render_quality)
        )
    elif pixels is not None:
        transforms.append(Pixels(partial(_rendered, env, pixels), pixels))
    return GymWrapper(env), transforms


def make_dm_control(
    name: str,
    *,
    pixels: int | None,
    camera: str | None,
    render_quality: RenderQuality,
    **kwargs: Any,
) -> tuple[EnvBase, list[Transform]]:
    """A DeepMind control task ``<domain>/<task>`` and the transforms that give it the keys.

    ``kwargs`` go to ``dm_control.suite.load``.
    """
    if importlib.util.find_spec("dm_control") is None:
        raise ImportError(
            f"dm_control/{name} needs dm_control: pip install 'prelar_trl[dm_control]'"
        )
    if name.count("/") != 1:
        raise ValueError(f"write dm_control/<domain>/<task>, got dm_control/{name}")
    env = DMControlEnv(*name.split("/"), **kwargs)
    observations = list(env.observation_spec.keys())
    transforms = [
        DoubleToFloat(in_keys=[*observations, "reward"], in_keys_inv=["action"]),
        CatTensors(observations, "state"),
        NoSuccess(),
    ]
    if pixels is not None:
        physics = env.physics
        transforms.append(
            _camera(physics.model.ptr, physics.data.ptr, camera, pixels, render_quality)
        )
    return env, transforms


def _camera(
    model: mujoco.MjModel,
    data: mujoco.MjData,
    camera: str | None,
    size: int,
    quality: RenderQuality,
) -> Pixels:
    draw = Camera(model, data, camera=camera, size=size, quality=quality)
    return Pixels(draw, size, draw.close)


def _rendered(env: gymnasium.Env, size: int) -> torch.Tensor:
    return to_pixels(torch.from_numpy(np.ascontiguousarray(env.render())), size)
