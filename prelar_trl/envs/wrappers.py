"""gymnasium and dm_control environments, with pictures."""

from __future__ import annotations

import difflib
import importlib.util
from typing import Any

import gymnasium
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
    TransformedEnv,
)

from prelar_trl.envs.camera import Camera, RenderQuality
from prelar_trl.envs.transforms import ActionRepeat, NoSuccess, Pixels, to_pixels


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
    action_repeat: int,
    **kwargs: Any,
) -> EnvBase:
    """A gymnasium environment as a TorchRL one; see :func:`prelar_trl.envs.make_env`.

    ``kwargs`` go to ``gymnasium.make``.
    """
    try:
        env = gymnasium.make(name, render_mode=None if pixels is None else "rgb_array", **kwargs)
    except gymnasium.error.UnregisteredEnv as error:
        near = difflib.get_close_matches(name, gymnasium.registry, n=3)
        raise ValueError(
            f"unknown gymnasium environment {name!r}; the nearest are {', '.join(near)}"
        ) from error
    except gymnasium.error.DependencyNotInstalled as error:
        raise ImportError(f"gym/{name} needs another package: {error}") from error
    if not isinstance(env.action_space, gymnasium.spaces.Box):
        raise ValueError(f"gym/{name} has actions {env.action_space}; only continuous ones work")
    space = env.observation_space
    is_image = space.shape is not None and len(space.shape) == 3 and space.dtype == np.uint8
    simulation = env.unwrapped
    if camera is not None and (is_image or not isinstance(simulation, MujocoEnv)):
        raise ValueError(f"gym/{name} has no cameras to choose from, got camera={camera!r}")

    if is_image:
        env = _ImageObservation(env, pixels or space.shape[0])
    base = TransformedEnv(GymWrapper(env), ActionRepeat(action_repeat))
    if not is_image:
        base.append_transform(DoubleToFloat(in_keys=["observation"]))
        base.append_transform(RenameTransform(["observation"], ["state"]))
        if pixels is not None and isinstance(simulation, MujocoEnv):
            draw = Camera(
                simulation.model,
                simulation.data,
                camera=camera,
                size=pixels,
                quality=render_quality,
            )
            base.append_transform(Pixels(draw, pixels, draw.close))
        elif pixels is not None:
            base.append_transform(Pixels(lambda: _rendered(env, pixels), pixels))
    return base.append_transform(NoSuccess())


def _rendered(env: gymnasium.Env, size: int) -> torch.Tensor:
    return to_pixels(torch.from_numpy(env.render()), size)


def make_dm_control(
    name: str,
    *,
    pixels: int | None,
    camera: str | None,
    render_quality: RenderQuality,
    action_repeat: int,
    **kwargs: Any,
) -> EnvBase:
    """A DeepMind control task ``<domain>/<task>``; see :func:`prelar_trl.envs.make_env`.

    ``kwargs`` go to ``dm_control.suite.load``.
    """
    if importlib.util.find_spec("dm_control") is None:
        raise ImportError(
            f"dm_control/{name} needs dm_control: pip install 'prelar_trl[dm_control]'"
        )
    if name.count("/") != 1:
        raise ValueError(f"write dm_control/<domain>/<task>, got dm_control/{name}")
    domain, task = name.split("/")
    base = DMControlEnv(domain, task, **kwargs)
    observations = list(base.observation_spec.keys())
    env = TransformedEnv(base, ActionRepeat(action_repeat))
    env.append_transform(DoubleToFloat(in_keys=observations, in_keys_inv=["action"]))
    env.append_transform(CatTensors(observations, "state", unsqueeze_if_oor=True))
    if pixels is not None:
        physics = base._env.physics
        draw = Camera(
            physics.model.ptr,
            physics.data.ptr,
            camera=camera,
            size=pixels,
            quality=render_quality,
        )
        env.append_transform(Pixels(draw, pixels, draw.close))
    return env.append_transform(NoSuccess())
