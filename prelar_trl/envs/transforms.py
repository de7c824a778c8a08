"""The transforms that make every environment give the same TensorDict."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from tensordict import NestedKey, TensorDictBase
from torchrl.data import Binary, Bounded, Composite, OneHot, TensorSpec, Unbounded
from torchrl.envs import Transform, TransformedEnv
from torchrl.envs.batched_envs import BatchedEnvBase
from torchrl.envs.gym_like import BaseInfoDictReader
from torchrl.envs.utils import step_mdp

from prelar_trl.envs.pictures import PictureConverter
from prelar_trl.envs.spec_check import SpecCheck


class SameAtReset(Transform):
    """Base of transforms that treat what a reset gives as they treat what a step gives."""

    def _reset(
        self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase
    ) -> TensorDictBase:
        return self._call(tensordict_reset)


class ActionRepeat(Transform):
    """Apply each action ``repeat`` times: rewards are summed, success is any, an end ends it.

    Must come first, right after the environment, so that nothing else runs in between.
    """

    def __init__(self, repeat: int) -> None:
        super().__init__()
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
            batched = env.base_env if isinstance(env, SpecCheck) else env
            if isinstance(batched, BatchedEnvBase):  # it can leave out those that are over
                now.set("_step", ~over)
            following = env.step(now).pop("next")
            for key in env.reward_keys:
                following[key] = following[key] + next_tensordict[key]
            if "success" in following.keys():
                following["success"] = following["success"].logical_or(next_tensordict["success"])
            if over.any():  # they stay as they ended
                following = next_tensordict.where(over, following)
            tensordict, next_tensordict = now, following
        return next_tensordict


class StepCheck(Transform):
    """Refuse actions that are not what is asked for, and rewards that are no sensible number.

    Must come last: an action is looked at before anything else sees it.

    Args:
        name: of the environment, for messages.
        spec: of the actions, with the environment's batch size.

    Raises (by a step):
        TypeError, ValueError: names the action or reward, the step of the episode and the
            environment. An action is refused that is not finite, of another shape, beyond its
            bounds or not one-hot; a reward that is not finite or absurdly large.
    """

    LARGEST = 1e8  # of a reward's magnitude: what is above wrecks the model that learns it
    ROUNDING = 1e-4  # by which an action may lie beyond its bounds

    def __init__(self, name: str, spec: TensorSpec) -> None:
        super().__init__()
        self.name, self.spec = name, spec

    def _inv_call(self, tensordict: TensorDictBase) -> TensorDictBase:
        action, spec = tensordict["action"], self.spec
        if not isinstance(action, torch.Tensor) or action.is_meta:
            kind = type(action).__name__ if isinstance(action, str) else "no tensor with values"
            raise TypeError(f"action of {self.name} is {kind}; it must be a tensor")
        one_hot = isinstance(spec, OneHot)
        if not (action.is_floating_point() or (one_hot and action.dtype == torch.bool)):
            raise TypeError(f"action of {self.name} is {action.dtype}; it must be {spec.dtype}")
        if action.shape != spec.shape:
            given = f"{list(action.shape)}; it must be {list(spec.shape)}"
            raise ValueError(f"action of {self.name} is {given}")
        action = action.to(spec.dtype)
        self._refuse(tensordict, ~action.isfinite(), "NaN or infinite")
        if one_hot:
            chosen = action.eq(1).sum(-1, keepdim=True) == 1
            others = (action.eq(0) | action.eq(1)).all(-1, keepdim=True)
            self._refuse(tensordict, ~(chosen & others), "not one-hot")
        elif isinstance(spec, Bounded):
            room = self.ROUNDING * (spec.high - spec.low)
            beyond = (action < spec.low - room) | (action > spec.high + room)
            self._refuse(tensordict, beyond, "beyond its bounds")
        return tensordict.set("action", action)

    def _refuse(self, tensordict: TensorDictBase, bad: torch.Tensor, what: str) -> None:
        if bad.any():
            raise ValueError(
                f"action is {what} at step {_place(tensordict, bad, 1)} of {self.name}, which did "
                "not make it: the policy's weights or its input are broken"
            )

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        reward = next_tensordict["reward"]
        bad = ~(reward.abs() <= self.LARGEST)
        if bad.any():
            value = reward[bad][0].item()
            wrong = f"{value:g} is beyond {self.LARGEST:g}: scale the environment's rewards"
            if not math.isfinite(value):
                wrong = "is NaN or infinite: mend the environment"
            raise ValueError(
                f"the reward at step {_place(next_tensordict, bad)} of {self.name} {wrong}"
            )
        return next_tensordict


def _place(tensordict: TensorDictBase, bad: torch.Tensor, ahead: int = 0) -> str:
    """The first bad step: its number in the episode and, of several environments, which."""
    first = int(bad.reshape(*tensordict.batch_size, -1).any(-1).reshape(-1).nonzero()[0])
    number = int(tensordict["step_count"].reshape(-1)[first]) + ahead
    worker = f", worker {first}," if tensordict.batch_size else ""
    return f"{number} of an episode{worker}"


def _any_of(tensordict: TensorDictBase, keys: list[NestedKey]) -> torch.Tensor:
    """Whether any of the flags is set, bool [*batch]."""
    batch = tensordict.batch_size
    flags = [tensordict[key].reshape(*batch, -1) for key in keys if key in tensordict.keys(True)]
    return torch.cat(flags, -1).any(-1)


class Pixels(SameAtReset):
    """Add the present pictures under ``pixels``, uint8 [3 V, size, size].

    Args:
        pictures: V functions, each of which gives a picture of any kind that
            :mod:`prelar_trl.envs.pictures` reads. One that has a ``close`` is closed with the
            environment.
        size: height and width.
        source: what gives them, for messages.
    """

    def __init__(
        self, pictures: Sequence[Callable[[], Any]], size: int, *, source: str = "the camera"
    ) -> None:
        super().__init__(out_keys=["pixels"])
        self._pictures, self._size = pictures, size
        self._converters = [PictureConverter(size, source=source) for _ in pictures]

    def draw(self) -> torch.Tensor:
        """The present pictures."""
        pairs = zip(self._converters, self._pictures, strict=True)
        return torch.cat([convert(picture()) for convert, picture in pairs])

    def _call(self, next_tensordict: TensorDictBase) -> TensorDictBase:
        return next_tensordict.set("pixels", self.draw())

    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        shape = torch.Size([3 * len(self._pictures), self._size, self._size])
        observation_spec["pixels"] = Bounded(0, 255, shape, dtype=torch.uint8)
        return observation_spec

    def close(self) -> None:
        for picture in self._pictures:
            if hasattr(picture, "close"):
                picture.close()


class OwnPixels(SameAtReset):
    """Copy ``pixels`` that are as they must be: an environment may draw all into one buffer."""

    def __init__(self) -> None:
        super().__init__(in_keys=["pixels"], out_keys=["pixels"])

    def _apply_transform(self, obs: torch.Tensor) -> torch.Tensor:
        return obs.clone()


class ToPixels(SameAtReset):
    """Move V pictures among the observations to ``pixels``, uint8 [*batch, 3 V, size, size].

    Args:
        converters: where a picture is -> how it becomes one.
    """

    def __init__(self, converters: Mapping[NestedKey, PictureConverter]) -> None:
        super().__init__(in_keys=[*converters], out_keys=["pixels"])
        self._converters = converters

    def _call(self, next_tensordict: TensorDictBase) -> TensorDictBase:
        views = [convert(next_tensordict[key]) for key, convert in self._converters.items()]
        return next_tensordict.exclude(*self._converters).set("pixels", torch.cat(views, -3))

    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        size = next(iter(self._converters.values())).size
        shape = torch.Size([*observation_spec.shape, 3 * len(self._converters), size, size])
        for key in self._converters:
            del observation_spec[key]
        observation_spec["pixels"] = Bounded(0, 255, shape, dtype=torch.uint8)
        return observation_spec


class Gather(SameAtReset):
    """Put observations, one behind the other, under one key, float32 [*batch, S].

    Args:
        out: the key.
        keys: of the observations, of any shape and number type. None of them: there is no ``out``.
        drop: observations that are left out afterwards.
    """

    def __init__(self, out: str, keys: Sequence[NestedKey], drop: Sequence[NestedKey] = ()) -> None:
        super().__init__(in_keys=list(keys), out_keys=[out] if keys else [])
        self._drop = list(drop)

    def _call(self, next_tensordict: TensorDictBase) -> TensorDictBase:
        batch = next_tensordict.batch_size
        parts = [next_tensordict[key].reshape(*batch, -1).float() for key in self.in_keys]
        kept = next_tensordict.exclude(*self._drop)
        return kept.set(self.out_keys[0], torch.cat(parts, -1)) if parts else kept

    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        batch = observation_spec.shape
        size = sum(observation_spec[key].shape[len(batch) :].numel() for key in self.in_keys)
        for key in self._drop:
            del observation_spec[key]
        for key in self.out_keys:
            observation_spec[key] = Unbounded(torch.Size([*batch, size]))
        return observation_spec


class SuccessReader(BaseInfoDictReader):
    """Reads ``success``, bool [*batch, 1], from ``info["success"]`` or ``["is_success"]``.

    Args:
        batch: the batch size of gymnasium's vector environment; none of a single one.
    """

    def __init__(self, batch: Sequence[int] = ()) -> None:
        self._batch = tuple(batch)

    def __call__(self, info_dict: dict[str, Any], tensordict: TensorDictBase) -> TensorDictBase:
        success = np.zeros((*self._batch, 1), bool)
        # A vector environment may have been reset in the same step: its last info is apart.
        for info in (info_dict, info_dict.get("final_info")):
            value = info.get("success", info.get("is_success")) if isinstance(info, dict) else None
            if value is not None:
                flags = np.asarray(value).astype(bool).reshape(*self._batch, -1)
                success |= flags.any(-1, keepdims=True)
        return tensordict.set("success", torch.from_numpy(success))

    @property
    def info_spec(self) -> dict[str, TensorSpec]:
        return {"success": Binary(1, torch.Size([*self._batch, 1]), dtype=torch.bool)}


class Success(SameAtReset):
    """Make ``success`` bool [*batch, 1], of any number type and shape.

    Args:
        given: the environment declares one; else it is False throughout.

    Raises (by a reset or a step):
        ValueError: it is NaN.
    """

    def __init__(self, given: bool) -> None:
        super().__init__(out_keys=["success"])
        self.given = given

    def _call(self, next_tensordict: TensorDictBase) -> TensorDictBase:
        batch = next_tensordict.batch_size
        value = next_tensordict["success"] if self.given else torch.zeros(*batch, 1)
        if value.isnan().any():
            raise ValueError("the environment gives success=NaN, which is no flag")
        flags = value.reshape(*batch, -1) > 0
        return next_tensordict.exclude("success").set("success", flags.any(-1, keepdim=True))

    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        shape = torch.Size([*observation_spec.shape, 1])
        observation_spec["success"] = Binary(1, shape, dtype=torch.bool)
        return observation_spec
