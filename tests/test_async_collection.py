"""``collector=async``: a process of its own acts while the updates are made."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from prelar_trl.data import EpisodeReplay
from prelar_trl.envs import make_env
from prelar_trl.envs.episodes import begin_episode, episode_seed, repeat_episode
from prelar_trl.envs.workers import WorkerError
from prelar_trl.recipes.async_collection import AsyncEpisodeCollector
from prelar_trl.recipes.finetune import finetune
from prelar_trl.stopwatch import Stopwatch
from tests.test_signals import signals_at
from tests.toy_runs import checkpoint, finetune_config, rows

STEPS = {"size": "mini", "env_steps": 73, "log_every": 20}


class Telling:
    """Its step tells the number of the step, whether it was random, and the policy's weight."""

    def __init__(self, told: Path) -> None:
        self.policy, self.count, self.told = nn.Linear(1, 1), 0, told

    def reset(self) -> None: ...

    def step(self, random: bool) -> tuple[int, bool, float]:
        self.count += 1
        self.told.write_text(str(self.count))
        if self.count == 20:
            raise ArithmeticError("a wheel came off")
        if self.count == 30:
            os._exit(3)
        return self.count, random, self.policy.weight.item()

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int], pending: dict) -> dict:
        self.count = state["count"]
        return pending

    def close(self) -> None: ...


class Trained:
    """A policy, and the updates of it: each sets the weight to its number."""

    def __init__(self) -> None:
        self.policy, self.count = nn.Linear(1, 1), 0
        self.update(0)

    def update(self, count: int) -> None:
        nn.init.constant_(self.policy.weight, count)
        self.count = count


@pytest.fixture
def trained() -> Trained:
    return Trained()


@pytest.fixture
def collector(trained, tmp_path):
    collector = AsyncEpisodeCollector(
        partial(Telling, tmp_path / "told"),
        trained.policy,
        updates=lambda: trained.count,
        ahead=3,
        num_envs=1,
        watch=Stopwatch(),
    )
    yield collector
    collector.close()


def waited_for(path: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while path.read_text() != str(count):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_steps_are_made_ahead_and_told_of_in_their_order(collector, tmp_path):
    collector.reset()
    assert [collector.step(random=True)[:2] for _ in range(2)] == [(1, True), (2, True)]
    assert (tmp_path / "told").read_text() == "2"  # nothing to be ahead of yet
    assert collector.step(random=False)[:2] == (3, False)
    waited_for(tmp_path / "told", 6)  # without being asked
    assert collector.state_dict() == {"count": 3}  # what a checkpoint knows
    assert [collector.step(random=False)[0] for _ in range(5)] == [4, 5, 6, 7, 8]


def test_it_acts_with_new_weights_as_soon_as_the_steps_ahead_are_taken(collector, trained):
    collector.reset()
    trained.update(5)  # before the first step that is not random
    assert collector.step(random=False) == (1, False, 5.0)
    assert collector.metrics() == {"train/policy_age": 0}
    weights = []
    for count in range(6, 16):
        trained.update(count)
        weights.append(collector.step(random=False)[2])
    assert weights[:3] == [5, 5, 5]  # asked for before there were others
    assert weights == sorted(weights) and set(weights[3:]) <= set(range(6, 16))
    ages = [count - weight for count, weight in enumerate(weights, 6)]
    assert max(ages) <= 2 * 3 + 1
    assert collector.metrics() == {"train/policy_age": sum(ages) / len(ages)}
    assert collector.metrics() == {}


def test_it_goes_on_where_a_checkpoint_was_written(collector):
    assert collector.load_state_dict({"count": 7}, {0: "another frame"}) == {0: "another frame"}
    assert collector.state_dict() == {"count": 7}
    assert collector.step(random=True)[0] == 8


def test_what_is_raised_in_the_process_is_raised_here(collector):
    collector.load_state_dict({"count": 18}, {})
    assert collector.step(random=False)[0] == 19
    with pytest.raises(ArithmeticError, match="a wheel came off") as error:
        collector.step(random=False)
    assert "in step" in error.value.__notes__[0]


def test_its_death_is_told(collector):
    collector.load_state_dict({"count": 28}, {})
    assert collector.step(random=False)[0] == 29
    with pytest.raises(WorkerError, match=r"died \(exit code 3\)"):
        collector.step(random=False)


def check_replay(run: Path, seed: int, workers: int = 1) -> int:
    """Assert that every episode is one that the environment plays by its actions; how many."""
    replay = EpisodeReplay(run / "replay", window=6, capacity=1_000)
    env = make_env("toy", max_steps=10)
    seeds = [episode_seed(seed, worker, n) for worker in range(workers) for n in range(20)]
    begun = {begin_episode(env, s)["pixels"].numpy().tobytes(): s for s in seeds}
    for number in range(replay.num_episodes):
        episode = replay.episode(number)
        assert len(episode) == 11
        begun_from = begun.pop(episode["pixels"][0].numpy().tobytes())  # none a second time
        _, frames = repeat_episode(env, begun_from, episode["action"][1:])
        assert torch.equal(frames, episode["pixels"])
    count = replay.num_episodes
    replay.close()
    return count


def test_a_run_stops_and_goes_on_and_every_episode_is_whole(tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    cfg = finetune_config(run, collector="async", seed=3, **STEPS)
    with monkeypatch.context() as patch:
        signals_at(patch, 44, signal.SIGTERM)
        with pytest.raises(SystemExit, match="stopped after 44 steps"):
            finetune(cfg)
    assert "neither a run nor its continuation can be repeated exactly" in capsys.readouterr().out
    assert check_replay(run, 3) == 4
    cfg.resume = True
    finetune(cfg)
    assert check_replay(run, 3) == 7  # the fifth went on where it was
    state = checkpoint(run)
    assert (state["step"], state["collection"]["dropped"]) == (73, 0)
    assert state["model_update"]["count"] == 1 + (73 - 20) // 10
    ages = [float(row["train/policy_age"]) for row in rows(run) if row["train/policy_age"]]
    assert ages and all(0 <= age <= 3 for age in ages)


def test_a_run_with_workers_goes_on_without_them(tmp_path):
    run = tmp_path / "run"
    cfg = finetune_config(run, collector="async", num_workers=2, **STEPS | {"env_steps": 44})
    finetune(cfg)
    assert check_replay(run, 0, workers=2) == 4
    cfg = finetune_config(run, collector="sync", num_workers=2, resume=True, **STEPS)
    finetune(cfg)
    assert check_replay(run, 0, workers=2) == 6
    assert checkpoint(run)["collection"]["dropped"] == 0
