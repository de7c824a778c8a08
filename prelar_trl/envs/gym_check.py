"""What a gymnasium environment gives must be what it has declared; else it is named here."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

__all__ = ["GymCheck"]

CHOICES = (spaces.Discrete, spaces.MultiDiscrete)
ARRAYS = (spaces.Box, spaces.MultiBinary, spaces.MultiDiscrete)


class GymCheck(gymnasium.Wrapper):
    """Looks at all that a reset and a step give.

    Args:
        env: the environment.
        name: of it, for messages.

    Raises:
        ValueError: choices among the observations that are not counted from 0.

    Raises (by a reset or a step):
        TypeError: not the five things, a reward that is no number, an end or success that is no
            flag.
        ValueError: an observation of another shape than its space, or with values that the type of
            its space cannot hold.
    """

    def __init__(self, env: gymnasium.Env, name: str) -> None:
        super().__init__(env)
        self._name = name
        self._check_starts(self.observation_space)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        found = self.env.reset(seed=seed, options=options)
        if not isinstance(found, tuple) or len(found) != 2 or not isinstance(found[1], dict):
            # Not a TypeError, after which TorchRL tries gym's old way to seed.
            raise ValueError(f"{self._name}: reset() must give (observation, info)")
        self._check(found[0], self.observation_space, "reset() gives an observation")
        return found

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        found = self.env.step(action)
        if not isinstance(found, tuple) or len(found) != 5 or not isinstance(found[4], dict):
            raise TypeError(
                f"{self._name}: step() must give (observation, reward, terminated, truncated, info)"
            )
        observation, reward, terminated, truncated, info = found
        self._check(observation, self.observation_space, "step() gives an observation")
        number = self._one(reward, "reward", "buif")
        flags = [
            bool(self._one(flag, name, "bui"))
            for name, flag in (("terminated", terminated), ("truncated", truncated))
        ]
        for key in ("success", "is_success"):
            if info.get(key) is None:  # it does not know
                continue
            value = _as_array(info[key])
            if value.dtype.kind not in "buif" or (value != value).any():
                raise TypeError(
                    f"{self._name}: info has {key}={_short(info[key])}, which is no flag"
                )
        return observation, float(number), flags[0], flags[1], info

    def _one(self, value: Any, name: str, kinds: str) -> Any:
        """The one number, or flag, that it is."""
        array = _as_array(value)
        if array.size != 1 or array.dtype.kind not in kinds:
            asked = "one number" if "f" in kinds else "a flag"
            raise TypeError(
                f"{self._name}: step() gives {name}={_short(value)}; it must be {asked}"
            )
        return array.item()

    def _check_starts(self, space: gymnasium.Space) -> None:
        """TorchRL counts choices from 0."""
        for part in space.values() if isinstance(space, spaces.Dict) else ():
            self._check_starts(part)
        if isinstance(space, CHOICES) and np.any(space.start):
            raise ValueError(
                f"{self._name} observes {space}, which does not count from 0: shift it in a wrapper"
            )

    def _check(self, value: Any, space: gymnasium.Space, what: str) -> None:
        if isinstance(space, spaces.Dict):
            for key, part in space.items():
                if not isinstance(value, dict) or key not in value:
                    raise ValueError(f"{self._name}: {what} without {key!r}")
                self._check(value[key], part, f"{what} {key!r}")
        elif isinstance(space, spaces.Discrete):
            array = _as_array(value)
            known = array.size == 1 and array.dtype.kind in "bui"
            if not known or not 0 <= array.item() < space.n:
                raise ValueError(f"{self._name}: {what}, {_short(value)}; its space is {space}")
        elif isinstance(space, ARRAYS):
            array, dtype = _as_array(value), np.dtype(space.dtype)
            if array.dtype.kind not in "buif" or array.shape != space.shape:
                given = "None" if value is None else type(value).__name__
                if array.dtype.kind in "buif":
                    given = f"{array.dtype} {list(array.shape)}"
                asked = f"{dtype} {list(space.shape)}"
                raise ValueError(f"{self._name}: {what}, {given}; its space is {asked}")
            if isinstance(space, spaces.MultiDiscrete | spaces.MultiBinary):
                most = space.nvec if isinstance(space, spaces.MultiDiscrete) else 2
                if not ((array >= 0) & (array < most)).all():
                    raise ValueError(f"{self._name}: {what}, {_short(value)}, not of {space}")
            if array.dtype != dtype and dtype.kind in "bui":
                with np.errstate(invalid="ignore"):
                    kept = (array.astype(dtype) == array).all()
                if not kept:
                    raise ValueError(f"{self._name}: {what} with values that {dtype} cannot hold")


def _short(value: Any) -> str:
    """As a message shows it, in one line."""
    return " ".join(repr(value).split())[:60]


def _as_array(value: Any) -> np.ndarray:
    """An array of objects for what is none of numbers, such as lists of unlike lengths."""
    try:
        return np.asarray(value)
    except (ValueError, TypeError):
        return np.asarray(None)
