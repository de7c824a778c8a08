"""gymnasium and dm_control environments, with pictures."""

from __future__ import annotations

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
    except gymnasium.error.DependencyNotInstalled as error:
        raise ImportError(f"gym/{name} needs another package: {error}") from error
    except gymnasium.error.Error as error:
        raise ValueError(f"gymnasium cannot make {name!r}: {error}") from error
    simulation, space = env.unwrapped, env.observation_space
    if not isinstance(env.action_space, gymnasium.spaces.Box):
        raise ValueError(f"gym/{name} has actions {env.action_space}; only continuous ones work")
    if camera is not None and not isinstance(simulation, MujocoEnv):
        raise ValueError(f"gym/{name} has no cameras to choose from, got camera={camera!r}")

    if space.shape is not None and len(space.shape) == 3 and space.dtype == np.uint8:
        return GymWrapper(_ImageObservation(env, pixels or space.shape[0])), [NoSuccess()]
    base = GymWrapper(env)
    transforms = [*_state(base), NoSuccess()]
    if pixels is not None and isinstance(simulation, MujocoEnv):
        transforms.append(
            _camera(simulation.model, simulation.data, camera, pixels, render_quality)
        )
    elif pixels is not None:
        try:
            env.reset()
            env.render()
        except gymnasium.error.DependencyNotInstalled as error:
            raise ImportError(f"gym/{name} needs another package: {error}") from error
        transforms.append(Pixels(partial(_rendered, env, pixels), pixels))
    return base, transforms


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
    transforms = [
        DoubleToFloat(in_keys=["reward"], in_keys_inv=["action"]),
        *_state(env),
        NoSuccess(),
    ]
    if pixels is not None:
        physics = env.physics
        transforms.append(
            _camera(physics.model.ptr, physics.data.ptr, camera, pixels, render_quality)
        )
    return env, transforms


def _state(env: EnvBase) -> list[Transform]:
    """Gather all observations in ``state``, float32 [S]."""
    specs = dict(env.observation_spec.items(True, True))
    doubles = [key for key, spec in specs.items() if spec.dtype == torch.float64]
    return [
        DoubleToFloat(in_keys=doubles),
        CatTensors(list(specs), "state", unsqueeze_if_oor=True),
    ]


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
