"""What the docs say of the bytes that processes exchange."""

from __future__ import annotations

import sys

import pytest

from benchmarks import exchange
from tests.toy_runs import ROOT


def test_the_docs_hold_what_the_command_prints(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["exchange"])
    exchange.main()
    assert capsys.readouterr().out in (ROOT / "docs" / "distributed.md").read_text()


def test_gradients_are_those_of_all_that_is_trained() -> None:
    # 28,682,635 parameters, as in the authors' code.
    assert exchange.exchange("prelar", "pretrain", "full")["gradients_mb"] == pytest.approx(
        4 * 28.682635, rel=1e-6
    )
