"""Loggers: the CSV survives kills, resumes and new columns; the others get what they need."""

from __future__ import annotations

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from prelar_trl.record import Logger, RunFolder, check_backends, read_video
from prelar_trl.record.logger import CsvTable
from tests.toy_runs import rows


@pytest.fixture
def run(tmp_path):
    return RunFolder.create(tmp_path / "run", {"seed": 0})


def test_metrics_are_on_disk_as_soon_as_logged(run):
    logger = Logger(run)
    logger.log({"loss_image": torch.tensor(2.5), "psnr": torch.tensor([3.0]), "count": 4}, step=1)
    assert rows(run.path) == [{"step": "1", "loss_image": "2.5", "psnr": "3.0", "count": "4.0"}]
    path = logger.log_video("eval/run", torch.zeros(3, 3, 64, 64, dtype=torch.uint8), 500)
    assert path == run.videos / "eval_run_000500.mp4"
    assert len(read_video(path)) == 3
    logger.close()


def test_columns_that_come_later_leave_earlier_rows_empty(run):
    with Logger(run) as logger:
        logger.log({"a": 1.0}, 1)
        logger.log({"eval/success": 0.5}, 2)
    with Logger(run) as logger:  # without a resume step all rows stay
        logger.log({"a": 3.0}, 3)
    assert [list(row.values()) for row in rows(run.path)] == [
        ["1", "1.0", ""],
        ["2", "", "0.5"],
        ["3", "3.0", ""],
    ]


def test_resume_drops_what_was_logged_beyond_the_checkpoint(run):
    with Logger(run) as logger:
        for step in range(5):
            logger.log({"a": float(step)}, step)
    with Logger(run, resume_step=2) as logger:
        logger.log({"a": 30.0, "b": 1.0}, 3)
    found = [(int(row["step"]), float(row["a"])) for row in rows(run.path)]
    assert found == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 30.0)]


def test_speed_has_a_table_of_its_own(run):
    """Two runs with the same seed have the same metrics.csv."""
    with Logger(run) as logger:
        for step in (1, 2, 3):
            logger.log({"a": 1.0}, step)
            logger.log_times({"steps_per_s": 10.0 * step}, step)
    with Logger(run, resume_step=1) as logger:
        logger.log_times({"steps_per_s": 5.0, "time/env": 0.5}, 2)
    assert rows(run.path) == [{"step": "1", "a": "1.0"}]
    assert rows(run.path, run.times.name) == [
        {"step": "1", "steps_per_s": "10.0", "time/env": ""},
        {"step": "2", "steps_per_s": "5.0", "time/env": "0.5"},
    ]


def test_a_line_torn_by_a_kill_is_dropped(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_bytes(b"step,a\r\n1,0.25\r\n2,0.1")
    table = CsvTable(path)
    table.append({"step": 3, "a": 0.5})
    table.close()
    assert path.read_text().split() == ["step,a", "1,0.25", "3,0.5"]


def test_a_foreign_csv_is_refused_and_kept(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("name,age\nx,3\n")
    with pytest.raises(ValueError, match="no column step"):
        CsvTable(path)
    assert path.read_text() == "name,age\nx,3\n"


def test_a_metric_that_is_no_number_is_named(run):
    with Logger(run) as logger:
        with pytest.raises(ValueError, match="'feat' must be one number"):
            logger.log({"feat": torch.zeros(3)}, 0)
        with pytest.raises(ValueError, match="'name' must be a number"):
            logger.log({"name": "prelar"}, 0)


def test_unknown_backends_are_refused():
    check_backends(["csv", "tensorboard"])
    with pytest.raises(ValueError, match="unknown logger 'tensorbord': choose from csv"):
        check_backends(["csv", "tensorbord"])
    with pytest.raises(ValueError, match="must be a list"):
        check_backends("csv")


def test_tensorboard_gets_scalars_and_pictures_and_forgets_beyond_a_resume(run):
    with Logger(run, ("csv", "tensorboard")) as logger:
        for step in range(4):
            logger.log({"loss": float(step)}, step)
        logger.log_video("openloop", torch.zeros(2, 3, 64, 64, dtype=torch.uint8), 3)
    with Logger(run, ("csv", "tensorboard"), resume_step=1) as logger:
        logger.log({"loss": 20.0}, 2)
    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(0, 0.0), (1, 1.0), (2, 20.0)]
    with_video = EventAccumulator(str(sorted((run.path / "tensorboard").iterdir())[0]))
    with_video.Reload()
    assert with_video.Images("openloop")[0].encoded_image_string[:4] == b"GIF8"


def test_wandb_works_offline_without_an_account(run, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with Logger(run, ("csv", "wandb")) as logger:
        logger.log({"loss": 1.0, "eval/success": 0.5}, 10)
        logger.log_video("eval", torch.zeros(2, 3, 64, 64, dtype=torch.uint8), 10)
    (offline,) = (run.path / "wandb").glob("offline-run-*")
    assert list(offline.glob("*.wandb"))
    assert list(offline.rglob("*.mp4"))
    assert (run.path / "wandb" / "id.txt").read_text() in offline.name
