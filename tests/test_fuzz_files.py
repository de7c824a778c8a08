"""Truncated and flipped files: a clear error, or what was written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prelar_trl.checkpoint import load_checkpoint, save_checkpoint
from prelar_trl.data import ClipStore, EpisodeReplay
from prelar_trl.hub import FACTS, load_pretrained, read_export, write_export
from prelar_trl.record import read_metrics
from tests.fuzz import fuzz, run
from tests.test_data_clips import write
from tests.test_replay import steps
from tests.tiny import TINY, tiny_world_model

State = dict[str, Any]


def checkpoint(path: Path) -> None:
    save_checkpoint(path / "last.pt", {"model": {"weight": torch.arange(40.0)}, "step": 7})


def read_checkpoint(path: Path) -> State:
    state = load_checkpoint(path / "last.pt")
    return {"weight": state["model"]["weight"].tolist(), "step": state["step"]}


def store(path: Path) -> None:
    write(path, (4, 3, 5), shard_bytes=1500)


def read_store(path: Path) -> State:
    clips = ClipStore(path)
    return {
        name: [clips.read(clip).tolist(), clips.read(clip, "actions").tolist(), clips.labels[clip]]
        for clip, name in enumerate(clips.names)
    }


def replay(path: Path) -> None:
    made = EpisodeReplay(path, window=4, batch_size=2, capacity=60)
    for number in range(3):
        made.extend(steps(5, base=10 * number))
    made.storage._store.release()  # as a process that is killed


def read_replay(path: Path) -> State:
    """The episodes that are drawn, by number; a damaged one may be missing."""
    made = EpisodeReplay(path, window=4, batch_size=64, capacity=60)
    try:
        lengths = made.storage.episodes()["lengths"].tolist()
        kept = [number for number, length in enumerate(lengths) if length]
        whole = {str(n): made.episode(n).exclude("episode").to_dict() for n in kept}
        return {n: {key: x.tolist() for key, x in each.items()} for n, each in whole.items()}
    finally:
        if made.storage._store is not None:
            made.storage._store.release()


def metrics(path: Path) -> None:
    lines = [f"{step},{step / 4},{step}.5" for step in range(10, 16)]
    (path / "metrics.csv").write_text("\r\n".join(["step,a,bc", *lines, ""]))


def read_csv(path: Path) -> State:
    return {name: len(x.steps) for name, x in read_metrics(path / "metrics.csv").items()}


def export(path: Path) -> None:
    torch.manual_seed(0)
    model = tiny_world_model()
    state = {"phase": "pretrain", "method": "prelar", "size": "tiny", "overrides": TINY, "step": 3}
    path.rmdir()
    write_export(path, {**state, "model": model.state_dict()}, {}, "card")


def read_all(path: Path) -> State:
    weights = load_pretrained(path).state_dict()
    sums = {name: x.double().sum().item() for name, x in weights.items()}
    return {name: read_export(path).get(name) for name in FACTS} | sums


MADE: dict[str, tuple[Callable[[Path], None], Callable[[Path], State]]] = {
    "checkpoint": (checkpoint, read_checkpoint),
    "store": (store, read_store),
    "replay": (replay, read_replay),
    "metrics": (metrics, read_csv),
    "export": (export, read_all),
}


@pytest.mark.parametrize("kind", MADE)
@fuzz(60)
def test_damaged_files(kind: str, budget: Any, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    make, read = MADE[kind]
    whole = tmp_path / "whole"
    whole.mkdir()
    make(whole)
    files = sorted(x.relative_to(whole) for x in whole.rglob("*") if x.suffix not in ("", ".md"))
    expected = read(shutil.copytree(whole, tmp_path / "read"))
    assert expected
    share = st.floats(0, 1, exclude_max=True, width=32)

    @given(st.sampled_from(files), share, st.integers(0, 7), st.sampled_from(["flip", "cut", "no"]))
    def check(name: Path, place: float, bit: int, damage: str) -> None:
        shutil.rmtree(tmp_path / "read")
        folder = shutil.copytree(whole, tmp_path / "read")
        data = bytearray((folder / name).read_bytes())
        if not data:
            return
        byte = int(place * len(data))
        if damage == "flip":
            data[byte] ^= 1 << bit
        (folder / name).write_bytes(data[:byte] if damage == "cut" else data)
        if damage == "no":
            (folder / name).unlink()
        try:
            got = read(folder)
        except (ValueError, OSError) as error:
            assert str(error) and "\n" not in str(error), repr(error)
            return
        if kind == "replay":
            assert all(expected[number] == episode for number, episode in got.items())
        elif kind == "metrics":  # names and digits have no checksum
            assert all(count <= 6 for count in got.values())
        else:
            assert got == expected

    run(budget, check)
