"""Acting in a process of its own, while the updates are made in this one."""

from __future__ import annotations

import math
import pickle
import queue
import threading
import traceback
from collections.abc import Callable
from contextlib import closing, suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import cloudpickle
import torch
from tensordict import TensorDict, TensorDictBase

from prelar_trl.envs.workers import WorkerError, settle_process, start_process
from prelar_trl.fast import accelerate
from prelar_trl.models import make_agent
from prelar_trl.modules import WorldModelPolicy
from prelar_trl.recipes.common import seed_everything
from prelar_trl.recipes.interaction import EpisodeCollector, make_training_env
from prelar_trl.recipes.learner import Learner
from prelar_trl.recipes.processes import Processes
from prelar_trl.recipes.schema import FinetuneConfig
from prelar_trl.stopwatch import Stopwatch

PATIENCE = 5.0  # seconds that the process has to end by itself


class AsyncEpisodeCollector:
    """An `EpisodeCollector` in a process of its own, on the CPU with a copy of the weights.

    ::

        here    update k      update k+1    update k+2
        there   steps of k+1  steps of k+2  steps of k+3

    It is asked for ``ahead`` steps more than are taken, and makes no others. New weights follow
    whenever it has acted with the last ones that it got; they travel in shared memory. Random
    steps, which come before all updates, are not asked for ahead.

    Args:
        make: makes the collector, in that process. Any function.
        policy: the one that is trained here.
        updates: says how many were made.
        ahead: steps that are asked for ahead.
        num_envs: environments that step together.
        watch: tells where the time goes; ``env`` is the wait for a step.

    Raises:
        WorkerError: (any method) the process has died. What is raised there is raised here.
    """

    def __init__(
        self,
        make: Callable[[], EpisodeCollector],
        policy: WorldModelPolicy,
        *,
        updates: Callable[[], int],
        ahead: int,
        num_envs: int,
        watch: Stopwatch,
    ) -> None:
        self.policy, self.num_envs, self.watch = policy, num_envs, watch
        self._make, self._updates, self._ahead = cloudpickle.dumps(make), updates, ahead
        self._process: BaseProcess | None = None
        self._answers: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._asked = 0  # questions without an answer
        self._ages: list[int] = []

    @property
    def dropped(self) -> int:
        return self._state["dropped"]

    def reset(self) -> None:
        self._start()
        self._ask("reset")
        self._answer()

    def load_state_dict(
        self, state: dict[str, Any], pending: dict[int, TensorDict]
    ) -> dict[int, str]:
        self._start()
        self._ask("load_state_dict", state, pending)
        return self._answer()

    def step(self, random: bool) -> tuple[TensorDictBase, list[dict[str, Any]]]:
        """The next step, which may be there already."""
        if not random:
            self._send_weights()
        while self._asked < (1 if random else 1 + self._ahead):
            self._ask("step", random)
        with self.watch("env"):
            step = self._answer()
        if not random:
            self._ages.append(self._updates() - self._acting)
        return step

    def state_dict(self) -> dict[str, Any]:
        """As of the last step that was taken."""
        return self._state

    def metrics(self) -> dict[str, float]:
        """``train/policy_age``: updates since the weights that acted, when their step is taken.

        The mean over the steps since the last call.
        """
        ages, self._ages = self._ages, []
        return {"train/policy_age": sum(ages) / len(ages)} if ages else {}

    def close(self) -> None:
        if self._process is None:
            return
        with suppress(OSError):
            self._send("close")
        self._process.join(PATIENCE)
        self._process.kill()
        self._process.join()
        self._connection.close()

    def _start(self) -> None:
        self._weights = {
            name: value.detach().cpu().clone().share_memory_()
            for name, value in self.policy.state_dict().items()
        }
        self._sent = self._acting = self._updates()  # versions of the weights
        self._process, self._connection = start_process(
            _collect, self._make, self._weights, self._sent, daemon=False
        )
        threading.Thread(target=self._receive, daemon=True).start()

    def _receive(self) -> None:
        """Takes answers as they come: the process would wait where the connection is full."""
        with suppress(EOFError, OSError):
            while True:
                self._answers.put(self._connection.recv_bytes())
        self._answers.put(None)

    def _send_weights(self) -> None:
        """Unless there are no new ones, or it may be reading the last."""
        if self._updates() > self._sent == self._acting:
            for name, value in self.policy.state_dict().items():
                self._weights[name].copy_(value)
            self._sent = self._updates()
            self._send("weights", self._sent)

    def _ask(self, *question: Any) -> None:
        self._asked += 1
        self._send(*question)

    def _send(self, *question: Any) -> None:
        with suppress(OSError):  # it has died, which its answer says
            self._connection.send_bytes(pickle.dumps(question))

    def _answer(self) -> Any:
        """The result of the oldest question; what is known after it is kept."""
        assert self._process is not None
        answer = self._answers.get()
        if answer is None:
            self._process.join(PATIENCE)
            raise WorkerError(f"the collecting process died (exit code {self._process.exitcode})")
        self._asked -= 1
        error, result, self._acting, state = pickle.loads(answer)
        if error is not None:
            raise error
        self._state: dict[str, Any] = state
        return result


