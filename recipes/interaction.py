"""The agent in its environments: episodes collected for the replay, and evaluated."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from tensordict import TensorDictBase
from torchrl.envs import EnvBase

from prelar_trl.data import EpisodeReplay
from prelar_trl.models import Agent
from prelar_trl.modules import WorldModelPolicy
from prelar_trl.recipes.common import (
    EpisodeTracker,
    Interruption,
    ignore_sigint,
    play,
    summarize,
)
from prelar_trl.recipes.environments import build_env
from prelar_trl.recipes.schema import FinetuneConfig
from prelar_trl.record import Logger
from prelar_trl.stopwatch import Stopwatch

EVAL_SEED = 10_000  # the evaluation environment's seed lies apart from the training one's


def make_training_env(
    cfg: FinetuneConfig, env_factory: Any, seed: int, num_workers: int
) -> EnvBase:
    return build_env(
        env_factory,
        cfg.env,
        seed=seed,
        pixels=cfg.pixels,
        camera=cfg.camera,
        cameras=cfg.cameras,
        vectors=cfg.vectors,
        render_quality=cfg.render_quality,
        action_repeat=cfg.action_repeat,
        max_steps=cfg.max_steps,
        num_workers=num_workers,
    )


def act(policy: WorldModelPolicy, td: TensorDictBase, device: torch.device) -> TensorDictBase:
    """The policy's action, computed on its device."""
    out = policy(td.select(*policy.in_keys).to(device))
    return td.update(out.select(*policy.out_keys).to("cpu"))


def evaluation_policy(agent: Agent, noise: float, state_mean: bool) -> WorldModelPolicy:
    """Takes the actions' mode, with ``noise``; with ``state_mean`` also that of the latents."""
    sample = agent.world_model.sample and not state_mean
    return WorldModelPolicy(
        agent.world_model, agent.actor, mode="mode", noise=noise, sample_state=sample
    )


class Collection:
    """Steps in the training environment, which end in the replay."""

    def __init__(
        self,
        env: EnvBase,
        policy: WorldModelPolicy,
        replay: EpisodeReplay,
        device: torch.device,
        watch: Stopwatch,
    ) -> None:
        self.env, self.policy, self.replay = env, policy, replay
        self.device, self.watch = device, watch

    def reset(self) -> None:
        """The first frame of new episodes."""
        with ignore_sigint():
            self._now = self.env.reset()
        self._tracker = EpisodeTracker(self._now.numel())

    def step(self, random: bool) -> list[dict[str, Any]]:
        """One step of every environment, by random actions or the policy's.

        Returns:
            A record of each episode that ended: return, success, length.
        """
        with self.watch("policy"):
            if random:
                td = self.env.rand_action(self._now)
            else:
                td = act(self.policy, self._now, self.device)
        with self.watch("env"):
            td, self._now = self.env.step_and_maybe_reset(td)
        with self.watch("replay"):
            self.replay.add(td.exclude("belief", ("next", "belief")))
        return self._tracker.update(td["next"])

    def sample(self) -> TensorDictBase:
        """A batch of the replay's windows, ``[batch_size, batch_length]``."""
        with self.watch("replay"):
            return self.replay.sample()

    def state_dict(self) -> dict[str, Any]:
        replay = self.replay.state_dict()
        replay.pop("pending")  # the simulator cannot be saved: an episode starts anew
        return {"replay": replay}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.replay.load_state_dict({**state["replay"], "pending": {}})

    def close(self) -> None:
        self.replay.close()
        self.env.close(raise_if_closed=False)


class Evaluation:
    """Episodes with the policy's mode, from the same initial states each time.

    Its environment is made by the first one and kept: to start processes takes seconds.
    """

    def __init__(
        self,
        cfg: FinetuneConfig,
        env_factory: Any,
        agent: Agent,
        device: torch.device,
        interruption: Interruption,
    ) -> None:
        self.cfg, self.env_factory, self.device = cfg, env_factory, device
        self.interruption = interruption
        self.last: int | None = None  # the step of the last whole evaluation
        self.cut_off = False  # an interruption has cut the last one off: nothing was logged
        self.policy = evaluation_policy(agent, cfg.eval_noise, cfg.eval_state_mean)
        self._env: EnvBase | None = None

    def __call__(self, logger: Logger, step: int) -> list[float] | None:
        """Evaluate and log; success and return, or None if there was no whole evaluation."""
        cfg, device, seed = self.cfg, self.device, self.cfg.seed + EVAL_SEED
        if not cfg.eval_episodes:
            return None
        env = self._env = self._make_env(seed) if self._env is None else self._env
        with ignore_sigint():
            env.set_seed(seed)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            policy = partial(act, self.policy, device=device)
            stopped = partial(getattr, self.interruption, "requested")
            records, films = play(env, policy, cfg.eval_episodes, stopped=stopped)
        self.cut_off = len(records) < cfg.eval_episodes
        if self.cut_off:
            return None
        self.last = step
        total = summarize(records)
        logger.log({f"eval/{name}": value for name, value in total.items()}, step)
        logger.log_video("eval", films[0], step, fps=30)
        return [total["success"], total["return"]]

    def _make_env(self, seed: int) -> EnvBase:
        workers = min(self.cfg.num_workers, self.cfg.eval_episodes)
        env = make_training_env(self.cfg, self.env_factory, seed, workers)
        return env.append_transform(self.policy.make_primer())

    def close(self) -> None:
        if self._env is not None:
            self._env.close(raise_if_closed=False)
