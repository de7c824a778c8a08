"""What the fuzzing tests share: budgets, odd values, and what an error must look like."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

ALLOWED = (ValueError, TypeError, KeyError, OSError)
LARGEST = 1e12  # of any number of an accepted configuration


SLOW = int(os.environ.get("FUZZ", 25))  # with -m slow: so many times as many examples


def fuzz(examples: int) -> Callable[[Callable], list[Any]]:
    """Budgets of a test: always the same ``examples``; with ``-m slow`` :data:`SLOW` times more."""

    def profile(count: int) -> settings:
        return settings(
            max_examples=count,
            derandomize=True,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink],  # explaining takes long
        )

    return pytest.mark.parametrize(
        "budget",
        [
            pytest.param(profile(examples), id="short"),
            pytest.param(profile(SLOW * examples), id="long", marks=pytest.mark.slow),
        ],
    )


def run(budget: settings, test: Callable) -> None:
    """Run a test made by ``hypothesis.given`` with a budget of :func:`fuzz`."""
    budget(test)()


NUMBERS = st.sampled_from(
    [0, -1, 1, 2, 3, 8, 0.5, 1.0, -0.0, 2.5, 1e-300, 1e30, -1e30, 10**9, 10**20, 2**63, -(2**63)]
    + [math.nan, math.inf, -math.inf]
)
WORDS = st.sampled_from(
    ["", " ", "a", "nan", "-inf", "null", "a,b", "a,", ",", "a\nb", "\0", "1e400", "cpu", "cuda:"]
    + ["cuda:-1", "cuda:99999999999999999999", "cuda:٣", "csv", "32", "toy", "é", "[", "{x", "x:y"]
    + ["linear(1,2,3)", "linear(nan,1,1)", "linear(1,inf,1)", "linear(1,1,0)", "linear(1,,1)"]
    + ["exponential(1,0,nan)", "linear(-1,1,1)", "linear(1,2,3", "os:system", "gaussian"]
)
LEAVES = NUMBERS | WORDS | st.none() | st.booleans()
ODD = LEAVES | st.recursive(
    LEAVES,
    lambda x: st.lists(x, max_size=3) | st.dictionaries(WORDS | NUMBERS, x, max_size=3),
    max_leaves=4,
)


def check_numbers(value: Any, name: str = "") -> None:
    """No number within it is NaN, infinite, or larger than :data:`LARGEST`."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            check_numbers(item, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for item in value:
            check_numbers(item, name)
    elif isinstance(value, int | float):
        assert math.isfinite(value) and abs(value) <= LARGEST, f"{name}={value} was accepted"


OBSCURE = ("out of range", "size of tensor", "not enough values", "too many values", "NoneType")


def answer(call: Callable[[], Any], names: Sequence[Any] = ()) -> Any:
    """What a call gives; None where it says clearly what is wrong, by one of these names."""
    try:
        return call()
    except (TypeError, ValueError, KeyError) as error:
        text = str(error)
        assert text and "\n" not in text, repr(error)
        assert not any(part in text for part in OBSCURE), repr(error)
        named = [name if isinstance(name, str) else name[-1] for name in names]
        assert not named or any(name in text for name in named), repr(error)
    return None
