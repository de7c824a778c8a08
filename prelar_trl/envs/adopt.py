"""The door for environments that others made: what they give is found, turned or named here."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import gymnasium
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from tensordict import NestedKey
from torchrl.data import Bounded
from torchrl.envs import Compose, DTypeCastTransform, EnvBase, Transform, TransformedEnv
from torchrl.envs.gym_like import GymLikeEnv

from prelar_trl.envs.pictures import PictureConverter, check_picture, looks_like_picture, white_of
from prelar_trl.envs.spec_check import OutputCheck, OwnRandomActions, SpecCheck, shown
from prelar_trl.envs.transforms import OwnPixels, Success, SuccessReader, ToPixels

NOT_SEEN = ("pixels", "success", "is_first", "step_count", "episode_reward", "vector")


def wrap_env(
    env: EnvBase, *, pixels: int | None, cameras: Sequence[str] = ()
) -> tuple[EnvBase, list[Transform]]:
    """A TorchRL environment, taken apart, with the transforms that add what it lacks.

    What it gives is looked at, see `SpecCheck`.

    Raises:
        ValueError: a vector environment whose last observations of episodes are lost, or pictures,
            see `pixels_transform`.
    """
    transforms: list[Transform] = []
    given = {*env.observation_spec.keys(True, True)}
    if pixels is not None:
        transforms += pixels_transform(env, pixels, cameras)
    base = env
    if isinstance(env, TransformedEnv):  # taken apart, so that the action repeat comes first
        own = env.transform if isinstance(env.transform, Compose) else [env.transform]
        base = env.base_env
        check = [] if isinstance(base, GymLikeEnv) else [OutputCheck(env)]
        transforms = [*(each.clone() for each in own), *check, *transforms]
    if isinstance(base, GymLikeEnv) and isinstance(vector := base._env, VectorEnv):
        several = isinstance(vector.single_observation_space, gymnasium.spaces.Dict)
        if several and vector.metadata.get("autoreset_mode") == AutoresetMode.SAME_STEP:
            raise ValueError(
                "TorchRL loses the last observations of episodes where they are a Dict: make the "
                "vector environment with autoreset_mode=AutoresetMode.DISABLED"
            )
    # TorchRL reads the info of vector environments by itself, but not that of the last step.
    if isinstance(base, GymLikeEnv) and ("success" not in given or base.batch_size):
        base.set_info_dict_reader(SuccessReader(base.batch_size))
    else:
        transforms.append(Success(given="success" in given))
    if not isinstance(base, GymLikeEnv | SpecCheck):  # TorchRL makes gym's fit their specs
        own_random = type(base).rand_action is not EnvBase.rand_action
        base = OwnRandomActions(base) if own_random else SpecCheck(base)
    return base, transforms


def find_pictures(env: EnvBase) -> list[NestedKey]:
    """The observations that are meant as pictures; ``pixels`` alone where it is there."""
    specs = dict(env.observation_spec.items(True, True))
    if "pixels" in specs:
        return ["pixels"]
    first = len(env.batch_size)
    return [
        key for key, spec in specs.items() if looks_like_picture(spec.shape[first:], spec.dtype)
    ]


def pixels_transform(env: EnvBase, size: int, cameras: Sequence[str] = ()) -> list[Transform]:
    """What turns pictures among the observations into ``pixels``, or copies them where they are.

    Without ``cameras`` the only one.

    Raises:
        ValueError: there is no picture, more than one and none is chosen, or it cannot be used.
    """
    names = {shown(key): key for key in find_pictures(env)}
    if not names:
        given = ", ".join(map(shown, env.observation_spec.keys(True, True))) or "nothing"
        raise ValueError(f"the environment gives no 'pixels', only {given}")
    batch = env.batch_size
    if "pixels" in names:
        spec = env.observation_spec["pixels"]
        shape = tuple(spec.shape[len(batch) :])
        views = len(cameras) or max(1, (shape or (0,))[0] // 3)
        if shape == (3 * views, size, size) and spec.dtype == torch.uint8:
            return [OwnPixels()]
    for camera in cameras:
        if camera not in names:
            raise ValueError(f"unknown camera {camera!r}; this environment has {', '.join(names)}")
    if not cameras and len(names) > 1:
        raise ValueError(
            f"the environment gives {len(names)} pictures, choose by camera=: {', '.join(names)}; "
            "or several by cameras="
        )
    converters = {}
    for name in cameras or names:
        spec = env.observation_spec[names[name]]
        check_picture(name, spec.shape[len(batch) :], spec.dtype)
        white = white_of(spec.high) if isinstance(spec, Bounded) else None
        converters[names[name]] = PictureConverter(
            size, white=white, batch_dims=len(batch), source=name
        )
    return [ToPixels(converters)]


def vector_keys(env: EnvBase, vectors: Sequence[str]) -> list[NestedKey]:
    """The observations that are numbers, no pictures, and whose name fits a name or pattern.

    Patterns are those of file names: ``joint*``. ``state`` is all of them where none has that name.

    Raises:
        ValueError: one that fits nothing.
    """
    first = len(env.batch_size)
    names = {
        shown(key): key
        for key, spec in env.observation_spec.items(True, True)
        if spec.dtype not in (None, torch.bool)
        and shown(key) not in NOT_SEEN
        and not looks_like_picture(spec.shape[first:], spec.dtype)
    }
    chosen: dict[str, NestedKey] = {}
    for pattern in vectors:
        whole = pattern == "state" and pattern not in names
        fitting = [name for name in names if whole or fnmatchcase(name, pattern)]
        if not fitting:
            raise ValueError(
                f"vectors: {pattern!r} fits none of {', '.join(names) or 'no'} observations of "
                "numbers"
            )
        chosen |= {name: names[name] for name in fitting}
    return [*chosen.values()]


def as_float32(env: EnvBase) -> list[Transform]:
    """Casts of float64 observations, of other floats as actions, of any type of reward."""
    observations = dict(env.observation_spec.items(True, True))
    doubles = [key for key, spec in observations.items() if spec.dtype == torch.float64]
    casts: list[Transform] = []
    for dtype, seen in ((torch.float64, doubles), (torch.float16, []), (torch.bfloat16, [])):
        taken = [key for key in env.action_keys if env.full_action_spec[key].dtype == dtype]
        if seen or taken:
            casts.append(DTypeCastTransform(dtype, torch.float32, in_keys=seen, in_keys_inv=taken))
    reward = env.full_reward_spec.get("reward", None)
    if reward is not None and reward.dtype != torch.float32:
        casts.append(DTypeCastTransform(reward.dtype, torch.float32, in_keys=["reward"]))
    return casts


def check_env(env: EnvBase) -> None:
    """Raise ValueError for an environment without action, reward or end, or a reward of many."""
    batch = env.batch_size
    for found, key in (
        (env.action_keys, "action"),
        (env.reward_keys, "reward"),
        (env.done_keys, "done"),
    ):
        if key not in found:
            raise ValueError(
                f"the environment has no {key!r}, only {', '.join(map(shown, found))}: rename it "
                "with a RenameTransform"
            )
    shape = list(env.full_reward_spec["reward"].shape[len(batch) :])
    if shape != [1]:
        raise ValueError(f"the reward must be one number [1]; the environment gives {shape}")
