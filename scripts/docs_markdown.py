"""An extension of griffe: what docstrings have of reStructuredText becomes Markdown.

A role, such as :func:`make_env`, becomes a link where the name has a page, and ``::`` before an
indented block a colon. What is returned is text, of which griffe would take the beginning for a
type, and so is what ``forward`` returns and raises.
"""

from __future__ import annotations

import re
from textwrap import dedent
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|mod|attr|data):`([^`]+)`")
LITERAL = re.compile(r"^::\n|(?<=:):(?=\n\n)", re.MULTILINE)
# A title, what follows it on its line, and the indented lines below.
SECTION = re.compile(
    r"^(Returns|(?:Returns|Raises) \(forward\)):(.*)((?:\n(?: {4}.*)?)*)", re.MULTILINE
)


class Markdown(griffe.Extension):
    """Rewrites every docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            text = LITERAL.sub("", obj.docstring.value)
            text = SECTION.sub(section, text)
            obj.docstring.value = ROLE.sub(lambda role: link(obj, role[1]), text)


def section(match: re.Match[str]) -> str:
    title, first, rest = match.groups()
    if first:  # a sentence that begins beside the title
        return f"**{title}:**{first}{rest}"
    if title.startswith("Raises"):  # an error a line, its further lines indented
        rest = re.sub(r"^ {4}(?=\S)", "    - ", rest, flags=re.MULTILINE)
    return f"**{title}:**\n\n{dedent(rest).strip()}\n\n"


def link(obj: griffe.Object, name: str) -> str:
    """Looks the name up from the object that names it, as Sphinx does."""
    name = name.lstrip("~")
    scope: griffe.Object | None = obj
    while scope is not None and name.split(".")[0] not in scope.members:
        scope = scope.parent  # None above the package: the name is whole
    target = name if scope is None else f"{scope.path}.{name}"
    # optional: only text, where there is nothing to lead to
    return f'<autoref identifier="{target}" optional><code>{name}</code></autoref>'
