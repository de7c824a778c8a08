"""The order of numbered files: frames by counters, by times, by time stamps."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal
from pathlib import PurePath
from typing import NamedTuple

from prelar_trl.data.sources.base import ClipError

_INTEGER = r"\d+"
_DECIMAL = r"\d+(?:\.\d+)?(?:[eE][+-]\d+)?"
_MINUS = r"(?:(?<![^\s_(\[=,+])-)?"  # a sign, not a hyphen: nothing or a separator before it


class _Name(NamedTuple):
    numbers: tuple[Decimal, ...]
    prefix: str  # the text before the first number
    name: str


def in_time_order(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names of one series in the order of their numbers: 2 before 10, 0.05 before 0.1, -6 before 5.

    Returns:
        The series, and the names that do not belong to it: those without a number, or alone with
        the text before it. Names without any series are all kept, in natural order.

    Raises:
        ClipError: there are two series, or two names for one time.
    """
    parsed = _parsed(names)
    counts = Counter(each.prefix for each in parsed if each.numbers)
    if any(prefix + "-" in counts for prefix in counts):  # t-1, t0, t1
        parsed = _parsed(names, minus="-?")
        counts = Counter(each.prefix for each in parsed if each.numbers)
    series = [prefix for prefix, count in counts.items() if count > 1]
    if len(series) > 1:
        raise _several(*(next(p.name for p in parsed if p.prefix == x) for x in series[:2]))
    chosen = [each for each in parsed if each.numbers and each.prefix in series]
    if 2 * len(chosen) <= len(names):
        return sorted(names, key=_natural), []
    chosen.sort()
    for one, other in zip(chosen[:-1], chosen[1:], strict=True):
        if one.numbers == other.numbers:
            raise _several(one.name, other.name)
    _refuse_grid(chosen)
    kept = [each.name for each in chosen]
    return kept, sorted(set(names) - set(kept), key=_natural)


def _parsed(names: Sequence[str], minus: str = _MINUS) -> list[_Name]:
    stems = [PurePath(name).stem for name in names]
    number = _DECIMAL if _are_decimals(stems) else _INTEGER
    pattern = re.compile(minus + number)
    parsed = []
    for name, stem in zip(names, stems, strict=True):
        found = list(pattern.finditer(stem))
        numbers = tuple(Decimal(match.group()) for match in found)
        parsed.append(_Name(numbers, stem[: found[0].start()] if found else stem, name))
    return parsed


def _are_decimals(stems: Sequence[str]) -> bool:
    """Whether 1.9 and 1.10 are decimals, not two numbers: those are printed without the last 0."""
    fractions = [f for stem in stems for f in re.findall(r"\d\.(\d+)", stem)]
    same_length = len(set(map(len, fractions))) < 2
    return same_length or not any(f.endswith("0") and f != "0" for f in fractions)


def _refuse_grid(names: Sequence[_Name]) -> None:
    """Refuses names such as 0001_cam0, 0001_cam1, 0002_cam0, ...: every pair of two numbers.

    Not if the second number runs like a clock's, through 24, 60, 100, 1000, ... .
    """
    columns = [set(c) for c in zip(*(each.numbers for each in names), strict=False)]
    varying = [sorted(column) for column in columns if len(column) > 1]
    counts = {len(each.numbers) for each in names}
    if len(varying) != 2 or len(varying[0]) * len(varying[1]) != len(names) or len(counts) > 1:
        return
    low = varying[1]
    wraps_at = (low[1] - low[0]) * len(low)
    clock = low[0] == 0 and wraps_at in (24, 60, *(10**n for n in range(2, 10)))
    if not clock or low[-1] != wraps_at - low[1]:
        raise _several(names[0].name, names[1].name)


def _several(first: str, second: str) -> ClipError:
    return ClipError(
        f"more than one series of pictures, e.g. {first!a} and {second!a}: give each its own folder"
    )


def _natural(name: str) -> list[tuple[int, int, str]]:
    parts = re.split(r"(\d+)", name)
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in parts if p] + [(2, 0, name)]
