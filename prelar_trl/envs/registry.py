"""The suites of environments that :func:`make_env` knows by name, and how to add one.

A suite is one function, ``make(task, *, pixels, cameras, render_quality, **kwargs)``, of
:func:`make_env`'s own arguments; ``cameras`` is a tuple, empty for the default. It returns an
environment of TorchRL or gymnasium, to which :func:`make_env` gives its form, or a base environment
with the list of transforms that give it that form.
"""

from __future__ import annotations

import pkgutil
import re
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, NamedTuple

__all__ = ["Suite", "find_suite", "import_factory", "is_import_path", "register_suite", "suites"]

ENTRY_POINTS = "prelar_trl.suites"  # group in which an installed package offers its suites


class Suite(NamedTuple):
    """A family of environments, ``<suite>/<task>``.

    Args:
        make: the function, or ``module:function``, imported when it is asked for.
        usage: how its names are written, for messages.
        max_steps: truncates its episodes where the caller sets no limit. Default: none.
    """

    make: Callable[..., Any] | str
    usage: str
    max_steps: int | None = None


# Modules that import MuJoCo take seconds and need OpenGL: by name.
SUITES: dict[str, Suite] = {
    "metaworld": Suite("prelar_trl.envs.metaworld:make_metaworld", "metaworld/<task>"),
    "gym": Suite("prelar_trl.envs.wrappers:make_gym", "gym/<id>"),
    "dm_control": Suite("prelar_trl.envs.wrappers:make_dm_control", "dm_control/<domain>/<task>"),
    "robotics": Suite("prelar_trl.envs.wrappers:make_robotics", "robotics/<id>"),
    "robodesk": Suite("prelar_trl.envs.robodesk:make_robodesk", "robodesk/<task>"),
    "toy": Suite("prelar_trl.envs.toy:make_toy", "toy", max_steps=50),
}


def register_suite(
    name: str, *, usage: str | None = None, max_steps: int | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Function decorator: makes a suite known by ``name``.

    A package that is installed can offer one without being imported first, by an entry point of
    the group ``prelar_trl.suites``, whose name is the suite's and whose value the function.

    Raises:
        ValueError: another suite has that name.
    """

    def decorate(make: Callable[..., Any]) -> Callable[..., Any]:
        if name in SUITES and _path(SUITES[name].make) != _path(make):
            raise ValueError(f"the suite {name!r} is {_path(SUITES[name].make)}: take another name")
        SUITES[name] = Suite(make, usage or f"{name}/<task>", max_steps)
        return make

    return decorate


def suites() -> dict[str, Suite]:
    """Every suite by its name, those of installed packages too."""
    offered = entry_points(group=ENTRY_POINTS)
    return {x.name: Suite(x.value, f"{x.name}/<task>") for x in offered} | SUITES


def find_suite(env: str) -> Suite:
    """The suite of an environment's name, its function imported.

    Raises:
        ValueError: there is no such suite.
    """
    known, name = suites(), env.partition("/")[0]
    if name not in known or (env in (name, f"{name}/") and "/" in known[name].usage):
        raise ValueError(
            f"unknown environment {env!r}; write {', '.join(s.usage for s in known.values())} or "
            "<module>:<callable>"
        )
    suite = known[name]
    if isinstance(suite.make, str):
        suite = suite._replace(make=pkgutil.resolve_name(suite.make))
    return suite


def is_import_path(env: str) -> bool:
    """Whether a name is ``<module>:<callable>``, such as ``my_package.envs:make_maze``."""
    return re.fullmatch(r"[\w.]+:[\w.]+", env) is not None


def import_factory(path: str) -> Callable[..., Any]:
    """What ``<module>:<callable>`` names: a function or class that makes an environment.

    Raises:
        ValueError: it cannot be imported, or cannot be called.
    """
    try:
        found = pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"env={path} cannot be imported: {error}") from error
    if not callable(found):
        raise ValueError(f"env={path} is {type(found).__name__}, not a function or class")
    return found


def _path(make: Callable[..., Any] | str) -> str:
    return make if isinstance(make, str) else f"{make.__module__}:{make.__qualname__}"
