"""The page of promises names tests that there are."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")


def test_every_test_that_the_page_names_exists() -> None:
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", PAGE)
    assert len(named) >= 25 and "`::" not in PAGE
    for file, test in named:
        assert f"\ndef {test}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), test


def test_every_promise_has_a_test() -> None:
    rows = [row for row in PAGE.splitlines() if row.startswith("| ") and "| test |" not in row]
    assert len(rows) >= 20 and all("::test_" in row for row in rows)
