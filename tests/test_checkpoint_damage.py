"""Checkpoints that were damaged are noticed, and the one before is taken."""

from __future__ import annotations

import logging
import os
import random
import shutil
from pathlib import Path

import pytest
import torch

from prelar_trl.checkpoint import (
    DamagedFileError,
    has_checkpoint,
    load_checkpoint,
    load_newest_checkpoint,
    save_checkpoint,
)
from prelar_trl.official import read_official, save_official_checkpoint
from tests.files import flip
from tests.tiny import tiny_world_model


def steps(folder: Path) -> dict[str, int]:
    return {path.name: load_checkpoint(path)["step"] for path in sorted(folder.iterdir())}


def saved(path: Path, count: int, keep: int = 2) -> Path:
    for step in range(1, count + 1):
        save_checkpoint(path, {"step": step, "weights": torch.full((500,), float(step))}, keep=keep)
    return path


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_no_flipped_bit_gives_other_weights(tmp_path: Path) -> None:
    weights = tiny_world_model("dreamerv2", "finetune").state_dict()
    path = save_checkpoint(tmp_path / "last.pt", {"step": 1, "weights": weights})
    whole, generator, noticed = path.read_bytes(), random.Random(0), 0
    for _ in range(120):
        flip(path, generator.randrange(len(whole)), generator.randrange(8))
        try:
            assert same(load_checkpoint(path)["weights"], weights)  # padding between the entries
        except DamagedFileError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            noticed += 1
        path.write_bytes(whole)
    assert noticed >= 110


def test_no_flipped_bit_in_an_official_checkpoint_gives_other_weights(tmp_path: Path) -> None:
    save_official_checkpoint(tmp_path, tiny_world_model("dreamerv2", "finetune"))
    path = tmp_path / "variables.pt"
    weights, whole = read_official(tmp_path), path.read_bytes()
    generator, noticed = random.Random(0), 0
    for _ in range(40):
        flip(path, generator.randrange(len(whole)), generator.randrange(8))
        try:
            assert same(read_official(tmp_path), weights)
        except ValueError as error:
            assert "variables.pt is not a readable file of weights" in str(error)
            noticed += 1
        path.write_bytes(whole)
    assert noticed >= 35


def test_official_checkpoints_in_the_old_form_are_read(tmp_path: Path) -> None:
    state = {"wm.rssm.weight": torch.ones(2)}
    torch.save(state, tmp_path / "variables.pt", _use_new_zipfile_serialization=False)
    assert same(read_official(tmp_path), state)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_checkpoints_are_kept(keep: int, tmp_path: Path) -> None:
    saved(tmp_path / "last.pt", 5, keep)
    kept = {"last.pt": 5, "last_1.pt": 4, "last_2.pt": 3}
    assert steps(tmp_path) == dict(list(kept.items())[:keep])


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "missing"])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before_by_name(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = saved(tmp_path / "last.pt", 3)
    size = path.stat().st_size
    if damage == "flipped":
        flip(path)
    elif damage == "missing":
        path.unlink()
    else:
        os.truncate(path, size // 2 if damage == "cut" else 0)
    with pytest.raises((DamagedFileError, FileNotFoundError)):
        load_checkpoint(path)
    with caplog.at_level(logging.WARNING):
        assert load_newest_checkpoint(path)["step"] == 2
    assert f"checkpoint {path}" in caplog.text and f"taking {tmp_path / 'last_1.pt'}" in caplog.text


def test_a_damaged_checkpoint_takes_no_whole_ones_place(tmp_path: Path) -> None:
    path = saved(tmp_path / "last.pt", 3)
    flip(path)
    save_checkpoint(path, {"step": 4}, keep=2)
    assert steps(tmp_path) == {"last.pt": 4, "last_1.pt": 2}


def test_kept_checkpoints_share_no_bytes(tmp_path: Path) -> None:
    path = saved(tmp_path / "last.pt", 3)
    flip(path)
    assert load_checkpoint(tmp_path / "last_1.pt")["step"] == 2


def test_without_hard_links_they_are_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    saved(tmp_path / "last.pt", 3)
    assert steps(tmp_path) == {"last.pt": 3, "last_1.pt": 2}


def test_a_save_that_fails_keeps_all_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path / "last.pt", 2)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="the one before it is kept"):
        save_checkpoint(path, {"step": 3}, keep=2)
    assert steps(tmp_path) == {"last.pt": 2, "last_1.pt": 1}


