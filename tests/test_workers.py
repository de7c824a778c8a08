"""Environments in processes of their own: the same as in this one, and replaced when they fail."""

from __future__ import annotations

import os
import re
import signal
import time
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection

import cloudpickle
import pytest
import torch
from tensordict import TensorDict

from prelar_trl.data import EpisodeReplay
from prelar_trl.envs import ToyEnv, make_env, workers
from prelar_trl.envs.episodes import begin_episode, repeat_episode
from prelar_trl.envs.workers import WorkerEnv, WorkerError
from prelar_trl.modules import WorldModelPolicy
from prelar_trl.recipes.finetune import finetune
from prelar_trl.recipes.interaction import EpisodeCollector
from prelar_trl.stopwatch import Stopwatch
from tests.test_resume import STEPS, same, stopped
from tests.tiny import tiny_agent
from tests.toy_runs import checkpoint, finetune_config, rows

DIE, HANG, RAISE, GOOD, STALL = 0.125, 0.25, 0.375, 0.5, 0.625  # what the first action does


def sent_in_part(connection, answer):
    os.write(connection.fileno(), answer[:20])
    time.sleep(1_000)


class Fragile(ToyEnv):
    """Fails when it is told to."""

    def _step(self, tensordict):
        told = float(tensordict["action"][0])
        if told == DIE:
            os._exit(3)
        if told == HANG:
            time.sleep(1_000)
        if told == STALL:
            Connection._send = sent_in_part
        if told == RAISE:
            raise ArithmeticError("a wheel came off")
        return super()._step(tensordict)


def fragile(seed=0):
    return make_env(Fragile, seed=seed, pixels=8, max_steps=3)


@pytest.fixture(scope="module")
def env():
    env = WorkerEnv(fragile, 2, timeout=3.0)
    yield env
    env.close()


def act(env, now, *told):
    actions = torch.full((2, 2), GOOD)
    actions[:, 0] = torch.tensor(told)
    return env.step_and_maybe_reset(now.set("action", actions))


def test_workers_play_the_episodes_that_one_process_plays(env):
    now, alone = env.reset(seeds=[5, 6]), begin_episode(fragile(), 6)
    assert torch.equal(now["pixels"][1], alone["pixels"]) and not now["dropped"].any()
    td, now = act(env, now, GOOD, 0.75)
    reached, frames = repeat_episode(fragile(), 6, torch.tensor([[0.75, GOOD]]))
    assert torch.equal(td["next", "pixels"][1], frames[1])
    repeated, again = env.repeat(0, 6, torch.tensor([[0.75, GOOD]]))
    assert torch.equal(again, frames) and torch.equal(repeated["state"], reached["state"])


@pytest.mark.parametrize(
    ("told", "said"),
    [
        (DIE, r"worker 1 .* died \(exit code 3\)"),
        (HANG, "worker 1 .* gave no answer for 3 s"),
        (STALL, "worker 1 .* gave no answer for 3 s"),
        (RAISE, "worker 1 .* raised ArithmeticError: a wheel came off"),
    ],
)
def test_a_worker_that_fails_is_replaced_and_its_episode_dropped(env, told, said, caplog, tmp_path):
    before, now = env.failures, env.reset(seeds=[5, 6])
    replay = EpisodeReplay(tmp_path, window=2, capacity=100)
    begin = time.monotonic()
    for each in (GOOD, told, GOOD, GOOD, GOOD):
        td, now = act(env, now, GOOD, each)
        replay.add(td)
        assert td["next", "dropped"].flatten().tolist() == [False, each == told]
    assert time.monotonic() - begin < 60
    assert env.failures == before + 1
    assert caplog.text.count("it is replaced, its episode dropped") == 1
    assert re.search(said, caplog.text)
    # two steps are lost; the other worker's episode, and the next one here, are whole
    assert replay.num_episodes == 2 and replay.num_frames == 8


