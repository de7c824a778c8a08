"""Runs of the recipes in two processes: one run folder, and continuing with as many or fewer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from prelar_trl.checkpoint import rng_state
from prelar_trl.data import ClipStore
from prelar_trl.recipes.finetune import FinetuneState, finetune
from prelar_trl.recipes.pretrain import pretrain
from prelar_trl.recipes.processes import ALONE, Processes
from tests.processes import run_in_processes
from tests.toy_runs import (
    FINETUNE_ARGS,
    PRETRAIN_ARGS,
    ROOT,
    checkpoint,
    different,
    finetune_config,
    pretrain_config,
    rows,
)

PRETRAIN = {"batch_size": 4, "updates": 4, "checkpoint_every": 2}
FINETUNE = {"batch_size": 4, "prefill": 40, "checkpoint_every": 60, "eval_every": 60}


def processes() -> Processes:
    return Processes(dist.group.WORLD) if dist.is_initialized() else ALONE


def train_on_video(clips: Path, run: Path, **changes: Any) -> None:
    pretrain(pretrain_config(clips, run, **PRETRAIN | changes), processes())


def act(run: Path, env_steps: int = 120, **changes: Any) -> None:
    cfg = finetune_config(run, env_steps=env_steps, **FINETUNE | changes)
    finetune(cfg, processes=processes())


def copied(source: Path, target: Path) -> None:
    """Another run at the same point."""
    if processes().first:
        shutil.copytree(source, target)
        config = (target / "config.yaml").read_text()
        (target / "config.yaml").write_text(config.replace(str(source), str(target)))
    processes().wait()


def run_everything(clips: Path, folder: Path) -> dict[str, Any]:
    """All runs here that need two processes; what each has after going on with one."""
    train_on_video(clips, folder / "whole")
    train_on_video(clips, folder / "parts", updates=2)
    copied(folder / "parts", folder / "shrunk")
    train_on_video(clips, folder / "parts", resume=True)
    act(folder / "fine", env_steps=60)
    copied(folder / "fine", folder / "fewer")
    act(folder / "more", resume=True, env_steps=80)
    loaded: dict[str, Any] = {}
    load = FinetuneState.load_state_dict

    def load_and_look(self: FinetuneState, state: dict[str, Any]) -> None:
        load(self, state)
        loaded.update({**self.collection.state_dict(), "rng": rng_state()})

    with mock.patch.object(FinetuneState, "load_state_dict", load_and_look):
        act(folder / "fine", resume=True)
    return loaded


@pytest.fixture(scope="module")
def runs(clips, tmp_path_factory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("runs")
    act(folder / "more", env_steps=60)  # alone
    return folder, run_in_processes(run_everything, clips, folder)


def test_two_processes_write_one_run(runs) -> None:
    folder, _ = runs
    assert [int(row["step"]) for row in rows(folder / "whole") if row["loss_image"]] == [1, 2, 3, 4]
    assert len(checkpoint(folder / "whole")["others"]) == 1
    table = rows(folder / "fine")
    assert [int(row["step"]) for row in table if row["eval/return"]] == [60, 120]
    logged = [int(row["step"]) for row in table if row["loss_image"]]
    assert logged == sorted(set(logged)) and logged[-1] == 120
    assert [path.name for path in (folder / "fine").glob("metrics*")] == ["metrics.csv"]
    state = checkpoint(folder / "fine")
    # One update at first, and one of ten steps from the 40th on, whoever makes them.
    assert (state["step"], state["model_update"]["count"]) == (120, 1 + 8)
    assert not list(folder.glob("*/*.part"))


def test_pretraining_continues_bit_for_bit_in_two_processes(runs) -> None:
    folder, _ = runs
    assert different(checkpoint(folder / "whole"), checkpoint(folder / "parts")) == []


def test_one_process_goes_on_with_the_same_clips_where_two_stopped(clips, runs) -> None:
    folder, _ = runs
    train_on_video(clips, folder / "shrunk", resume=True)
    whole, shrunk = checkpoint(folder / "whole"), checkpoint(folder / "shrunk")
    assert shrunk["step"] == 4 and shrunk["others"] == []
    assert different(whole["clips"], shrunk["clips"]) == []


def test_processes_collect_episodes_of_their_own(runs) -> None:
    folder, _ = runs
    first, second = (ClipStore(folder / "fine" / name) for name in ("replay", "replay-1"))
    assert len(first) == len(second) == 6  # 60 of the 120 steps each, 10 an episode
    assert (first.read(0, "actions") != second.read(0, "actions")).any()


def test_each_process_goes_on_with_its_own_replay_and_draws(runs) -> None:
    folder, loaded = runs
    state = checkpoint(folder / "fewer")
    assert state["step"] == 60
    for own, saved in zip(loaded, [state, *state["others"]], strict=True):
        for state in (own, saved):  # it tells of the saves before
            state["replay"].pop("held", None)
        assert different(own, {key: saved[key] for key in own}) == []
    assert different(loaded[0]["rng"], loaded[1]["rng"])


def test_the_episodes_of_a_process_that_is_gone_stay(runs) -> None:
    folder, _ = runs
    act(folder / "fewer", resume=True, env_steps=80)
    # Three of each process, and two of the 20 steps alone.
    assert len(ClipStore(folder / "fewer" / "replay")) == 3 + 3 + 2
    state = checkpoint(folder / "fewer")
    assert (state["model_update"]["count"], state["others"]) == (1 + 4, [])


def test_a_new_process_begins_with_a_copy_of_a_replay(runs) -> None:
    folder, _ = runs
    first, second = (ClipStore(folder / "more" / name) for name in ("replay", "replay-1"))
    assert len(first) == len(second) == 6 + 1
    same = [(first.read(n, "actions") == second.read(n, "actions")).all() for n in (5, 6)]
    assert same == [True, False]


def test_a_batch_that_cannot_be_shared_is_an_error() -> None:
    group = mock.Mock(**{"rank.return_value": 0, "size.return_value": 4})
    with pytest.raises(ValueError, match="batch_size=50 cannot be divided among 4 processes"):
        Processes(group).share("batch_size", 50)


def torchrun(recipe: str, run: Path, *arguments: str) -> str:
    """Run a recipe in two processes, as its user does; what it prints."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(ROOT / "recipes" / f"{recipe}.py"), f"run={run}", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert len(checkpoint(run)["others"]) == 1
    return done.stdout


def test_torchrun_pretrains(clips, tmp_path) -> None:
    said = torchrun("pretrain", tmp_path / "run", *PRETRAIN_ARGS, f"data={clips}", "updates=1")
    assert said.count("pre-trained world model") == 1


def test_torchrun_fine_tunes(tmp_path) -> None:
    options = [f"{name}={value}" for name, value in (FINETUNE | {"env_steps": 60}).items()]
    said = torchrun("finetune", tmp_path / "run", *FINETUNE_ARGS, *options)
    assert said.count("fine-tuned agent") == 1
    state = checkpoint(tmp_path / "run")
    assert (state["step"], state["model_update"]["count"]) == (60, 1 + 2)
