"""Bounds of settings, written into the type of a field: ``depth: PositiveInt = 48``."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from pathlib import PurePath
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

from prelar_trl.utils import listed

__all__ = [
    "Finite",
    "Fraction",
    "MediumInt",
    "NonNegative",
    "NonNegativeInt",
    "NonNegativeMediumInt",
    "NonNegativeSmallInt",
    "PictureSize",
    "Positive",
    "PositiveInt",
    "Rule",
    "Seed",
    "SmallInt",
    "above",
    "at_least",
    "at_most",
    "between",
    "check_settings",
    "one_of",
]


class Rule(NamedTuple):
    """What an annotated type asks of a value: ``Annotated[int, Rule(...)]``."""

    holds: Callable[[Any], bool]
    text: str  # goes on after "name=value"


def at_least(low: float) -> Rule:
    """Numbers from ``low`` on."""
    return Rule(lambda x: x >= low, f"must be at least {low}")


def at_most(high: float) -> Rule:
    """Numbers up to ``high``."""
    return Rule(lambda x: x <= high, f"must be at most {high}")


def above(low: float) -> Rule:
    """Numbers above ``low``."""
    return Rule(lambda x: x > low, f"must be above {low}")


def between(low: float, high: float) -> Rule:
    """Numbers in [``low``, ``high``]."""
    return Rule(lambda x: low <= x <= high, f"must lie between {low} and {high}")


def one_of(choices: Iterable[str]) -> Rule:
    """One of a few words."""
    return Rule(lambda x: x in choices, f"is unknown; choose {listed(choices)}")


LARGEST = 10**12  # of any number; more would overflow, or never end
PositiveInt = Annotated[int, at_least(1), at_most(LARGEST)]
NonNegativeInt = Annotated[int, at_least(0), at_most(LARGEST)]
SmallInt = Annotated[int, at_least(1), at_most(1024)]  # layers, threads, processes
NonNegativeSmallInt = Annotated[int, at_least(0), at_most(1024)]
MediumInt = Annotated[int, at_least(1), at_most(2**16)]  # widths, batches
NonNegativeMediumInt = Annotated[int, at_least(0), at_most(2**16)]
Seed = Annotated[int, at_least(0), at_most(2**31 - 1)]  # NumPy's end at 2**32, counts are added
Positive = Annotated[float, above(0), at_most(LARGEST)]
NonNegative = Annotated[float, at_least(0), at_most(LARGEST)]
Finite = Annotated[float, Rule(lambda x: abs(x) <= LARGEST, f"must be finite, up to {LARGEST}")]
Fraction = Annotated[float, between(0, 1)]
PictureSize = Annotated[
    int, Rule(lambda x: x in (64, 84, 96, 128), "is unknown; choose 64, 84, 96 or 128")
]

# Types of values: the classes that have such values, and words.
KINDS: dict[Any, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false"),
    int: ((Integral,), "a whole number"),
    float: ((Real,), "a number"),
    str: ((str, PurePath), "text"),
    list: ((list, tuple), "a list"),
    tuple: ((list, tuple), "a list"),
    dict: ((Mapping,), "a mapping, {name: value}"),
    Mapping: ((Mapping,), "a mapping, {name: value}"),
}


def check_settings(settings: type, values: Mapping[str, Any], prefix: str = "") -> None:
    """Check values by the types of the fields of a dataclass.

    Args:
        settings: the dataclass. Its fields have the types of :data:`KINDS`, ``Literal``,
            ``X | None``, ``Any``, or ``Annotated`` with :class:`Rule` objects.
        values: by the name of the field; not all need be there.
        prefix: goes before the name in the error, e.g. ``model.``. Default: nothing.

    Raises:
        ValueError: a name that is no field, or a value that its type does not allow; in one line.
    """
    hints = _hints(settings)
    for name, value in values.items():
        if name not in hints:
            raise ValueError(f"unknown setting {f'{prefix}{name}'!r}; choose {listed(hints)}")
        fault = _fault(hints[name], value)
        if fault:
            raise ValueError(f"{prefix}{name}={value!r} {fault}")


@functools.cache
def _hints(settings: type) -> dict[str, Any]:
    return get_type_hints(settings, include_extras=True)


def _fault(hint: Any, value: Any) -> str | None:
    """What is wrong with a value of that type; None if nothing is."""
    origin, parts = get_origin(hint) or hint, get_args(hint)
    if origin is Any:
        return None
    if origin is Annotated:
        broken = (rule.text for rule in hint.__metadata__ if not rule.holds(value))
        return _fault(hint.__origin__, value) or next(broken, None)
    if origin in (Union, UnionType):
        faults = [_fault(x, value) for x in parts if x is not NoneType]
        return None if value is None or None in faults else faults[0]
    if origin is Literal:
        return None if value in parts else f"is unknown; choose {listed(parts)}"
    classes, words = KINDS[origin]
    flag = isinstance(value, bool) and origin is not bool  # bool is a subclass of int
    if flag or not isinstance(value, classes):
        choices = get_args(parts[0]) if parts and get_origin(parts[0]) is Literal else ()
        return f"must be {words}{f' of {listed(choices)}' if choices else ''}"
    if origin is float and abs(cast(float, value)) == math.inf:
        return "must be finite"
    if not parts:
        return None
    if isinstance(value, Mapping):
        faults = ((f"{key}={x!r}", _fault(parts[1], x)) for key, x in value.items())
    else:
        faults = ((repr(x), _fault(parts[0], x)) for x in cast(Iterable[Any], value))
    return next((f"has {name}, which {fault}" for name, fault in faults if fault), None)
