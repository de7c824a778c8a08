"""``make_env``: every environment of the project through one door, with the same keys."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast, get_args

import gymnasium
import torch
from torchrl.envs import (
    Compose,
    DeviceCastTransform,
    EnvBase,
    InitTracker,
    RewardSum,
    StepCounter,
    Transform,
    TransformedEnv,
)
from torchrl.envs.gym_like import GymLikeEnv

from prelar_trl.envs.actions import action_transforms
from prelar_trl.envs.adopt import as_float32, check_env, vector_keys, wrap_env
from prelar_trl.envs.backend import rendering_error
from prelar_trl.envs.registry import Suite, find_suite, import_factory, is_import_path
from prelar_trl.envs.transforms import ActionRepeat, Gather, StepCheck
from prelar_trl.envs.workers import WorkerEnv
from prelar_trl.types import RenderQuality
from prelar_trl.utils import check_choice, check_integers, check_range

Env = EnvBase | gymnasium.Env
LARGEST_PICTURE = 4096  # height and width


def make_env(
    name_or_env: str | Env | Callable[[], Env],
    *,
    seed: int = 0,
    pixels: int | None = 64,
    camera: str | None = None,
    cameras: Sequence[str] | None = None,
    vectors: Sequence[str] | None = None,
    render_quality: str = "fast",
    action_repeat: int = 1,
    max_steps: int | None = None,
    num_workers: int = 1,
    worker_timeout: float = 120.0,
    worker_failures: int = 5,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> EnvBase:
    """Build an environment from its name, or give one of TorchRL or gymnasium the same form.

    Whatever the environment, a reset gives at the root, and a step under ``next``:

    - ``pixels``: uint8 [3 V, pixels, pixels], of V cameras one behind the other; V = 1 by default
    - ``vector``: float32 [size], where ``vectors`` are chosen
    - ``is_first``: bool [1], the first frame of an episode
    - ``success``: bool [1], of gymnasium environments ``info["success"]`` or ``["is_success"]``;
      False where the environment does not know success
    - ``state``: float32 [S], the simulator's state (where there is one), which no agent reads
    - ``step_count`` int64 [1] and ``episode_reward`` float32 [1], since the reset
    - after a step also ``reward`` float32 [1] and ``done``, ``terminated``, ``truncated`` bool [1]

    It takes ``action``, float32 [A]: in [-1, 1], stretched to the environment's own bounds, or
    one-hot (a ``OneHot`` spec) where the environment takes one of A choices. A step raises a
    ``ValueError`` for an action that is NaN or infinite, which no environment then sees, and for a
    reward that is, or is beyond 1e8; it names the step and the environment. A reset or step also
    raises a ``ValueError`` or ``TypeError`` where the environment gives something else than its
    spaces or specs declare (TorchRL's ``SerialEnv`` and ``ParallelEnv`` write it into buffers
    first: rather use ``num_workers``). What the environment calls float64 becomes float32. An
    environment with a batch size keeps it, as leading dimensions of all of these.

    Args:
        name_or_env: ``metaworld/<task>``, ``gym/<id>``, ``dm_control/<domain>/<task>``, ``toy``,
            ``toy/shifted`` (other colors, a textured background), or ``<suite>/<task>`` of another
            suite (:mod:`prelar_trl.envs.registry`); an environment of TorchRL or gymnasium, or a
            function that makes one, also as ``<module>:<callable>``. Its picture is the
            observation ``pixels``, or the only one that looks like a picture, or (gymnasium) comes
            from MuJoCo or ``render()``; :mod:`prelar_trl.envs.pictures` says what is read.
        seed: of the initial states; worker ``i`` gets ``seed + i``.
        pixels: height and width of the picture; ``None`` leaves the picture out (much faster).
        camera: a camera of the simulation, or the name of one of several pictures among the
            observations. Default: ``corner`` in Meta-world, else the first camera. Meta-world's
            ``corner2_near`` is ``corner2`` at (0.75, 0.075, 0.7), where most papers have it.
        cameras: instead: several of them.
        vectors: names of observations that an agent is to see as numbers, or patterns of names
            (``joint*``); ``state`` is all of them. Meta-world has ``proprio`` [4] besides. Default:
            none.
        render_quality: ``fast`` or ``full`` (docs/rendering.md shows both).
        action_repeat: apply each action this many times; rewards are summed, success is any. Not
            for vector environments of gymnasium.
        max_steps: truncate episodes after this many steps, counted after ``action_repeat``.
            Default: the environment's own limit; 50 for ``toy``.
        num_workers: more than 1 gives a :class:`~prelar_trl.envs.workers.WorkerEnv` of that many
            processes, which are replaced when they die or hang.
        worker_timeout: seconds after which a worker that gives no answer hangs.
        worker_failures: so many of one worker in a row are an error.
        device: where the tensors are put.
        **kwargs: passed on to ``gymnasium.make`` or ``dm_control.suite.load``.

    Raises:
        ValueError: unknown name, camera, quality, or an environment without what is needed:
            a picture, one vector of bounded continuous actions or one choice, one reward.
        ImportError: an optional package is missing.
        RuntimeError: this machine cannot draw MuJoCo's pictures.
    """
    check_integers(num_workers=num_workers, worker_failures=worker_failures)
    check_integers(action_repeat=action_repeat)
    if max_steps is not None:
        check_integers(max_steps=max_steps)
    check_integers(0, seed=seed)
    if pixels is not None:
        check_integers(1, LARGEST_PICTURE, pixels=pixels)
    check_range(0.001, 1e6, worker_timeout=worker_timeout)
    device = _as_device(device)
    check_choice("render_quality", render_quality, get_args(RenderQuality))
    chosen = _chosen(camera, cameras)
    view = {"pixels": pixels, "cameras": chosen, "render_quality": render_quality}
    build = partial(
        _make_one,
        name_or_env,
        view,
        vectors=() if vectors is None else _names("vectors", vectors),
        action_repeat=action_repeat,
        max_steps=max_steps,
        **kwargs,
    )
    name = getattr(name_or_env, "__name__", type(name_or_env).__name__)
    name = f"environment {name_or_env if isinstance(name_or_env, str) else name}"
    if num_workers == 1:
        return checked(build(seed=seed), name).to(device)
    if not isinstance(name_or_env, str) and _is_env(name_or_env):
        raise ValueError("num_workers > 1 needs a function that makes the environment, not one env")
    workers = WorkerEnv(
        build, num_workers, seed=seed, timeout=worker_timeout, max_failures=worker_failures
    )
    env = checked(workers, name)
    if device.type == "cpu":
        return env
    return env.append_transform(DeviceCastTransform(device, orig_device="cpu"))


def _make_one(
    name_or_env: str | Env | Callable[[], Env],
    view: dict[str, Any],
    /,
    *,
    seed: int,
    vectors: tuple[str, ...],
    action_repeat: int,
    max_steps: int | None,
    **kwargs: Any,
) -> EnvBase:
    """See :func:`make_env`; ``view`` holds ``pixels``, ``cameras`` and ``render_quality``."""
    if isinstance(name_or_env, str) and is_import_path(name_or_env):
        name_or_env = import_factory(name_or_env)
    if isinstance(name_or_env, str):
        suite = _suite(name_or_env)
        make = cast(Callable[..., Any], suite.make)
        made = make(name_or_env.partition("/")[2], **view, **kwargs)
        base, transforms = made if isinstance(made, tuple) else _from_object(made, view)
        max_steps = max_steps or suite.max_steps
    else:
        base, transforms = _from_object(name_or_env, view)
    if action_repeat > 1 and isinstance(base, GymLikeEnv) and base.batch_size:
        raise ValueError(
            f"action_repeat={action_repeat}: a vector environment of gymnasium steps those too "
            "that have ended: repeat inside each environment"
        )
    repeat = [] if action_repeat == 1 else [ActionRepeat(action_repeat)]
    if vectors:  # before `state` takes the place of what it gathers
        state = [x for x in transforms if isinstance(x, Gather) and x.out_keys == ["state"]]
        place = transforms.index(state[0]) if state else len(transforms)
        seen = TransformedEnv(base, Compose(*cast(Any, transforms[:place])))
        transforms.insert(place, Gather("vector", vector_keys(seen, vectors)))
        for transform in transforms:  # each has one parent at a time
            transform.reset_parent()
    env = TransformedEnv(base, Compose(*cast(Any, [*repeat, *transforms])))
    for conversion in as_float32(env):
        env.append_transform(conversion)
    check_env(env)
    for transform in action_transforms(env):
        env.append_transform(transform)
    env.append_transform(InitTracker(init_key="is_first"))
    if "truncated" not in env.full_done_spec.keys():  # StepCounter adds it when it has a limit
        max_steps = max_steps or torch.iinfo(torch.int64).max
    env.append_transform(StepCounter(max_steps=max_steps))
    env.append_transform(RewardSum())
    env.set_seed(seed)
    return env


def _chosen(camera: str | None, cameras: Sequence[str] | None) -> tuple[str, ...]:
    """The cameras; none: the environment's default."""
    if camera is not None and cameras is not None:
        raise ValueError(f"camera={camera} and cameras={list(cameras)}: give one of them")
    if not isinstance(camera, str | None):
        raise TypeError(f"camera={camera!r} must be a name")
    if cameras is None:
        return () if camera is None else (camera,)
    return _names("cameras", cameras)


