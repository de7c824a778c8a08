"""What the settings of the recipes may be: named types with their bounds."""

from __future__ import annotations

import re
from collections.abc import Mapping
from numbers import Real
from pathlib import PurePath
from typing import TYPE_CHECKING, Annotated, Any, get_args

from prelar_trl.bounds import LARGEST, Rule, at_least, at_most, one_of
from prelar_trl.config import METHODS, PRETRAINED_PARTS, SIZES
from prelar_trl.schedules import FORMS, is_schedule
from prelar_trl.types import Backend, RenderQuality


def as_names(value: Any) -> list[str] | None:
    """A list of names, which may be written ``a,b``; None stays None."""
    return value.split(",") if isinstance(value, str) else value


def are_names(value: Any) -> bool:
    """Whether it is None, or names: different, none empty."""
    names = as_names(value)
    if names is None:
        return True
    good = isinstance(names, list | tuple) and all(isinstance(x, str) and x for x in names)
    return good and 0 < len(names) == len(set(names))


def are_texts(value: Any) -> bool:
    """Whether it is text, or a list of texts; none empty."""
    texts = value if isinstance(value, list | tuple) and value else [value]
    return all(isinstance(text, str | PurePath) and str(text) for text in texts)


def are_stores(value: Any) -> bool:
    """Whether it is a folder, a list of them, or a mapping of folders to weights."""
    if not isinstance(value, Mapping):
        return are_texts(value)
    good = (isinstance(x, Real) and not isinstance(x, bool) for x in value.values())
    return all(good) and are_texts(list(value)) and all(0 < x <= LARGEST for x in value.values())


def are_loggers(value: Any) -> bool:
    """Whether it is the name of a logger, or a list of them."""
    names = [value] if isinstance(value, str) else value
    return isinstance(names, list | tuple) and all(name in get_args(Backend) for name in names)


# Also marks a setting as a path, in which ``~`` is the home folder, see base_config.py.
A_PATH = Rule(lambda place: place != "", "must be the name of a file or folder")
Place = Annotated[str, A_PATH]

# One of a few words: text to Hydra, which knows no ``Literal``; to a type checker it fits anywhere.
if TYPE_CHECKING:
    from typing import Any as Choice
else:
    Choice = str

Collector = Annotated[Choice, one_of(("sync", "async"))]
Compile = Annotated[Choice, one_of(("auto", "on", "off"))]
Device = Annotated[
    str,
    Rule(
        lambda name: re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,2})?", name) is not None,
        "is unknown; choose auto, cpu, cuda or cuda:<n>",
    ),
]
Export = Annotated[Choice, one_of(("npz", "jpeg"))]
Gradient = Annotated[Choice, one_of(("dynamics", "reinforce", "both"))]
SOURCES = ("videos", "something", "frames", "episodes", "lerobot", "torchrl")
Kind = Annotated[Choice, one_of(("auto", *SOURCES))]
Loggers = Annotated[
    Any, Rule(are_loggers, f"is unknown; choose {', '.join(get_args(Backend))}, or a list of them")
]
Names = Annotated[Any, Rule(are_names, "must be a list of names")]
Parts = Annotated[
    Any,
    Rule(
        lambda x: are_names(x) and all(part in PRETRAINED_PARTS for part in as_names(x) or ()),
        f"is unknown; choose of {', '.join(PRETRAINED_PARTS)}",
    ),
]
Scheduled = Annotated[Any, Rule(lambda x: is_schedule(x, LARGEST), f"must be at least 0: {FORMS}")]
ScheduledFraction = Annotated[
    Any, Rule(lambda x: is_schedule(x, 1.0), f"must lie between 0 and 1: {FORMS}")
]
STORES = "must be a folder, a list of them, or {folder: weight above 0}"
Stores = Annotated[Any, A_PATH, Rule(are_stores, STORES)]
OwnOrStores = Annotated[Any, A_PATH, Rule(lambda x: x is None or are_stores(x), STORES)]
Lists = Annotated[
    Any,
    A_PATH,
    Rule(
        lambda x: x is None or (isinstance(x, Mapping) and are_texts([*x, *x.values()])),
        "must be {train: <file>, heldout: <file>}",
    ),
]
Labels = Annotated[
    list[Any] | None,
    Rule(
        lambda x: x is None or all(type(label) in (int, str) and label != "" for label in x),
        "must be a list of numbers and templates",
    ),
]
TEXTS = Rule(are_texts, "must be text, or a list of at least one")
Texts = Annotated[Any, TEXTS]
Places = Annotated[Any, A_PATH, TEXTS]
Method = Annotated[Choice, one_of(METHODS)]
Pixels = Annotated[int, at_least(8), at_most(4096)]
Precision = Annotated[Choice, one_of(("32", "bf16"))]
Quality = Annotated[Choice, one_of(get_args(RenderQuality))]
Resize = Annotated[Choice, one_of(("squeeze", "crop"))]
Resume = Annotated[
    bool | str, Rule(lambda x: x in (True, False, "auto"), "is unknown; choose true, false or auto")
]
Size = Annotated[Choice, one_of(SIZES)]
