"""The GPU's one call: every part reports, whatever happens to the others."""

from __future__ import annotations

import json
import shlex
import sys
from typing import Any

import pytest

from benchmarks import gpu


def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Any, *options: str) -> dict[str, Any]:
    arguments = ["gpu", "--device", "cpu", "--out", str(tmp_path), *options]
    monkeypatch.setattr(sys, "argv", arguments)
    gpu.main()
    return json.loads((tmp_path / "gpu.json").read_text())


def test_a_part_that_fails_or_hangs_leaves_the_others(monkeypatch, tmp_path) -> None:
    def collect(command: list[str], seconds: float) -> dict[str, Any]:
        code = {"waits": "raise SystemExit('broken')", "times": "import time; time.sleep(60)"}
        code |= {"rendering": "print('{\"frames_s\": 5.0}')"}
        return real([sys.executable, "-c", code.get(command[-1], "print('2 passed')")], 2.0)

    real = gpu.collect
    monkeypatch.setattr(gpu, "collect", collect)
    report = run(monkeypatch, tmp_path, "--seconds", "60")
    assert list(report) == ["device", "waits", "times", "tests", "rendering"]
    assert report["waits"]["error"] == "exit code 1: broken"
    assert report["times"]["error"] == "cut off after 2 s"
    assert report["rendering"]["results"] == [{"frames_s": 5.0}]
    page = (tmp_path / "gpu.md").read_text()
    assert "**exit code 1: broken**" in page and "**cut off after 2 s**" in page
    assert "| frames_s |\n|---|\n| 5 |" in page and "2 passed" in page


def test_what_the_time_did_not_reach_is_named(monkeypatch, tmp_path) -> None:
    report = run(monkeypatch, tmp_path, "--seconds", "1")
    assert all(report[name] == {"not_reached": True} for name in report if name != "device")
    assert (tmp_path / "gpu.md").read_text().count("**not reached: the time was up**") == 4


def test_every_part_gets_its_share_and_what_others_have_left(monkeypatch, tmp_path) -> None:
    """Parts that take all of theirs, or nothing, by a clock that they alone move."""
    for greedy in (True, False):
        now, given = [0.0], {}

        def collect(command, seconds, now=now, given=given, greedy=greedy):
            name = {"-m": "tests"}.get(command[-2], command[-1])
            given[name] = seconds
            now[0] += seconds if greedy else 0
            return {"results": [], "last_line": [], "seconds": seconds}

        monkeypatch.setattr(gpu, "collect", collect)
        monkeypatch.setattr(gpu.time, "perf_counter", lambda now=now: now[0])
        run(monkeypatch, tmp_path, "--seconds", "270", "--baseline", "baseline")
        shares = list(gpu.SHARES.values())
        assert list(given) == list(gpu.SHARES)
        for i, seconds in enumerate(given.values()):
            least = 270 * shares[i] / sum(shares)
            assert seconds == pytest.approx(least if greedy else 270 * shares[i] / sum(shares[i:]))


def test_a_baseline_is_compared_where_it_says_what_it_measured(monkeypatch, tmp_path) -> None:
    ours = gpu.settings("prelar", "pretrain", "32", "cpu")
    ours |= {"world_model_ms": 30.0, "behavior_ms": 0.0, "peak_mib": 100.0}
    theirs = ours | {"world_model_ms": 60.0, "peak_mib": 50.0, "threads": 64}
    lines = [theirs, theirs | {"batch": 3}, {"world_model_ms": 1.0}]
    (tmp_path / "lines").write_text("noise\n" + "\n".join(map(json.dumps, lines)) + "\n")

    def collect(command: list[str], seconds: float) -> dict[str, Any]:
        code = "pass" if command[-1] != "times" else f"print({json.dumps(ours)!r})"
        return real(command if command[0] == "bash" else [sys.executable, "-c", code], 20.0)

    real = gpu.collect
    monkeypatch.setattr(gpu, "collect", collect)
    command = f"cd {shlex.quote(str(tmp_path))} && cat lines"
    report = run(monkeypatch, tmp_path, "--seconds", "600", "--baseline", command)
    ratios = [(row.get("ratio"), row.get("memory_ratio")) for row in report["baseline"]["results"]]
    assert ratios == [(0.5, 2.0), (None, None), (None, None)]
    assert "| ratio | memory_ratio |" in (tmp_path / "gpu.md").read_text()


def test_every_method_and_phase_is_measured() -> None:
    assert sorted(gpu.CASES) == sorted(gpu.PHASES) and len(gpu.CASES) == len(set(gpu.CASES))


def test_a_configuration_that_fails_says_so_beside_the_others() -> None:
    def fail(config: dict[str, Any]) -> dict[str, Any]:
        raise RuntimeError("no\nmemory")

    config = gpu.settings("prelar", "pretrain", "32", "cpu")
    assert gpu.guarded(fail, config) == config | {"error": "RuntimeError: no memory"}
