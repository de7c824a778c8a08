"""Values that change over the updates, written as text: ``linear(1e-2, 1e-4, 20000)``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, cast

__all__ = ["Schedule", "is_schedule"]

Kind = Literal["constant", "linear", "exponential"]
FORMS = "a number, linear(start,end,updates) or exponential(start,end,half-life)"


@dataclass(frozen=True)
class Schedule:
    """A value by the number of updates before.

    ``linear`` goes from ``start`` to ``end`` in ``duration`` updates and stays there;
    ``exponential`` halves the distance to ``end`` every ``duration`` updates.
    """

    start: float
    end: float
    duration: float
    kind: Kind = "constant"

    @classmethod
    def parse(cls, value: float | str) -> Schedule:
        """From a number, or text as in :data:`FORMS`.

        Raises:
            ValueError: it is none of them, or a duration is not positive.
        """
        number = _number(value)
        if number is not None:
            return cls(number, number, 1.0)
        kind, _, rest = str(value).strip().partition("(")
        numbers = [x for x in map(_number, rest.removesuffix(")").split(",")) if x is not None]
        good = kind in ("linear", "exponential") and rest.endswith(")") and rest.count(",") == 2
        if not good or len(numbers) != 3 or numbers[2] <= 0:
            raise ValueError(f"{value!r} is no schedule: write {FORMS}")
        return cls(*numbers, kind=cast(Kind, kind))

    @property
    def is_constant(self) -> bool:
        return self.kind == "constant"

    def __call__(self, updates: int) -> float:
        """The value after that many updates."""
        if self.kind == "exponential":
            share = 0.5 ** (updates / self.duration)
        else:
            share = max(0.0, 1 - updates / self.duration)
        return self.end + share * (self.start - self.end)


def is_schedule(value: Any, high: float = math.inf) -> bool:
    """Whether :meth:`Schedule.parse` takes the value, and it stays within 0 and ``high``."""
    try:
        schedule = Schedule.parse(value)
    except ValueError:
        return False
    return 0 <= min(schedule.start, schedule.end) <= max(schedule.start, schedule.end) <= high


def _number(value: Any) -> float | None:
    """A finite number, or text of one, as a float; None for anything else."""
    if not isinstance(value, Real | str) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
