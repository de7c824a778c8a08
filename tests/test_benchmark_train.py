"""The training benchmark: what it measures, and its comparison with another program."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import train

SIZES = ["--size", "tiny", "--batch", "1", "--length", "5", "--updates", "1", "--threads", "1"]


def baseline(**numbers: float) -> str:
    return shlex.join([sys.executable, "-c", f"print('noise'); print({json.dumps(numbers)!r})"])


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our own workers run here: importing the libraries anew takes seconds."""
    run = train.run

    def shortcut(command: list[str], *args: dict) -> dict:
        return train.main(command[2:]) if "--worker" in command else run(command, *args)

    monkeypatch.setattr(train, "run", shortcut)
    rates = {"matmul_gflops": 100.0, "conv_gflops": 50.0}
    monkeypatch.setattr(train, "rates", lambda *args: rates)


def test_each_configuration_is_a_row(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "report.json"
    options = ["--method", "prelar", "dreamerv2", "--phase", "pretrain", "finetune"]
    train.main([*options, *SIZES, "--json", str(file)])
    rows = json.loads(file.read_text())["rows"]
    names = [(row["method"], row["phase"]) for row in rows]
    assert names == [("prelar", "pretrain"), ("prelar", "finetune"), ("dreamerv2", "finetune")]
    for row in rows:
        assert row["world_model_ms"] > 0 and row["peak_mib"] > 100
        assert (row["behavior_ms"] > 0) == (row["phase"] == "finetune")
        total = row["world_model_ms"] + row["behavior_ms"]
        assert row["frames_per_s"] == pytest.approx(5e3 / total)
        floor = row["matmul_gflop"] / 100 + row["conv_gflop"] / 50
        assert row["share_of_peak"] == pytest.approx(1e3 * floor / total)
    # Without the latent-action encoder there are fewer convolutions, with a plain CNN fewer still.
    convolutions = [row["conv_gflop"] for row in rows]
    assert convolutions == sorted(set(convolutions), reverse=True)
    assert "dreamerv2" in capsys.readouterr().out


def test_compile_on_compiles_the_update(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def compile(function: Callable, *, options: dict, **how: Any) -> Callable:
        compiled.append(function)
        return function

    monkeypatch.setattr(torch, "compile", compile)
    eager, ours = train.main([*SIZES, "--compile", "off", "on"])["rows"]
    assert [eager["compile"], ours["compile"], len(compiled)] == ["off", "on", 1]


def test_the_ratio_is_ours_over_the_baseline() -> None:
    command = baseline(world_model_ms=1e-3, behavior_ms=0.0, peak_mib=1e6)
    (row,) = train.main([*SIZES, "--rounds", "3", "--baseline", command])["rows"]
    ratio = row["baseline"]
    assert ratio["world_model"]["ratio"] == pytest.approx(row["world_model_ms"] * 1e3)
    assert ratio["total"]["range"][0] <= ratio["total"]["ratio"] <= ratio["total"]["range"][1]
    assert ratio["peak_mib"]["ratio"] < 0.1
    assert "behavior" not in ratio
    assert len(ratio["rounds"]) == 3 and len(row["updates_ms"]["world_model"]) == 3


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (baseline(world_model_ms=1.0), "printed no JSON line with the numbers world_model_ms"),
        (shlex.join([sys.executable, "-c", "raise SystemExit(3)"]), "failed with code 3"),
    ],
)
def test_a_baseline_that_does_not_measure_is_named(command: str, message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        train.main([*SIZES, "--baseline", command])
