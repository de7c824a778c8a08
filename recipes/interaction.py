"""The agent in its environments: episodes collected for the replay, and evaluated."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.envs import EnvBase
from torchrl.envs.utils import step_mdp

from prelar_trl.checkpoint import kept_rng
from prelar_trl.data import EpisodeReplay
from prelar_trl.envs.episodes import begin_episode, episode_seed, repeat_episode
from prelar_trl.envs.workers import WorkerError, worker_env
from prelar_trl.models import Agent
from prelar_trl.modules import StatefulPolicy, WorldModelPolicy
from prelar_trl.recipes.common import EpisodeTracker, play, summarize
from prelar_trl.recipes.environments import build_env
from prelar_trl.recipes.schema import FinetuneConfig
from prelar_trl.recipes.signals import GROUP_SIGNALS, Interruption
from prelar_trl.record import Logger
from prelar_trl.stopwatch import Stopwatch
from prelar_trl.utils import hold_signals

EVAL_SEED = 10_000  # the evaluation environment's seed lies apart from the training one's
# Settings of fine-tuning that are make_env's.
ENV_SETTINGS = ("pixels", "camera", "cameras", "vectors", "render_quality", "action_repeat")
ENV_SETTINGS += ("max_steps", "worker_timeout", "worker_failures")


def make_training_env(
    cfg: FinetuneConfig, env_factory: Any, seed: int, num_workers: int
) -> EnvBase:
    options = {name: getattr(cfg, name) for name in ENV_SETTINGS}
    return build_env(env_factory, cfg.env, seed=seed, num_workers=num_workers, **options)


def evaluation_policy(agent: Agent, noise: float, state_mean: bool) -> WorldModelPolicy:
    """Takes the actions' mode, with ``noise``; with ``state_mean`` also that of the latents."""
    sample = agent.world_model.sample and not state_mean
    return WorldModelPolicy(
        agent.world_model, agent.actor, mode="mode", noise=noise, sample_state=sample
    )


class Collector(Protocol):
    """What `EpisodeCollector` does, here or in another process."""

    watch: Stopwatch
    num_envs: int

    @property
    def dropped(self) -> int: ...
    def reset(self) -> None: ...
    def step(self, random: bool) -> tuple[TensorDictBase, list[dict[str, Any]]]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(
        self, state: dict[str, Any], pending: dict[int, TensorDict]
    ) -> dict[int, str]: ...
    def metrics(self) -> dict[str, float]: ...
    def close(self) -> None: ...