def test_a_link_that_a_killed_save_has_left_is_replaced(tmp_path: Path) -> None:
    path = saved(tmp_path / "last.pt", 2)
    os.link(path, tmp_path / "last_1.part.pt")
    save_checkpoint(path, {"step": 3}, keep=2)
    assert steps(tmp_path) == {"last.pt": 3, "last_1.pt": 2}


def test_fewer_to_keep_delete_those_that_are_too_many(tmp_path: Path) -> None:
    path = saved(tmp_path / "last.pt", 4, keep=4)
    (tmp_path / "last_mine.pt").write_bytes(path.read_bytes())
    save_checkpoint(path, {"step": 5}, keep=2)
    assert steps(tmp_path) == {"last.pt": 5, "last_1.pt": 4, "last_mine.pt": 4}
    save_checkpoint(path, {"step": 6}, keep=None)
    assert steps(tmp_path) == {"last.pt": 6, "last_1.pt": 4, "last_mine.pt": 4}


def test_copies_that_somebody_has_made_are_neither_deleted_nor_taken(tmp_path: Path) -> None:
    path = saved(tmp_path / "last.pt", 2, keep=2)
    for name in ("last_5000.pt", "best_1.pt"):
        (tmp_path / name).write_bytes(path.read_bytes())
    save_checkpoint(path, {"step": 3}, keep=1)
    save_checkpoint(tmp_path / "best.pt", {"step": 4})
    kept = {"last.pt": 3, "last_5000.pt": 2, "best.pt": 4, "best_1.pt": 2}
    assert steps(tmp_path) == kept
    path.unlink()
    assert not has_checkpoint(path)
    with pytest.raises(FileNotFoundError, match="the run has saved none yet"):
        load_newest_checkpoint(path)


def test_a_checkpoint_that_is_gone_is_said_with_the_one_before_it(tmp_path: Path) -> None:
    saved(tmp_path / "last.pt", 3, keep=3).unlink()
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*last.pt: copy last_1.pt there"):
        load_checkpoint(tmp_path / "last.pt")
    (tmp_path / "last_1.pt").unlink()  # as a process that was killed while it moved them leaves it
    assert load_newest_checkpoint(tmp_path / "last.pt")["step"] == 1


def test_a_kill_at_any_moment_of_a_save_leaves_a_checkpoint(tmp_path: Path) -> None:
    start = saved(tmp_path / "start" / "last.pt", 3, keep=3).parent
    for moment in range(4):
        folder = shutil.copytree(start, tmp_path / str(moment))
        left = [moment]

        def interrupt(*_: object, left: list[int] = left, real=os.replace) -> None:
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            real(*_)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "replace", interrupt)
            try:
                save_checkpoint(folder / "last.pt", {"step": 4}, keep=3)
            except KeyboardInterrupt:
                assert load_newest_checkpoint(folder / "last.pt")["step"] == 3
        if not left[0] and moment == 3:
            assert steps(folder) == {"last.pt": 4, "last_1.pt": 3, "last_2.pt": 2}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_is_not_finite_is_not_written(
    value: float, dtype: torch.dtype, tmp_path: Path
) -> None:
    path = saved(tmp_path / "last.pt", 1)
    state = {
        "step": 2,
        "empty": torch.zeros(0),
        "model": {"weight": torch.ones(3), "count": torch.tensor(3)},
        "optimizers": [{"moment": torch.tensor([1.0, value, 1.0], dtype=dtype)}],
    }
    with pytest.raises(ValueError, match=r"not written: optimizers.0.moment holds NaN or inf"):
        save_checkpoint(path, state, keep=2)
    assert steps(tmp_path) == {"last.pt": 1}
    save_checkpoint(path, state, finite=False)
    assert steps(tmp_path) == {"last.pt": 2}
