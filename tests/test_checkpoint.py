"""Checkpoints: whole or not at all, and nothing in a file is ever run."""

from __future__ import annotations

import os
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prelar_trl import checkpoint
from prelar_trl.checkpoint import load_checkpoint, rng_state, save_checkpoint, set_rng_state
from tests.tiny import tiny_agent


class Malicious:
    """Runs a command when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    agent = tiny_agent()
    optimizer = torch.optim.Adam(agent.actor.parameters())
    agent.actor(torch.randn(3, agent.world_model.rssm.feat_dim)).mean.sum().backward()
    optimizer.step()
    state = {
        "agent": agent.state_dict(),
        "optimizer": optimizer.state_dict(),
        "count": 7,
        "name": "prelar",
        "nested": {"list": [1, 2.5, None, True]},
    }
    path = save_checkpoint(tmp_path / "new folder" / "last.pt", state)
    loaded = load_checkpoint(path)
    assert loaded["format"] == checkpoint.FORMAT
    assert (
        loaded["count"] == 7 and loaded["name"] == "prelar" and loaded["nested"] == state["nested"]
    )
    for key, value in agent.state_dict().items():
        assert torch.equal(loaded["agent"][key], value)
    torch.optim.Adam(agent.actor.parameters()).load_state_dict(loaded["optimizer"])
    assert [x.name for x in path.parent.iterdir()] == ["last.pt"]


def test_a_new_checkpoint_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    for count in (1, 2):
        save_checkpoint(path, {"count": count})
    assert load_checkpoint(path)["count"] == 2


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("write")])
def test_a_save_that_fails_keeps_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    path = save_checkpoint(tmp_path / "last.pt", {"count": 1})

    def fail(state: Any, file: Any) -> None:
        file.write(b"half of it")
        raise error

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match=r"was not written \(\d+ MiB free.*the one before it is kept"):
        save_checkpoint(path, {"count": 2})
    assert load_checkpoint(path)["count"] == 1
    assert [x.name for x in tmp_path.iterdir()] == ["last.pt"]


def test_an_interrupted_save_keeps_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_checkpoint(tmp_path / "last.pt", {"count": 1})

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, {"count": 2})
    assert load_checkpoint(path)["count"] == 1
    assert [x.name for x in tmp_path.iterdir()] == ["last.pt"]


def test_what_cannot_be_saved_leaves_nothing_behind(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "last.pt", {"count": 1})
    with pytest.raises((pickle.PicklingError, AttributeError)):
        save_checkpoint(path, {"function": lambda: None})
    assert load_checkpoint(path)["count"] == 1
    assert [x.name for x in tmp_path.iterdir()] == ["last.pt"]


def test_no_checkpoint_is_said_plainly(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint .*last.pt: the run has saved none"):
        load_checkpoint(tmp_path / "last.pt")


def test_damaged_files_give_one_line(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "last.pt", {"weights": torch.randn(50, 50)})
    whole = path.read_bytes()
    generator = random.Random(0)
    damaged = [b"", b"not a checkpoint", whole[:-1], whole[: len(whole) // 2], whole[:3]]
    damaged += [generator.randbytes(40) for _ in range(60)]
    refused = 0
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(ValueError) as error:
            load_checkpoint(path)
        assert "last.pt" in str(error.value) and "\n" not in str(error.value)
        refused += 1
    assert refused == 65


@pytest.mark.parametrize(
    "content",
    [torch.zeros(3), {"weights": torch.zeros(3)}, [1, 2], {"format": "pt"}, {"format": None}],
    ids=str,
)
def test_files_of_others_are_refused(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "other.pt"
    torch.save(content, path)
    with pytest.raises(ValueError, match="other.pt is not a checkpoint of this package"):
        load_checkpoint(path)


def test_a_newer_format_asks_for_an_update(tmp_path: Path) -> None:
    path = tmp_path / "new.pt"
    torch.save({"format": checkpoint.FORMAT + 1}, path)
    with pytest.raises(ValueError, match="has format 2; this version reads up to 1, update"):
        load_checkpoint(path)


@pytest.mark.parametrize("plain", [True, False], ids=["pickle", "torch"])
def test_code_in_a_file_is_never_run(tmp_path: Path, plain: bool) -> None:
    path, trace = tmp_path / "evil.pt", tmp_path / "trace"
    state = {"format": 1, "weights": Malicious(trace)}
    if plain:
        path.write_bytes(pickle.dumps(state, protocol=2))
    else:
        torch.save(state, path)
    with pytest.raises(ValueError, match="cannot be read .*damaged or not one of this package"):
        load_checkpoint(path)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Malicious(trace)))
    assert trace.exists()  # the file was dangerous indeed


def test_random_generators_continue_where_they_were(tmp_path: Path) -> None:
    def draw() -> list[float]:
        return [torch.randn(()).item(), np.random.randn(), random.gauss(0, 1), random.random()]  # noqa: NPY002

    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    draw()  # both Gaussians now hold a second number back
    path = save_checkpoint(tmp_path / "last.pt", {"rng": rng_state()})
    expected = [draw() for _ in range(3)]
    draw()
    set_rng_state(load_checkpoint(path)["rng"])
    assert [draw() for _ in range(3)] == expected
