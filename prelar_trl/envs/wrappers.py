"""gymnasium and dm_control environments, with pictures."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import mujoco
from tensordict import NestedKey
from torchrl.envs import DMControlEnv, EnvBase, GymWrapper, Transform

from prelar_trl.envs.actions import NO_FACTORS
from prelar_trl.envs.adopt import find_pictures, pixels_transform
from prelar_trl.envs.camera import Camera, RenderQuality
from prelar_trl.envs.gym_check import GymCheck
from prelar_trl.envs.transforms import Gather, Pixels, Success, SuccessReader

OWN_NAMES = ("is_first", "step_count", "episode_reward", "vector", "state", "action", "next")
OWN_NAMES += ("reward", "done", "terminated", "truncated")


def make_gym(
    name: str,
    *,
    pixels: int | None,
    cameras: Sequence[str] = (),
    render_quality: RenderQuality,
    **kwargs: Any,
) -> tuple[EnvBase, list[Transform]]:
    """A gymnasium environment by its id; ``kwargs`` go to ``gymnasium.make``. See `wrap_gym`."""
    mode = {} if pixels is None else {"render_mode": "rgb_array"}
    try:
        try:
            env = gymnasium.make(name, **mode, **kwargs)
        except TypeError as error:  # it knows no render modes: its observations may be pictures
            if not mode or "render_mode" not in str(error):
                raise
            env = gymnasium.make(name, **kwargs)
    except gymnasium.error.DependencyNotInstalled as error:
        raise ImportError(f"gym/{name} needs another package: {error}") from error
    except gymnasium.error.Error as error:
        raise ValueError(f"gymnasium cannot make {name!r}: {error}") from error
    view = {"pixels": pixels, "cameras": cameras, "render_quality": render_quality}
    return wrap_gym(env, f"gym/{name}", **view)


def wrap_gym(
    env: gymnasium.Env,
    name: str | None = None,
    *,
    pixels: int | None,
    cameras: Sequence[str] = (),
    render_quality: RenderQuality,
) -> tuple[EnvBase, list[Transform]]:
    """A gymnasium environment and the transforms that give it the project's keys.

    Pictures come from observations, else from the simulation (environments that have a MuJoCo
    ``model`` and ``data``), else from ``render()``. The other observations become ``state``.
    ``success`` is read from ``info``.
    """
    name = name or type(env.unwrapped).__name__
    space = env.action_space
    if not isinstance(space, gymnasium.spaces.Box | gymnasium.spaces.Discrete):
        raise ValueError(f"{name} has actions {space}: {NO_FACTORS}")
    if isinstance(env.observation_space, gymnasium.spaces.Dict):
        for key, seen in env.observation_space.items():
            nested = isinstance(seen, gymnasium.spaces.Dict | gymnasium.spaces.Tuple)
            if key == "success" or (nested and key in OWN_NAMES):
                raise ValueError(
                    f"{name} has an observation {key!r}, a name that is given here (success is "
                    "read from info): rename it in a wrapper of the environment"
                )
    if isinstance(space, gymnasium.spaces.Discrete) and space.start:  # TorchRL counts from 0
        first, choices = space.start, gymnasium.spaces.Discrete(space.n)
        env = gymnasium.wrappers.TransformAction(env, lambda choice: choice + first, choices)
    simulation: Any = env.unwrapped
    try:
        base = GymWrapper(_of_numbers(GymCheck(env, name)))
    except (IndexError, KeyError, NotImplementedError, RuntimeError, ValueError) as error:
        # A kind of space that TorchRL lacks.
        seen = " ".join(str(env.observation_space).split())[:200]
        raise ValueError(f"TorchRL cannot read the observations of {name}, {seen}") from error
    pictures = find_pictures(base)
    simulated = isinstance(getattr(simulation, "model", None), mujoco.MjModel)
    if cameras and not pictures and not simulated:
        raise ValueError(f"{name} has no cameras to choose from, got {', '.join(cameras)}")
    transforms: list[Transform] = []
    if pixels is not None and pictures:
        transforms += pixels_transform(base, pixels, cameras)
        used = transforms[0].in_keys
        transforms.append(_state(base, [key for key in pictures if key not in used], used))
    else:
        transforms.append(_state(base, pictures))
    base.set_info_dict_reader(SuccessReader())
    if pixels is None or pictures:
        return base, transforms
    if simulated:
        model, data = simulation.model, simulation.data
        marks = getattr(simulation, "_render_callback", None)  # of gymnasium-robotics: the goal
        return base, [*transforms, _cameras(model, data, cameras, pixels, render_quality, marks)]
    picture = Pixels([env.render], pixels, source=f"render() of {name}")
    try:
        env.reset()
        picture.draw()
    except gymnasium.error.DependencyNotInstalled as error:
        raise ImportError(f"{name} needs another package: {error}") from error
    except NotImplementedError as error:
        raise ValueError(
            f"{name} gives no picture: neither its observations nor render()"
        ) from error
    return base, [*transforms, picture]


def _of_numbers(env: gymnasium.Env) -> gymnasium.Env:
    """Without observations in words and in spaces of the environment's own, as MiniGrid's mission.

    TorchRL converts no space that gymnasium does not have.
    """
    spaces = gymnasium.spaces
    if not isinstance(env.observation_space, spaces.Dict):
        return env
    kinds = (spaces.Box, spaces.Discrete, spaces.MultiBinary, spaces.MultiDiscrete)
    nested = (spaces.Dict, spaces.Tuple)
    known = [key for key, x in env.observation_space.items() if isinstance(x, kinds + nested)]
    if len(known) in (0, len(env.observation_space)):
        return env
    return gymnasium.wrappers.FilterObservation(env, known)


def make_robotics(name: str, **options: Any) -> tuple[EnvBase, list[Transform]]:
    """A task of gymnasium-robotics by its id, such as ``FetchReach-v4``. See `make_gym`."""
    if importlib.util.find_spec("gymnasium_robotics") is None:
        raise ImportError(
            f"robotics/{name} needs gymnasium-robotics: pip install 'prelar_trl[robotics]'"
        )
    gymnasium.register_envs(importlib.import_module("gymnasium_robotics"))
    return make_gym(name, **options)


def make_dm_control(
    name: str,
    *,
    pixels: int | None,
    cameras: Sequence[str] = (),
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
    transforms: list[Transform] = [_state(env), Success(given=False)]
    if pixels is not None:
        physics = env.physics
        transforms.append(
            _cameras(physics.model.ptr, physics.data.ptr, cameras, pixels, render_quality)
        )
    return env, transforms


def _state(env: EnvBase, drop: Sequence[NestedKey] = (), keep: Sequence[NestedKey] = ()) -> Gather:
    """Gather the observations that are numbers in ``state``, float32 [S], those of ``keep`` not."""
    specs = dict(env.observation_spec.items(True, True))
    drop = [*drop, *(key for key, spec in specs.items() if spec.dtype is None)]
    keys = [key for key in specs if key not in drop and key not in keep]
    return Gather("state", keys, drop=[*keys, *drop])


def _cameras(
    model: mujoco.MjModel,
    data: mujoco.MjData,
    cameras: Sequence[str],
    size: int,
    quality: RenderQuality,
    before: Callable[[], None] | None = None,
) -> Pixels:
    """The pictures of these cameras; without any, of the first that there is."""
    views = [
        Camera(model, data, camera=camera, size=size, quality=quality, before=before)
        for camera in cameras or (None,)
    ]
    return Pixels(views, size)