def _collect(
    connection: Connection, make: bytes, weights: dict[str, torch.Tensor], version: int
) -> None:
    """The process: answers questions until its parent ends it."""
    settle_process()
    try:
        collector: EpisodeCollector = pickle.loads(make)()
        with closing(collector):
            collector.policy.load_state_dict(weights)
            while (question := pickle.loads(connection.recv_bytes()))[0] != "close":
                match question:
                    case ("weights", count):
                        collector.policy.load_state_dict(weights)
                        version = count
                    case (method, *arguments):
                        result = getattr(collector, method)(*arguments)
                        answer = (None, result, version, collector.state_dict())
                        connection.send_bytes(pickle.dumps(answer))
    except (EOFError, ConnectionError):
        pass
    except Exception as error:
        connection.send_bytes(_pickled(error))


def _pickled(error: Exception) -> bytes:
    """An answer that is an error, with where it came from."""
    error.add_note(traceback.format_exc())
    try:
        return cloudpickle.dumps((error, None, 0, None))
    except Exception:  # any class, and what it holds
        return pickle.dumps((WorkerError(f"{type(error).__name__}: {error}"), None, 0, None))


def collect_async(
    cfg: FinetuneConfig,
    env_factory: Any,
    known: dict[str, Any],
    policy: WorldModelPolicy,
    learner: Learner,
    processes: Processes,
    num_envs: int,
    step: int,
) -> AsyncEpisodeCollector:
    """The collector of ``collector=async``: it is ahead by the steps between two updates.

    ``step`` is where the run begins or goes on: its random actions are others each time.
    """
    seed = processes.seed(cfg.seed)

    def make() -> EpisodeCollector:
        seed_everything(seed + step)
        agent = make_agent(cfg.method, size=cfg.size, **known, **cfg.model)
        accelerate(agent.eval())
        policy = WorldModelPolicy(agent.world_model, agent.actor, noise=cfg.expl_noise)
        env = make_training_env(cfg, env_factory, seed, cfg.num_workers)
        return EpisodeCollector(env, policy, torch.device("cpu"), Stopwatch(), seed)

    processes.say(
        "collector=async: the weights that act are some updates old; neither a run nor its "
        "continuation can be repeated exactly"
    )
    stride = num_envs * cfg.action_repeat * processes.size
    return AsyncEpisodeCollector(
        make,
        policy,
        updates=lambda: learner.model_update.count + learner.aligned,
        ahead=max(1, math.ceil(cfg.train_every / stride)),
        num_envs=num_envs,
        watch=learner.watch,
    )
