"""What the configurations of all recipes have in common: plain values, home folders, checks."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import field, fields
from pathlib import PurePath
from typing import Any, get_args, get_type_hints

from omegaconf import MISSING

from prelar_trl.bounds import check_settings
from prelar_trl.config import LossSettings, ModelSettings
from prelar_trl.recipes.command_line import FREE
from prelar_trl.recipes.values import A_PATH
from prelar_trl.utils import map_paths


class Config:
    """A recipe's configuration: checked when it is made, ``model`` and ``loss`` with all keys.

    Its values are then those that YAML knows, and ``~`` in its paths is the home folder.
    """

    def __post_init__(self) -> None:
        given = {name: plain(value) for name, value in vars(self).items()}
        given = {name: value for name, value in given.items() if value != MISSING}
        check_settings(type(self), given)
        for name, settings in (("model", ModelSettings), ("loss", LossSettings)):
            if name in given:
                check_settings(settings, overrides(given[name]), prefix=f"{name}.")
                given[name] = dict.fromkeys(f.name for f in fields(settings)) | given[name]
        types = get_type_hints(type(self), include_extras=True)
        for name, value in given.items():
            if _is_path(types[name]):
                value = map_paths(os.path.expanduser, value)
            setattr(self, name, value)


def overrides(settings: dict[str, Any]) -> dict[str, Any]:
    """Those of ``model`` or ``loss`` that are set."""
    return {name: value for name, value in settings.items() if value is not None}


def free() -> Any:
    """A field with a mapping of settings that the schema does not know."""
    return field(default_factory=dict, metadata=FREE)


def plain(value: Any) -> Any:
    """What YAML gives back: lists for tuples, text for paths, Python's numbers for NumPy's."""
    if isinstance(value, Mapping):
        return {plain(key): plain(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [plain(x) for x in value]
    if isinstance(value, PurePath):
        return str(value)
    return value.item() if getattr(value, "ndim", None) == 0 else value


def _is_path(kind: Any) -> bool:
    """Whether a type is, or may be, one of paths."""
    return A_PATH in getattr(kind, "__metadata__", ()) or any(map(_is_path, get_args(kind)))