def _names(option: str, given: Any) -> tuple[str, ...]:
    """A list of different names."""
    listed = isinstance(given, Sequence) and not isinstance(given, str | bytes)
    if not listed or any(not isinstance(x, str) for x in given) or len(set(given)) < len(given):
        raise ValueError(f"{option}={given!r} must be a list of different names")
    return tuple(given)


def _as_device(device: Any) -> torch.device:
    if not isinstance(device, str | int | torch.device):
        raise ValueError(f"device={device!r} must be a device, such as cpu or cuda:0")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, TypeError, AssertionError) as error:
        why = str(error).partition("\n")[0][:80]
        raise ValueError(f"device={device!r} cannot be used: {why}") from None
    if found.type == "meta":
        raise ValueError("device='meta' has no values: give cpu or cuda")
    return found


def checked(env: EnvBase, name: str) -> TransformedEnv:
    """An environment whose actions and rewards are looked at, see `StepCheck`."""
    check = StepCheck(name, env.full_action_spec["action"])
    return cast(TransformedEnv, env.append_transform(check))


def _suite(name: str) -> Suite:
    try:
        return find_suite(name)
    except ModuleNotFoundError:
        raise
    except (ImportError, AttributeError) as error:  # OpenGL's library is missing or broken
        raise rendering_error(error) from error


def _from_object(env: Any, view: dict[str, Any]) -> tuple[EnvBase, list[Transform]]:
    """A user's own environment, or the one that a user's function makes."""
    if not _is_env(env):
        env = env()
    if isinstance(env, EnvBase):
        return wrap_env(env, pixels=view["pixels"], cameras=view["cameras"])
    if not isinstance(env, gymnasium.Env):
        given = "nothing" if env is None else type(env).__name__
        raise ValueError(f"an environment of TorchRL or gymnasium is needed, got {given}")
    wrap = importlib.import_module("prelar_trl.envs.wrappers").wrap_gym
    return wrap(env, **view)


def _is_env(candidate: Any) -> bool:
    return isinstance(candidate, EnvBase | gymnasium.Env) or not callable(candidate)
