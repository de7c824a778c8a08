"""The door for environments that others made: what they give is found, turned or named here."""

from __future__ import annotations

import torch
from tensordict import NestedKey
from torchrl.data import Bounded
from torchrl.envs import (
    Compose,
    DoubleToFloat,
    DTypeCastTransform,
    EnvBase,
    Transform,
    TransformedEnv,
)
from torchrl.envs.gym_like import GymLikeEnv

from prelar_trl.envs.pictures import (
    PictureConverter,
    check_picture,
    dtype_name,
    looks_like_picture,
    white_of,
)
from prelar_trl.envs.transforms import NoSuccess, SuccessReader, ToPixels


def wrap_env(
    env: EnvBase, *, pixels: int | None, camera: str | None
) -> tuple[EnvBase, list[Transform]]:
    """A TorchRL environment, taken apart, with the transforms that add what it lacks."""
    transforms: list[Transform] = []
    given = {*env.observation_spec.keys(True, True)}
    if pixels is not None:
        transforms += pixels_transform(env, pixels, camera)
    base = env
    if isinstance(env, TransformedEnv):  # taken apart, so that the action repeat comes first
        own = env.transform if isinstance(env.transform, Compose) else [env.transform]
        base, transforms = env.base_env, [*(each.clone() for each in own), *transforms]
    if "success" not in given:
        if isinstance(base, GymLikeEnv) and not base.batch_size:
            base.set_info_dict_reader(SuccessReader())
        else:
            transforms.append(NoSuccess())
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


def pixels_transform(env: EnvBase, size: int, camera: str | None) -> list[Transform]:
    """What turns the picture among the observations into ``pixels``; nothing where it is that.

    Raises:
        ValueError: there is no picture, more than one and none is chosen, or it cannot be used.
    """
    names = {shown(key): key for key in find_pictures(env)}
    if not names:
        given = ", ".join(map(shown, env.observation_spec.keys(True, True))) or "nothing"
        raise ValueError(f"the environment gives no 'pixels', only {given}")
    if camera is not None and camera not in names:
        raise ValueError(f"unknown camera {camera!r}; this environment has {', '.join(names)}")
    if camera is None and len(names) > 1:
        raise ValueError(
            f"the environment gives {len(names)} pictures, choose by camera=: {', '.join(names)}"
        )
    name = camera or next(iter(names))
    spec, batch = env.observation_spec[names[name]], env.batch_size
    if name == "pixels" and spec.dtype == torch.uint8 and spec.shape == (*batch, 3, size, size):
        return []
    check_picture(name, spec.shape[len(batch) :], spec.dtype)
    white = white_of(spec.high) if isinstance(spec, Bounded) else None
    convert = PictureConverter(size, white=white, batch_dims=len(batch), source=name)
    return [ToPixels(names[name], convert)]


def as_float32(env: EnvBase) -> list[Transform]:
    """Casts of float64 observations and actions, and of the reward from any type."""
    observations = env.observation_spec.items(True, True)
    doubles = [key for key, spec in observations if spec.dtype == torch.float64]
    actions = [key for key in env.action_keys if env.full_action_spec[key].dtype == torch.float64]
    casts: list[Transform] = []
    if doubles or actions:
        casts.append(DoubleToFloat(in_keys=doubles, in_keys_inv=actions))
    reward = env.full_reward_spec.get("reward", None)
    if reward is not None and reward.dtype != torch.float32:
        casts.append(DTypeCastTransform(reward.dtype, torch.float32, in_keys=["reward"]))
    return casts


def check_env(env: EnvBase) -> None:
    """Raise ValueError for an environment whose actions, reward or end cannot be used."""
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
    spec = env.full_action_spec["action"]
    shape = list(spec.shape[len(batch) :])
    given = f"{type(spec).__name__} {dtype_name(spec.dtype)} {shape}"
    if not isinstance(spec, Bounded) or not spec.dtype.is_floating_point:
        kind = "unbounded" if spec.dtype.is_floating_point else "discrete"
        raise ValueError(
            f"the environment's actions are {kind} ({given}): only continuous ones work, floats "
            "[A] with a lower and an upper bound"
        )
    if len(env.action_keys) > 1 or len(shape) != 1:
        keys = ", ".join(map(shown, env.action_keys))
        raise ValueError(f"actions must be one vector [A]; the environment takes {keys}: {given}")
    if not (spec.low.isfinite() & spec.high.isfinite()).all():
        raise ValueError(f"the environment's actions have no bounds ({given}): they must be finite")
    shape = list(env.full_reward_spec["reward"].shape[len(batch) :])
    if shape != [1]:
        raise ValueError(f"the reward must be one number [1]; the environment gives {shape}")


def shown(key: NestedKey) -> str:
    """A key as a person writes it: ``camera/left``."""
    return key if isinstance(key, str) else "/".join(map(str, key))