class EpisodeCollector:
    """Steps in the training environment.

    Every episode begins from a seed of its own, so that one that is running when the run stops can
    be repeated when it goes on. Environments with a batch size that are no `WorkerEnv` cannot.

    Attributes:
        watch: tells where the time goes.
        num_envs: environments that step together.
        dropped: episodes that are lost: they could not be repeated, or their worker has failed.
    """

    def __init__(
        self,
        env: EnvBase,
        policy: WorldModelPolicy,
        device: torch.device,
        watch: Stopwatch,
        seed: int,
    ) -> None:
        self.env, self.policy = env, policy
        self.watch, self.seed = watch, seed
        self.act = StatefulPolicy(policy, device)
        self.dropped = 0
        self.num_envs = max(1, env.batch_size.numel())
        self._processes = worker_env(env)
        self._begun = [0] * self.num_envs  # episodes of each
        self._tracker = EpisodeTracker(self.num_envs)

    def reset(self) -> None:
        """The first frame of new episodes."""
        self._now = self._begin(None)

    def step(self, random: bool) -> tuple[TensorDictBase, list[dict[str, Any]]]:
        """One step of every environment, by random actions or the policy's.

        Returns:
            The step, for the replay, and a record of each episode that ended with it: return,
            success, length.
        """
        belief = self.act.belief
        with self.watch("policy"):
            if random:
                td = self.env.rand_action(self._now)
            else:
                td = self.act(self._now)
        try:
            with self.watch("env"):
                td = self.env.step(td)
                self._now = self._begin(step_mdp(td))
        except BaseException:  # no step was made: what is saved now goes on before it
            self.act.belief = belief
            raise
        if "dropped" in td["next"].keys():
            self.dropped += int(td["next", "dropped"].sum())
        return td, self._tracker.update(td["next"])

    def _begin(self, now: TensorDictBase | None) -> TensorDictBase:
        """``now`` with a new episode wherever one is over; None: everywhere."""
        over = torch.ones(self.num_envs, dtype=torch.bool)
        if now is not None:
            over = cast(torch.Tensor, now["done"]).flatten()
            if not over.any():
                return now
        begun = [count + int(it) for count, it in zip(self._begun, over, strict=True)]
        seeds = [episode_seed(self.seed, worker, n - 1) for worker, n in enumerate(begun)]
        with hold_signals(GROUP_SIGNALS):
            if not self.env.batch_size:
                first = begin_episode(self.env, seeds[0])
            elif self._processes is None:
                first = self.env.reset() if now is None else self.env.maybe_reset(now)
            else:
                if now is not None:
                    now = now.set("_reset", over.unsqueeze(-1))
                first = self.env.reset(now, seeds=seeds)
        self._begun = begun
        return first

    def state_dict(self) -> dict[str, Any]:
        belief = self.act.belief
        return {
            "now": self._now.exclude("action", "next").to_dict(),
            "belief": None if belief is None else belief.cpu().to_dict(),
            "begun": list(self._begun),
            "success": list(self._tracker.success),
            "dropped": self.dropped,
        }

    def load_state_dict(
        self, state: dict[str, Any], pending: dict[int, TensorDict]
    ) -> dict[int, str]:
        """Goes on with the running episodes, as far as they can be repeated.

        ``pending`` has, by environment, the replay's rows of the episode that runs there; none
        where no step was made. Returns why those of them are lost that are.
        """
        self.dropped = state["dropped"]
        now: TensorDict | None = None
        faults: dict[int, str | None]
        if len(state["begun"]) == self.num_envs:
            self._begun = list(state["begun"])
            self._tracker.success = list(state["success"])
            now = TensorDict(state["now"], self.env.batch_size)
            belief = state.get("belief", now.pop("belief", None))  # of older runs
            if belief is not None:
                self.act.belief = TensorDict(belief, self.env.batch_size).to(self.act.device)
            faults = {i: self._repeat(i, now, pending.get(i)) for i in range(self.num_envs)}
        else:
            self._begun = [max(state["begun"])] * self.num_envs  # no episode a second time
            faults = dict.fromkeys(pending, "another number of environments")
        lost = {worker: why for worker, why in faults.items() if why is not None}
        if now is not None:
            for worker in lost:
                self._tracker.success[worker] = False
        if now is not None and len(lost) < self.num_envs:
            now["done"].view(-1)[list(lost)] = True
            self._now = self._begin(now)
        else:
            if self.env.batch_size and self._processes is None:  # not its first episodes again
                self.env.set_seed(episode_seed(self.seed, self.num_envs, max(self._begun)))
            self._now = self._begin(None)
        lost = {worker: why for worker, why in lost.items() if worker in pending}
        self.dropped += len(lost)
        return lost

    def _repeat(self, worker: int, now: TensorDict, rows: TensorDict | None) -> str | None:
        """Bring an environment to where ``now`` was taken; returns why that is impossible.

        Args:
            rows: of the replay, of the episode that runs there; None: no step was made.
        """
        actions = torch.zeros(0) if rows is None else rows["action"][1:]
        episode = (episode_seed(self.seed, worker, self._begun[worker] - 1), actions)
        if not self.env.batch_size:
            reached, frames = repeat_episode(self.env, *episode)
        elif self._processes is None:
            return "an environment with a batch size cannot be rebuilt"
        else:
            now = cast(TensorDict, now[worker])
            try:
                reached, frames = self._processes.repeat(worker, *episode)
            except WorkerError as error:
                return f"its worker {error}"
        if rows is not None:
            differs = (frames != rows["pixels"]).flatten(1).any(1).nonzero()
            if len(differs):
                return f"repeated with the same actions, its frame {int(differs[0])} is another one"
        for key in reached.keys(True, True):
            if key in now.keys(True, True) and not torch.equal(reached[key], now[key]):
                return f"repeated with the same actions, it ends with another {key}"
        return None

    def metrics(self) -> dict[str, float]:
        """What is to be logged of the steps since the last call."""
        return {}

    def close(self) -> None:
        self.env.close(raise_if_closed=False)


