"""The benchmark of a whole run: its split is that of the run."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from benchmarks import end_to_end
from prelar_trl.envs.toy import ToyEnv
from prelar_trl.updates import BehaviorUpdate, WorldModelUpdate

SMALL = ["--env", "toy", "--size", "mini", "--batch", "2", "--length", "6", "--threads", "1"]
SMALL += ["--method", "dreamerv2", "--episode", "10", "--steps", "20", "--eval-episodes", "1"]


@pytest.mark.parametrize(
    ("owner", "name", "delay", "calls", "section"),
    [
        (ToyEnv, "_step", 0.02, 20, "env"),
        (WorldModelUpdate, "__call__", 0.2, 4, "world_model"),
        (BehaviorUpdate, "__call__", 0.2, 4, "behavior"),
    ],
)
def test_what_takes_longer_shows_where_it_belongs(
    owner: type,
    name: str,
    delay: float,
    calls: int,
    section: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    real = getattr(owner, name)

    def slow(self, *args):
        time.sleep(delay)
        return real(self, *args)

    monkeypatch.setattr(owner, name, slow)
    file = tmp_path / "report.json"
    report = end_to_end.main([*SMALL, "--json", str(file)])
    assert json.loads(file.read_text())["share"] == report["share"]
    seconds = report["seconds"]
    assert seconds[section] >= delay * calls
    assert sum(report["share"].values()) == pytest.approx(1)
    assert report["steps_per_s"] == pytest.approx(20 / sum(seconds.values()))
    without = sum(seconds.values()) - seconds["evaluation"]
    assert report["steps_per_s_without_evaluation"] == pytest.approx(20 / without)
    # Start-up and prefill stand apart: ten steps of random actions and the first update.
    assert report["startup_s"] > 0 and report["updates"] == 4
    prefill = report["prefill"]["seconds"]
    assert prefill[section] >= delay * {"env": 10}.get(section, 1)
    assert prefill["evaluation"] == 0 < seconds["evaluation"]
    out = capsys.readouterr().out
    assert section in out and "steps/s" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--wait"], "--wait is for --device cuda"),
        (["--steps", "21", "--workers", "2"], "--steps 21 is no multiple of --workers 2"),
    ],
)
def test_bad_options_are_named(
    options: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit):
        end_to_end.main([*SMALL, *options])
    assert message in capsys.readouterr().err
