"""TorchRL's collectors fill the replay, whatever way their data come."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.collectors import Collector, MultiAsyncCollector, MultiSyncCollector
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs import EnvBase, SerialEnv

from prelar_trl.data import EpisodeReplay
from prelar_trl.envs import make_env
from prelar_trl.modules import WorldModelPolicy
from tests.tiny import tiny_agent


class Counter(EnvBase):
    """Its picture tells the step, the environment and the episode; episodes of 4, 5, 4, 5, ..."""

    def __init__(self, number: int = 0) -> None:
        super().__init__()
        self.number, self.episode, self.count = number, 0, 0
        self.observation_spec = Composite(
            pixels=Bounded(0, 255, torch.Size([3, 8, 8]), dtype=torch.uint8)
        )
        self.action_spec = Bounded(-1, 1, torch.Size([1]))
        self.reward_spec = Unbounded(torch.Size([1]))

    def _picture(self) -> torch.Tensor:
        told = torch.tensor([self.count, self.number, self.episode], dtype=torch.uint8)
        return told[:, None, None].expand(3, 8, 8).clone()

    def _reset(self, tensordict: TensorDictBase | None, **kwargs: Any) -> TensorDict:
        self.count, self.episode = 0, self.episode + 1
        return TensorDict({"pixels": self._picture()})

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        self.count += 1
        done = torch.tensor([self.count == 4 + self.episode % 2])
        reward = torch.tensor([float(self.count)])
        return TensorDict(
            {"pixels": self._picture(), "reward": reward, "done": done, "terminated": done.clone()}
        )

    def _set_seed(self, seed: int | None) -> None:
        pass


class Telling(TensorDictModuleBase):
    """A policy whose action tells the step."""

    in_keys, out_keys = ["pixels"], ["action"]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        step = tensordict["pixels"][..., 0, 0, 0].unsqueeze(-1)
        return tensordict.set("action", step / 10)


ENVS = [partial(Counter, 0), partial(Counter, 1)]
COLLECTORS = {
    "one": partial(Collector, Counter),
    "batched": partial(Collector, partial(SerialEnv, 2, ENVS)),
    "sync": partial(MultiSyncCollector, ENVS, cat_results="stack"),
    "async": partial(MultiAsyncCollector, ENVS),
}


@pytest.mark.parametrize("kind", COLLECTORS)
def test_every_collector_fills_the_replay(kind: str, tmp_path: Path) -> None:
    replay = EpisodeReplay(tmp_path, window=3, batch_size=4)
    collector = COLLECTORS[kind](policy=Telling(), frames_per_batch=14, total_frames=84)
    for data in collector:
        replay.extend(data)
    collector.shutdown()
    environments = check_episodes(replay)
    assert environments == ({0} if kind == "one" else {0, 1})
    if kind != "async":  # whose workers may share the steps unevenly
        assert replay.num_episodes == 18  # of 4.5 steps on the average
    assert replay.sample().shape == (4, 3)


def check_episodes(replay: EpisodeReplay) -> set[int]:
    """Assert that each episode is whole, in order and of one environment; the environments."""
    environments = set()
    for number in range(replay.num_episodes):
        episode = replay.episode(number)
        count, environment, lap = episode["pixels"][:, :, 0, 0].unbind(1)
        length = 4 + int(lap[0]) % 2
        assert count.tolist() == list(range(length + 1))
        assert len(environment.unique()) == len(lap.unique()) == 1
        assert episode["reward"].squeeze(-1).tolist() == list(range(length + 1))
        led = [0.0, *(t / 10 for t in range(length))]
        torch.testing.assert_close(episode["action"].squeeze(-1), torch.tensor(led))
        assert episode["terminated"].squeeze(-1).tolist() == [False] * length + [True]
        environments.add(int(environment[0]))
    return environments


def test_parts_that_are_joined_in_time_are_told_apart_by_their_trajectories(tmp_path: Path) -> None:
    replay = EpisodeReplay(tmp_path, window=3)
    collector = COLLECTORS["batched"](policy=Telling(), frames_per_batch=14, total_frames=84)
    for data in collector:  # [2, 7], as MultiSyncCollector(cat_results=-1) joins them: [14]
        replay.extend(torch.cat(list(data.unbind(0)), -1))
    collector.shutdown()
    assert check_episodes(replay) == {0, 1}
    assert replay.num_episodes == 18


def test_padded_trajectories_are_refused(tmp_path: Path) -> None:
    replay = EpisodeReplay(tmp_path, window=3)
    collector = Collector(
        Counter, policy=Telling(), frames_per_batch=14, total_frames=14, split_trajs=True
    )
    data = next(iter(collector))
    collector.shutdown()
    with pytest.raises(ValueError, match="split_trajs=False"):
        replay.extend(data)


def test_an_agent_collects_for_the_replay_it_learns_from(tmp_path: Path) -> None:
    agent = tiny_agent("dreamerv2")
    policy = WorldModelPolicy(agent.world_model.eval(), agent.actor)
    env = make_env("toy", max_steps=6).append_transform(policy.make_primer())
    replay = EpisodeReplay(tmp_path, window=4, batch_size=2)
    collector = Collector(env, policy, frames_per_batch=12, total_frames=36)
    for data in collector:
        replay.extend(data)
        batch = replay.sample()
        assert batch["pixels"].shape == (2, 4, 3, 64, 64)
    collector.shutdown()
    assert replay.num_episodes == 6
    led = replay.episode(5)["action"]
    assert not led[0].any() and led[1:].abs().min() > 0
