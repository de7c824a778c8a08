"""The transforms that make every environment give the same TensorDict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from tensordict import NestedKey, TensorDictBase
from torchrl.data import Binary, Bounded, Composite, TensorSpec, Unbounded
from torchrl.envs import Transform, TransformedEnv
from torchrl.envs.batched_envs import BatchedEnvBase
from torchrl.envs.gym_like import BaseInfoDictReader
from torchrl.envs.utils import step_mdp

from prelar_trl.envs.pictures import PictureConverter


class ActionRepeat(Transform):
    """Apply each action ``repeat`` times: rewards are summed, success is any, an end ends it.

    Must come first, right after the environment, so that nothing else runs in between.
    """

    def __init__(self, repeat: int) -> None:
        super().__init__()
        if repeat < 1:
            raise ValueError(f"action_repeat must be at least 1, got {repeat}")
        self.repeat = repeat

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        env = cast(TransformedEnv, self.parent).base_env
        for _ in range(self.repeat - 1):
            over = _any_of(next_tensordict, env.done_keys)  # [*batch]
            if "_step" in tensordict.keys():  # only some of the environments make this step
                over = over | ~tensordict["_step"]
            if over.all():
                break
            now = step_mdp(
                tensordict.copy().set("next", next_tensordict),
                exclude_action=False,
                action_keys=env.action_keys,
                reward_keys=env.reward_keys,
                done_keys=env.done_keys,
            )
            if isinstance(env, BatchedEnvBase):  # it can leave out those that are over
                now.set("_step", ~over)
            following = env._step(now)
            env._complete_done(env.full_done_spec, following)
            for key in env.reward_keys:
                following[key] = following[key] + next_tensordict[key]
            if "success" in following.keys():
                following["success"] = following["success"].logical_or(next_tensordict["success"])
            if over.any():  # they stay as they ended
                following = next_tensordict.where(over, following)
            tensordict, next_tensordict = now, following
        return next_tensordict


def _any_of(tensordict: TensorDictBase, keys: list[NestedKey]) -> torch.Tensor:
    """Whether any of the flags is set, bool [*batch]."""
    batch = tensordict.batch_size
    flags = [tensordict[key].reshape(*batch, -1) for key in keys if key in tensordict.keys(True)]
    return torch.cat(flags, -1).any(-1)


class Pixels(Transform):
    """Add the present picture under ``pixels``, uint8 [3, size, size].

    Args:
        picture: gives the picture, of any kind that :mod:`prelar_trl.envs.pictures` reads.
        size: height and width.
        source: what gives it, for messages.
        close: called when the environment closes.
    """

    def __init__(
        self,
        picture: Callable[[], Any],
        size: int,
        *,
        source: str = "the camera",
        close: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(out_keys=["pixels"])
        self._picture, self._close = picture, close
        self._convert = PictureConverter(size, source=source)

    def draw(self) -> torch.Tensor:
        """The present picture."""
        return self._convert(self._picture())

    def _call(self, next_tensordict: TensorDictBase) -> TensorDictBase:
        return next_tensordict.set("pixels", self.draw())

    def _reset(
        self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase
    ) -> TensorDictBase:
        return self._call(tensordict_reset)

    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        size = self._convert.size
        observation_spec["pixels"] = Bounded(0, 255, torch.Size([3, size, size]), dtype=torch.uint8)
        return observation_spec

    def close(self) -> None:
        self._close()


class ToPixels(Transform):
    """Move a picture among the observations to ``pixels``, uint8 [*batch, 3, size, size].

    Args:
        key: where the picture is.
        convert: how it becomes one.
    """

    def __init__(self, key: NestedKey, convert: PictureConverter) -> None:
        super().__init__(in_keys=[key], out_keys=["pixels"])
        self._key, self._convert = key, convert

    def _call(self, next_tensordict: TensorDictBase) -> TensorDictBase:
        pixels = self._convert(next_tensordict[self._key])
        return next_tensordict.exclude(self._key).set("pixels", pixels)

    def _reset(
        self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase
    ) -> TensorDictBase:
        return self._call(tensordict_reset)

    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        size = self._convert.size
        shape = (*observation_spec.shape, 3, size, size)
        del observation_spec[self._key]
        observation_spec["pixels"] = Bounded(0, 255, torch.Size(shape), dtype=torch.uint8)
        return observation_spec


class State(Transform):
    """Gather observations in ``state``, float32 [*batch, S].

    Args:
        keys: what is gathered, of any shape and number type.
        drop: what is left out besides, such as text.
    """

    def __init__(self, keys: list[NestedKey], drop: Sequence[NestedKey] = ()) -> None:
        super().__init__(in_keys=keys, out_keys=["state"] if keys else [])
        self._keys, self._drop = keys, list(drop)

    def _call(self, next_tensordict: TensorDictBase) -> TensorDictBase:
        batch = next_tensordict.batch_size
        parts = [next_tensordict[key].reshape(*batch, -1).float() for key in self._keys]
        next_tensordict = next_tensordict.exclude(*self._keys, *self._drop)
        return next_tensordict.set("state", torch.cat(parts, -1)) if parts else next_tensordict

    def _reset(
        self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase
    ) -> TensorDictBase:
        return self._call(tensordict_reset)

    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        batch = observation_spec.shape
        size = sum(observation_spec[key].shape[len(batch) :].numel() for key in self._keys)
        for key in (*self._keys, *self._drop):
            del observation_spec[key]
        if self._keys:
            observation_spec["state"] = Unbounded(torch.Size([*batch, size]))
        return observation_spec


class SuccessReader(BaseInfoDictReader):
    """Reads ``success``, bool [1], from gymnasium's ``info["success"]`` or ``["is_success"]``."""

    def __call__(self, info_dict: dict[str, Any], tensordict: TensorDictBase) -> TensorDictBase:
        success = info_dict.get("success", info_dict.get("is_success"))
        success = success is not None and bool(np.any(success))
        return tensordict.set("success", torch.tensor([success]))

    @property
    def info_spec(self) -> dict[str, TensorSpec]:
        return {"success": Binary(1, torch.Size([1]), dtype=torch.bool)}


class NoSuccess(Transform):
    """Add ``success`` = False, bool [*batch, 1], to an environment that does not know success."""

    def __init__(self) -> None:
        super().__init__(out_keys=["success"])

    def _call(self, next_tensordict: TensorDictBase) -> TensorDictBase:
        shape = (*next_tensordict.batch_size, 1)
        return next_tensordict.set("success", torch.zeros(shape, dtype=torch.bool))

    def _reset(
        self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase
    ) -> TensorDictBase:
        return self._call(tensordict_reset)

    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        shape = (*observation_spec.shape, 1)
        observation_spec["success"] = Binary(1, torch.Size(shape), dtype=torch.bool)
        return observation_spec
