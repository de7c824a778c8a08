"""Checkpoints: whole or not at all, and nothing in a file is ever run."""

from __future__ import annotations

import os
import pickle
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prelar_trl import checkpoint
from prelar_trl.checkpoint import load_checkpoint, rng_state, save_checkpoint, set_rng_state
from tests.tiny import tiny_agent
from tests.toy_runs import different


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
    state = {"agent": agent.state_dict(), "optimizer": optimizer.state_dict(), "name": "prelar"}
    state["nested"] = {"list": [1, 2.5, None, True]}
    path = save_checkpoint(tmp_path / "new folder" / "last.pt", state)
    loaded = load_checkpoint(path)
    assert loaded.pop("format") == checkpoint.FORMAT
    assert different(loaded, state) == []
    torch.optim.Adam(agent.actor.parameters()).load_state_dict(loaded["optimizer"])
    assert [x.name for x in path.parent.iterdir()] == ["last.pt"]


def fail(state: Any, file: Any) -> None:
    file.write(b"half of it")
    raise OSError(28, "No space left on device")


def interrupt(*args: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("module", "name", "broken", "error"),
    [
        (torch, "save", fail, OSError),
        (os, "replace", interrupt, KeyboardInterrupt),
        (None, "", lambda: None, (pickle.PicklingError, AttributeError)),  # cannot be saved
    ],
)
def test_a_save_that_fails_keeps_the_old_checkpoint(
    module: Any, name: str, broken: Any, error: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.pt"
    for count in (1, 2):
        save_checkpoint(path, {"count": count})
    if module is not None:
        monkeypatch.setattr(module, name, broken)
    with pytest.raises(error) as caught:
        save_checkpoint(path, {"count": 3, "more": broken if module is None else None})
    if error is OSError:
        message = r"was not written \(\d+ MiB free.*the one before it is kept"
        assert re.search(message, str(caught.value))
    assert load_checkpoint(path)["count"] == 2
    assert [x.name for x in tmp_path.iterdir()] == ["last.pt"]


def test_damaged_files_give_one_line(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint .*last.pt: the run has saved none"):
        load_checkpoint(tmp_path / "last.pt")
    path = save_checkpoint(tmp_path / "last.pt", {"weights": torch.randn(50, 50)})
    whole, generator = path.read_bytes(), random.Random(0)
    damaged = [b"", b"not a checkpoint", whole[:-1], whole[: len(whole) // 2], whole[:3]]
    damaged += [generator.randbytes(40) for _ in range(60)]
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(ValueError) as error:
            load_checkpoint(path)
        assert "last.pt" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        *((x, "is not a checkpoint of this package") for x in (torch.zeros(3), [1, 2], {"a": 1})),
        *(({"format": x}, "is not a checkpoint of this package") for x in ("pt", None)),
        ({"format": checkpoint.FORMAT + 1}, "has format 2; this version reads up to 1, update"),
    ],
    ids=str,
)
def test_files_of_others_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=f"other.pt {message}"):
        load_checkpoint(tmp_path / "other.pt")


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
