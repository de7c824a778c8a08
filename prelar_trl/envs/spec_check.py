"""What a TorchRL environment gives must be what its specs declare; else it is named here.

TorchRL looks at rewards and ends alone, and at little of them: what else is odd goes on, or ends as
an error that names nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor
from torchrl.data import Categorical, Composite, MultiCategorical, MultiOneHot, OneHot, TensorSpec
from torchrl.envs import EnvBase, Transform, TransformedEnv

from prelar_trl.envs.pictures import dtype_name

__all__ = ["OutputCheck", "OwnRandomActions", "SpecCheck", "shown"]

CHOICES = (Categorical, MultiCategorical, OneHot, MultiOneHot)


class SpecCheck(TransformedEnv):
    """Looks at all that a reset and a step of an environment give, before TorchRL does.

    Numbers of another type become the spec's unless that changes whole ones, and what differs from
    the spec's shape in dimensions of size 1 alone gets it. An end that is missing is false, as
    TorchRL has it, but ``done`` is what ``terminated`` and ``truncated`` say.

    Args:
        env: an environment that is no :class:`TransformedEnv`.

    Raises (by a reset or a step):
        TypeError: what is given is no TensorDict, or an entry is no tensor.
        ValueError: an entry is missing, has another shape than its spec, or values that its spec
            cannot hold; an episode begins at its end, or is terminated or truncated, but not done.
    """

    rand_action = EnvBase.rand_action  # of the specs: TransformedEnv's is refused below transforms

    def __init__(self, env: EnvBase) -> None:
        super().__init__(env)
        self._name = type(env).__name__
        self._ends = _leaves(env.full_done_spec)
        self._after_reset = _leaves(env.full_observation_spec)
        self._after_step = {**self._after_reset, **_leaves(env.full_reward_spec)}

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDictBase:
        found = self.base_env._reset(tensordict, **kwargs)
        self._check(found, self._after_reset, f"{self._name}: reset()")
        if "done" in self._ends and not self._allow_done_after_reset:
            over = found["done"]
            if tensordict is not None and "_reset" in tensordict.keys():
                over = over & tensordict["_reset"].reshape(over.shape)
            if over.any():
                raise ValueError(f"{self._name}: reset() gives an episode that is done")
        return found

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        found = self.base_env._step(tensordict)
        self._check(found, self._after_step, f"{self._name}: step()")
        return found

    def _check(self, found: Any, specs: dict[NestedKey, TensorSpec], who: str) -> None:
        if not isinstance(found, TensorDictBase):
            raise TypeError(f"{who} gives {_kind(found)}; it must give a TensorDict")
        batch, given = self.base_env.batch_size, found.batch_size
        ahead = len(given) - len(batch)  # more of an environment whose batch is not locked
        if ahead < 0 or given[ahead:] != batch or (ahead and self.batch_locked):
            raise ValueError(f"{who} gives a batch {list(given)}; it must be {list(batch)}")
        ends = {key: spec for key, spec in self._ends.items() if key in found.keys(True, True)}
        _check_given(found, {**specs, **ends}, given[:ahead], who)
        if "truncated" in ends and not {"done", "terminated"} & ends.keys():
            # TorchRL tells done by both.
            found["terminated"] = torch.zeros_like(found["truncated"])
        try:
            self.base_env._complete_done(self.base_env.full_done_spec, found)
        except RuntimeError as error:  # done and truncated alone do not say what is terminated
            raise ValueError(f"{who}: {error}") from error
        for end in ("terminated", "truncated"):
            if end in ends and (found[end] & ~found["done"]).any():
                raise ValueError(f"{who} gives {end}=True, but done=False")


class OwnRandomActions(SpecCheck):
    """Of an environment that draws its random actions in a way of its own."""

    rand_action = TransformedEnv.rand_action


class OutputCheck(Transform):
    """Looks at what the transforms of a user's own :class:`TransformedEnv` make, as `SpecCheck`.

    Args:
        env: the environment with these transforms.
    """

    def __init__(self, env: TransformedEnv) -> None:
        super().__init__()
        base: EnvBase = env
        while isinstance(base, TransformedEnv):
            base = base.base_env
        self._name = f"{type(base).__name__} with its transforms"
        self._batch_dims = len(env.batch_size)
        self._after_reset = {**_leaves(env.full_observation_spec), **_leaves(env.full_done_spec)}
        self._after_step = {**self._after_reset, **_leaves(env.full_reward_spec)}

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        return self._checked(next_tensordict, self._after_step, "step()")

    def _reset(
        self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase
    ) -> TensorDictBase:
        return self._checked(tensordict_reset, self._after_reset, "reset()")

    def _checked(
        self, found: TensorDictBase, specs: dict[NestedKey, TensorSpec], what: str
    ) -> TensorDictBase:
        ahead = found.batch_size[: found.ndim - self._batch_dims]
        _check_given(found, specs, ahead, f"{self._name}: {what}")
        return found


def shown(key: NestedKey) -> str:
    """A key as a person writes it: ``camera/left``."""
    return key if isinstance(key, str) else "/".join(map(str, key))


def _leaves(specs: Composite) -> dict[NestedKey, TensorSpec]:
    """The specs of numbers, by their keys."""
    return {
        key: spec
        for key, spec in specs.items(True, True)
        if spec.dtype is not None and min(spec.shape, default=0) >= 0  # -1: any size
    }


def _check_given(
    found: TensorDictBase, specs: dict[NestedKey, TensorSpec], ahead: torch.Size, who: str
) -> None:
    """Raise where an entry is not what its spec declares, behind the dimensions ``ahead``."""
    for key, spec in specs.items():
        value, dtype, shape = found.get(key, None), spec.dtype, ahead + spec.shape
        if not isinstance(value, Tensor) or value.dtype != dtype or value.shape != shape:
            if value is None and key not in found.keys(True, True):
                raise ValueError(f"{who} gives no {shown(key)!r}, which its specs declare")
            value = _converted(value, dtype, shape, f"{who} gives {shown(key)}")
            found.set(key, value)
        chosen = isinstance(spec, CHOICES) and dtype != torch.bool and not ahead
        if chosen and not spec.is_in(value):
            raise ValueError(f"{who} gives {shown(key)} with values that its spec does not allow")


def _converted(value: Any, dtype: torch.dtype, shape: torch.Size, what: str) -> Tensor:
    """The value with the type and shape of its spec."""
    if not isinstance(value, Tensor):
        kept = getattr(value, "data", value)  # of what a TensorDict holds beside tensors
        raise TypeError(f"{what}, {_kind(kept)}; it must be a tensor")
    if [n for n in value.shape if n != 1] != [n for n in shape if n != 1]:
        given = f"{dtype_name(value.dtype)} {list(value.shape)}"
        asked = f"{dtype_name(dtype)} {list(shape)}"
        raise ValueError(f"{what}, {given}; its spec is {asked}")
    if value.is_complex() > dtype.is_complex:
        raise ValueError(f"{what}, {dtype_name(value.dtype)}; its spec is {dtype_name(dtype)}")
    cast = value.to(dtype)
    if not dtype.is_floating_point and not (cast == value).all():
        raise ValueError(f"{what} with values that {dtype_name(dtype)} cannot hold")
    return cast.reshape(shape)


def _kind(value: Any) -> str:
    return "None" if value is None else type(value).__name__
