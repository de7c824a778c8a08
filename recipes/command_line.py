"""Names of files and other text on the command line, taken as they were typed.

Hydra reads values by a grammar of its own, in which ``2024_05_01`` is a number, ``a,b`` a sweep and
``Videos (1)`` an error. What is typed for a setting that is text is quoted here before Hydra sees
it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import Field, fields
from typing import Any, cast, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import MISSING

FREE = {"free": True}  # metadata of a field: a mapping whose keys its schema does not know
MULTIRUN = ("-m", "--multirun")
HINTS = {
    "[": """put unusual names in quotes, e.g. {}='["2024_05_01", "Videos (1)"]'""",
    "{": "put ./ before numbers and a backslash before special characters, "
    "e.g. {}='{{./2024_05_01: 3, Videos\\ \\(1\\): 1}}'",
}
SWEEP_HINT = """put unusual names of a sweep in quotes, e.g. {}='"2024_05_01","Videos (1)"'"""


def as_typed(arguments: Sequence[str], schema: type, groups: Sequence[str]) -> list[str]:
    """The arguments of a recipe with quotes around text that Hydra would take for something else.

    Text are the fields of ``schema`` whose type is ``str``, ``str | None`` or ``Any``. Left to
    Hydra are ``null`` where a field may be None, a value in quotes, and in a field of type ``Any``
    lists ``[...]`` and mappings ``{...}``, unless there is a file of that name; with
    ``--multirun`` sweeps too. Keys below a field with the metadata ``FREE`` need not be known.

    Args:
        arguments: as in ``sys.argv[1:]``.
        schema: the recipe's dataclass.
        groups: keys that choose a file of the configuration.

    Raises:
        ValueError: a value that is missing, or a name in a list, mapping or sweep that Hydra would
            take for something else; it says how to write it.
    """
    multirun = any(argument in MULTIRUN for argument in arguments)
    types = get_type_hints(schema)
    text = {
        field.name: field
        for field in fields(schema)
        if types[field.name] in (str, str | None, Any) and field.name not in groups
    }
    free = {field.name for field in fields(schema) if field.metadata == FREE}
    return [_as_typed(_added(argument, free), text, types, multirun) for argument in arguments]


def as_override(value: Any) -> str:
    """A plain value in the form in which Hydra reads it from a command line.

    Raises:
        ValueError: Hydra can read no such key of a mapping.
    """
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{_key(key)}:{as_override(x)}" for key, x in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(as_override, value)) + "]"
    if not isinstance(value, str):
        return json.dumps(value)
    return value if value and _read(f"[{value},x]") == [value, "x"] else _quoted(value)


def _key(name: Any) -> str:
    """A key of a mapping, with a backslash before each special character."""
    escaped = re.sub(r"[\\()\[\]{}:=, \t]", r"\\\g<0>", str(name))
    if _read(f"{{{escaped}:1}}") != {str(name): 1}:
        raise ValueError(
            f"{name!r} cannot be a key on a command line: rename it, or make a link with another "
            "name"
        )
    return escaped


def _read(text: str) -> Any:
    """What Hydra makes of a value; None if it cannot read it."""
    try:
        return OverridesParser.create().parse_override(f"key={text}").value()
    except HydraException:
        return None


def _added(argument: str, free: set[str]) -> str:
    """With Hydra's ``++`` where it sets a key of a free mapping."""
    key, equals, _ = argument.partition("=")
    return f"++{argument}" if equals and key.partition(".")[0] in free else argument


def _as_typed(argument: str, text: dict[str, Field], types: dict[str, Any], multirun: bool) -> str:
    typed_key, equals, value = argument.partition("=")
    key = typed_key.lstrip("+")
    if argument.startswith(("-", "~")) or not equals or key not in text:
        return argument
    default = text[key].default
    if not value and default == MISSING:
        raise ValueError(f"{key}= is empty: write {key}=<value>")
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    if quoted or (value.lower() == "null" and default is None):
        return argument
    several = types[key] is Any and value[:1] in ("[", "{") and not os.path.exists(value)
    sweep = multirun and "," in value
    try:
        override = OverridesParser.create().parse_override(argument)
        parsed, sweep = override.value(), multirun and override.is_sweep_override()
    except HydraException:
        if sweep:
            raise ValueError(f"{argument} cannot be read: {SWEEP_HINT.format(key)}") from None
        if several:
            raise ValueError(f"{argument} cannot be read: {HINTS[value[0]].format(key)}") from None
        parsed = None
    if sweep:
        unchanged = () if types[key] is Any else value.split(",")  # a number becomes text again
        _check_sweep(argument, parsed, unchanged, SWEEP_HINT.format(key))
        return argument
    if several:
        _check_names(argument, cast(Iterable[Any], parsed), HINTS[value[0]].format(key))
    if several or parsed == value:
        return argument
    return f"{typed_key}={_quoted(value)}"


def _quoted(text: str) -> str:
    return QuotedString(text, Quote.single).with_quotes()


def _check_names(argument: str, names: Iterable[Any], hint: str) -> None:
    """Refuses a list, or a mapping's keys, that are not all text."""
    for name in names:
        if not isinstance(name, str):
            raise ValueError(f"{argument}: {name!r} in it is no text: {hint}")


def _check_sweep(argument: str, sweep: Any, as_typed: Collection[str], hint: str) -> None:
    """Refuses a sweep ``a,b`` over values that Hydra has changed: no text, nor ``as_typed``."""
    if not isinstance(sweep, ChoiceSweep) or not sweep.simple_form:
        return  # range(...), glob(...), choice(...)
    for each in sweep.list:
        shown = "null" if each is None else str(each)
        if not isinstance(each, str | QuotedString | list | dict) and shown not in as_typed:
            raise ValueError(f"{argument}: {shown} in it is no text: {hint}")