@dataclass
class Collection:
    """Steps in the training environment, which end in the replay."""

    collector: Collector
    replay: EpisodeReplay

    def reset(self) -> None:
        self.collector.reset()

    def step(self, random: bool) -> list[dict[str, Any]]:
        """As the collector's: the records of the episodes that ended."""
        td, ended = self.collector.step(random)
        with self.collector.watch("replay"):
            self.replay.add(td)
        return ended

    def sample(self) -> TensorDictBase:
        """A batch of the replay's windows, ``[batch_size, batch_length]``."""
        with self.collector.watch("replay"):
            return self.replay.sample()

    def state_dict(self) -> dict[str, Any]:
        """The replay with the running episodes, and what the collector knows now."""
        replay = self.replay.state_dict()
        pending = {worker: rows.to_dict() for worker, rows in replay["pending"].items()}
        return {"replay": replay | {"pending": pending}, "collection": self.collector.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on with the running episodes, as far as they can be repeated."""
        pending = {
            worker: TensorDict(rows, [len(rows["pixels"])])
            for worker, rows in state["replay"]["pending"].items()
        }
        self.replay.load_state_dict(state["replay"] | {"pending": pending})
        lost = self.collector.load_state_dict(state["collection"], pending)
        for worker, why in lost.items():
            self.replay.drop(worker)
            print(
                f"warning: the running episode of environment {worker} "
                f"({len(pending[worker]) - 1} steps) is dropped: {why}",
                file=sys.stderr,
            )

    def close(self) -> None:
        self.replay.close()
        self.collector.close()


@dataclass
class Evaluation:
    """Episodes with the policy's mode, from the same initial states each time.

    Its environment is made by the first one and kept: to start processes takes seconds.
    """

    cfg: FinetuneConfig
    env_factory: Any
    agent: Agent
    device: torch.device
    interruption: Interruption
    cut_off: bool = False  # an interruption has cut the last one off: nothing was logged

    def __post_init__(self) -> None:
        noise, state_mean = self.cfg.eval_noise, self.cfg.eval_state_mean
        self.policy = evaluation_policy(self.agent, noise, state_mean)
        self._env: EnvBase | None = None

    def __call__(self, logger: Logger, step: int) -> list[float] | None:
        """Evaluate and log; success and return, or None if there was no whole evaluation."""
        cfg, seed = self.cfg, self.cfg.seed + EVAL_SEED
        if not cfg.eval_episodes:
            return None
        if self._env is None:
            workers = min(cfg.num_workers, cfg.eval_episodes)
            with kept_rng():  # so that the first evaluation draws as a later one would
                self._env = make_training_env(cfg, self.env_factory, seed, workers)
        env = self._env
        with kept_rng():  # the training's
            with hold_signals(GROUP_SIGNALS):
                env.set_seed(seed)
            act = StatefulPolicy(self.policy, self.device)
            records, films = play(
                env, act, cfg.eval_episodes, stopped=lambda: self.interruption.requested
            )
        self.cut_off = len(records) < cfg.eval_episodes
        if self.cut_off:
            return None
        total = summarize(records)
        logger.log({f"eval/{name}": value for name, value in total.items()}, step)
        logger.log_video("eval", films[0], step, fps=30)
        return [total["success"], total["return"]]

    def close(self) -> None:
        if self._env is not None:
            self._env.close(raise_if_closed=False)
