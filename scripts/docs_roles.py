"""An extension of griffe: what docstrings have of reStructuredText becomes Markdown.

A role, such as :func:`make_env`, becomes a link where the name has a page; ``::`` before an
indented block a colon.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|mod|attr|data):`([^`]+)`")
LITERAL = re.compile(r"::(?=\n\n)")


class Roles(griffe.Extension):
    """Looks a name up from the object that names it, as Sphinx does."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            text = LITERAL.sub(":", obj.docstring.value)
            obj.docstring.value = ROLE.sub(lambda role: link(obj, role.group(1)), text)


def link(obj: griffe.Object, name: str) -> str:
    """``optional``: text, where there is nothing to lead to."""
    name = name.lstrip("~")
    scope: griffe.Object | None = obj
    while scope is not None and name.split(".")[0] not in scope.members:
        scope = scope.parent  # None above the package: the name is whole
    target = name if scope is None else f"{scope.path}.{name}"
    return f'<autoref identifier="{target}" optional><code>{name}</code></autoref>'