def test_a_worker_that_takes_no_question_is_replaced(env):
    os.kill(env._workers[1].process.pid, signal.SIGSTOP)
    with pytest.raises(WorkerError, match=r"gave no answer for \d s"):
        env.repeat(1, 6, torch.zeros(200_000, 2))


def test_a_worker_that_has_died_gets_the_seed_too(env):
    os.kill(env._workers[1].process.pid, signal.SIGKILL)
    env.set_seed(7)
    assert torch.equal(env.reset()["pixels"][1], fragile(seed=8).reset()["pixels"])


def test_a_worker_whose_parent_has_given_up_ends_without_a_word(monkeypatch, caplog):
    monkeypatch.setattr(workers, "settle_process", lambda: None)
    ours, theirs = Pipe()
    ours.close()
    workers._work(theirs, cloudpickle.dumps(fragile), 0)
    assert not caplog.text


def test_a_worker_that_fails_again_and_again_is_an_error(env):
    now = env.reset()
    with pytest.raises(WorkerError, match="worker 0 has failed 5 times in a row.*exit code 3"):
        for _ in range(6):
            _, now = act(env, now, DIE, GOOD)


def test_an_environment_that_cannot_be_made_says_why():
    with pytest.raises(WorkerError, match="could not be made.*ZeroDivisionError"):
        WorkerEnv(lambda seed: 1 / 0, 2)


class DiesOnce(ToyEnv):
    """The first of its kind ends in its 20th step."""

    def __init__(self, flag):
        super().__init__()
        self.flag, self.count = flag, 0

    def _step(self, tensordict):
        self.count += 1
        if self.count == 20:
            with suppress(FileExistsError):
                self.flag.touch(exist_ok=False)  # two workers may come here at once
                os._exit(9)
        return super()._step(tensordict)


def test_finetuning_goes_on_without_the_episode_of_a_worker_that_died(tmp_path):
    cfg = finetune_config(tmp_path / "run", **STEPS, num_workers=2)
    finetune(cfg, env_factory=lambda: DiesOnce(tmp_path / "died"))
    assert checkpoint(cfg.run)["collection"]["dropped"] == 1
    table = rows(tmp_path / "run")
    assert [row["train/dropped"] for row in table if row["train/dropped"]] == ["1.0"]
    assert {row["train/length"] for row in table} == {"", "13.0"}


class Dies(ToyEnv):
    def _step(self, tensordict):
        os._exit(9)


def test_finetuning_stops_saved_when_workers_fail_again_and_again(tmp_path):
    cfg = finetune_config(tmp_path / "run", **STEPS, num_workers=2, worker_failures=2)
    with pytest.raises(WorkerError, match="2 times in a row.*the run is saved, resume=auto"):
        finetune(cfg, env_factory=lambda: Dies())
    assert checkpoint(cfg.run)["step"] < 15


def test_what_is_saved_when_a_step_fails_lies_before_it(monkeypatch):
    env = make_env("toy")
    agent = tiny_agent("dreamerv2").eval()
    policy = WorldModelPolicy(agent.world_model, agent.actor)
    collector = EpisodeCollector(env, policy, torch.device("cpu"), Stopwatch(), seed=0)
    collector.reset()
    collector.step(random=False)
    before = collector.state_dict()
    monkeypatch.setattr(env, "step", lambda td: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        collector.step(random=False)
    after = collector.state_dict()
    for name in ("now", "belief"):
        assert (TensorDict(before[name]) == TensorDict(after[name])).all(), name


@pytest.mark.slow
def test_interrupted_finetuning_with_workers_goes_on_bit_for_bit(tmp_path, monkeypatch):
    options = STEPS | {"num_workers": 2, "eval_episodes": 2, "env_steps": 100}
    finetune(finetune_config(tmp_path / "whole", **options))
    cfg = finetune_config(tmp_path / "run", **options)
    stopped(cfg, monkeypatch, 6)
    finetune(cfg)
    same(tmp_path / "run", tmp_path / "whole")
