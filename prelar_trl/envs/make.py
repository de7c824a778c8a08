"""``make_env``: every environment of the project through one door, with the same keys."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import gymnasium
import torch
from torchrl.data import Bounded
from torchrl.envs import (
    ActionScaling,
    Compose,
    EnvBase,
    InitTracker,
    ParallelEnv,
    RewardSum,
    StepCounter,
    Transform,
    TransformedEnv,
)

from prelar_trl.envs.adopt import as_float32, check_env, wrap_env
from prelar_trl.envs.backend import rendering_error
from prelar_trl.envs.toy import EPISODE_STEPS, make_toy
from prelar_trl.envs.transforms import ActionRepeat

Env = EnvBase | gymnasium.Env
# Modules that import MuJoCo: loaded when asked for, as they take seconds and need OpenGL.
SUITES = {
    "metaworld": ("prelar_trl.envs.metaworld", "make_metaworld"),
    "gym": ("prelar_trl.envs.wrappers", "make_gym"),
    "dm_control": ("prelar_trl.envs.wrappers", "make_dm_control"),
}


def make_env(
    name_or_env: str | Env | Callable[[], Env],
    *,
    seed: int = 0,
    pixels: int | None = 64,
    camera: str | None = None,
    render_quality: str = "fast",
    action_repeat: int = 1,
    max_steps: int | None = None,
    num_workers: int = 1,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> EnvBase:
    """Build an environment from its name, or give one of TorchRL or gymnasium the same form.

    Whatever the environment, a reset gives at the root, and a step under ``next``:

    - ``pixels``: uint8 [3, pixels, pixels]
    - ``is_first``: bool [1], the first frame of an episode
    - ``success``: bool [1], of gymnasium environments ``info["success"]`` or ``["is_success"]``;
      False where the environment does not know success
    - ``state``: float32 [S], the simulator's state, never read by an agent (where there is one)
    - ``step_count`` int64 [1] and ``episode_reward`` float32 [1], since the reset
    - after a step also ``reward`` float32 [1] and ``done``, ``terminated``, ``truncated`` bool [1]

    It takes ``action``, float32 [A] in [-1, 1], stretched to the environment's own bounds. What
    the environment calls float64 becomes float32. An environment with a batch size keeps it, as
    leading dimensions of all of these.

    Args:
        name_or_env: ``metaworld/<task>``, ``gym/<id>``, ``dm_control/<domain>/<task>``, ``toy``,
            ``toy/shifted`` (other colors, a textured background), an environment of TorchRL or
            gymnasium, or a function that makes one. Its picture is the observation ``pixels``, or
            the only one that looks like a picture, or (gymnasium) comes from MuJoCo or
            ``render()``; :mod:`prelar_trl.envs.pictures` says what is read.
        seed: of the initial states; worker ``i`` gets ``seed + i``.
        pixels: height and width of the picture; ``None`` leaves the picture out (much faster).
        camera: a camera of the simulation, or the name of one of several pictures among the
            observations. Default: ``corner`` in Meta-world, else the first camera.
        render_quality: ``fast`` or ``full`` (docs/rendering.md shows both).
        action_repeat: apply each action this many times; rewards are summed, success is any.
        max_steps: truncate episodes after this many steps, counted after ``action_repeat``.
            Default: the environment's own limit; 50 for ``toy``.
        num_workers: more than 1 gives a ``ParallelEnv`` of that many processes.
        device: where the tensors are put.
        **kwargs: passed on to ``gymnasium.make`` or ``dm_control.suite.load``.

    Raises:
        ValueError: unknown name, camera, quality, or an environment without what is needed:
            a picture, one vector of bounded continuous actions, one reward.
        ImportError: an optional package is missing.
        RuntimeError: this machine cannot draw MuJoCo's pictures.
    """
    if num_workers < 1:
        raise ValueError(f"num_workers must be at least 1, got {num_workers}")
    build = partial(
        _make_one,
        name_or_env,
        pixels=pixels,
        camera=camera,
        render_quality=render_quality,
        action_repeat=action_repeat,
        max_steps=max_steps,
        **kwargs,
    )
    if num_workers == 1:
        return build(seed=seed).to(device)
    if not isinstance(name_or_env, str) and _is_env(name_or_env):
        raise ValueError("num_workers > 1 needs a function that makes the environment, not one env")
    seeds = [{"seed": seed + worker} for worker in range(num_workers)]
    # Not TorchRL's default, which takes num_workers threads away from this process for good: its
    # updates run while the workers wait.
    threads = torch.get_num_threads()
    return ParallelEnv(
        num_workers, build, create_env_kwargs=seeds, device=device, num_threads=threads
    )


def _make_one(
    name_or_env: str | Env | Callable[[], Env],
    *,
    seed: int,
    pixels: int | None,
    camera: str | None,
    render_quality: str,
    action_repeat: int,
    max_steps: int | None,
    **kwargs: Any,
) -> EnvBase:
    view = {"pixels": pixels, "camera": camera, "render_quality": render_quality}
    if isinstance(name_or_env, str):
        base, transforms = _from_name(name_or_env, **view, **kwargs)
        if name_or_env.partition("/")[0] == "toy":
            max_steps = max_steps or EPISODE_STEPS
    else:
        base, transforms = _from_object(name_or_env, **view)
    repeat = [] if action_repeat == 1 else [ActionRepeat(action_repeat)]
    env = TransformedEnv(base, Compose(*cast(Any, [*repeat, *transforms])))
    for conversion in as_float32(env):
        env.append_transform(conversion)
    check_env(env)
    actions = cast(Bounded, env.action_spec)
    if (actions.low != -1).any() or (actions.high != 1).any():
        env.append_transform(ActionScaling())
    env.append_transform(InitTracker(init_key="is_first"))
    if "truncated" not in env.full_done_spec.keys():  # StepCounter adds it when it has a limit
        max_steps = max_steps or torch.iinfo(torch.int64).max
    env.append_transform(StepCounter(max_steps=max_steps))
    env.append_transform(RewardSum())
    env.set_seed(seed)
    return env


def _from_name(name: str, **options: Any) -> tuple[EnvBase, list[Transform]]:
    family, _, rest = name.partition("/")
    if family == "toy":
        return make_toy(rest, **options)
    if family not in SUITES or not rest:
        raise ValueError(
            f"unknown environment {name!r}; write metaworld/<task>, gym/<id>, "
            "dm_control/<domain>/<task> or toy, or give an environment"
        )
    module, function = SUITES[family]
    try:
        make = getattr(importlib.import_module(module), function)
    except ModuleNotFoundError:
        raise
    except (ImportError, AttributeError) as error:  # OpenGL's library is missing or broken
        raise rendering_error(error) from error
    return make(rest, **options)


def _from_object(
    env: Any, *, pixels: int | None, camera: str | None, render_quality: str
) -> tuple[EnvBase, list[Transform]]:
    """A user's own environment, or the one that a user's function makes."""
    if not _is_env(env):
        env = env()
    if isinstance(env, EnvBase):
        return wrap_env(env, pixels=pixels, camera=camera)
    if not isinstance(env, gymnasium.Env):
        raise ValueError(
            f"an environment of TorchRL or gymnasium is needed, got {type(env).__name__}"
        )
    wrap = importlib.import_module("prelar_trl.envs.wrappers").wrap_gym
    return wrap(env, pixels=pixels, camera=camera, render_quality=render_quality)


def _is_env(candidate: Any) -> bool:
    return isinstance(candidate, EnvBase | gymnasium.Env) or not callable(candidate)
