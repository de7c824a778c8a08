"""Run folders after a loss of power, and with two writers."""

from __future__ import annotations

import logging
import os
import signal
import time
from pathlib import Path

import pytest

from prelar_trl.record import RunFolder, read_metrics
from prelar_trl.record.table import CsvTable


@pytest.mark.parametrize(
    "line",
    [b"\0" * 512, b"2,0.\xff5", b"2", b"2,0.5,7", b"2,x", b",0.5", b"2,0.5\r7", b'"2,0.5'],
    ids=["zeros", "bytes", "short", "long", "word", "no step", "joined", "quote"],
)
def test_a_damaged_row_of_metrics_is_dropped_with_a_warning(
    line: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.csv"
    path.write_bytes(b"step,a\r\n1,0.25\r\n" + line + b"\r\n3,nan\r\n4,0.5\r\n")
    assert read_metrics(path)["a"].steps.tolist() == [1, 3, 4]
    with caplog.at_level(logging.WARNING):
        table = CsvTable(path, resume_step=3)
    assert f"{path}: left out 1 damaged lines" in caplog.text
    table.append({"step": 5, "a": 0.75})
    table.close()
    assert path.read_text().split() == ["step,a", "1,0.25", "3,nan", "5,0.75"]


@pytest.mark.parametrize("header", [b"\0" * 100, b"st\rp,a"], ids=["zeros", "joined"])
def test_without_a_column_step_it_is_no_file_of_metrics(header: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_bytes(header + b"\n1,2\n")
    with pytest.raises(ValueError, match="metrics.csv is not a file of metrics"):
        CsvTable(path)


def test_a_run_folder_has_one_writer(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "a", {"seed": 1}, need_bytes=0)
    with run, pytest.raises(BlockingIOError, match="another process is writing to run folder"):
        RunFolder.load(run.path).lock()
    again = RunFolder.load(run.path)
    again.lock()  # the first has unlocked it
    with pytest.raises(BlockingIOError):
        RunFolder.load(run.path).lock()
    del again
    RunFolder.load(run.path).lock()


def test_the_lock_of_a_killed_process_is_gone(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "a", {}, need_bytes=0)
    run.unlock()
    locked, tell = os.pipe()
    other = os.fork()
    if other == 0:
        try:
            run.lock()
            os.write(tell, b"locked")
            time.sleep(600)
        finally:
            os._exit(1)
    assert os.read(locked, 6) == b"locked"
    with pytest.raises(BlockingIOError, match="wait for it or stop it"):
        run.lock()
    assert RunFolder.load(run.path).config == {}  # reading is free
    os.kill(other, signal.SIGKILL)
    os.waitpid(other, 0)
    run.lock()


@pytest.mark.parametrize(
    "text", ["a: [1", "\0\0\0", "- 1", "a: !!python/object/apply:os.getpid []"]
)
def test_a_damaged_config_is_said_in_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match="config.yaml is") as error:
        RunFolder.load(tmp_path)
    assert "\n" not in str(error.value)
