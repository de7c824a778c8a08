"""`WorkerEnv`: environments in processes of their own, which may die or hang."""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import os
import pickle
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, cast

import cloudpickle
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Binary
from torchrl.envs import EnvBase, TransformedEnv
from torchrl.envs.utils import step_mdp

from prelar_trl.envs.episodes import begin_episode, repeat_episode
from prelar_trl.utils import end_with_parent, hold_signals

logger = logging.getLogger(__name__)

START_SECONDS = 600.0  # imports, and what an environment loads, on a busy machine
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class WorkerError(RuntimeError):
    """A worker has failed; the message says how."""


class WorkerEnv(EnvBase):
    """N environments of one kind, each in its own process; batch size [N].

    A worker that dies, raises an error or gives no answer in time is replaced. Its episode ends
    there, and the step says so: ``dropped``, bool [N, 1], beside ``done`` and ``truncated``; the
    other entries of that step are zero there. What has failed is logged as a warning.

    Signals that ask the program to stop do not reach the workers: they end with their parent.

    Args:
        make: makes one environment without batch size: ``make(seed=...)``. Any function; it is
            called in the workers.
        num_workers: N.
        seed: worker ``i`` gets ``seed + i``, one that replaces it a seed of its own.
        timeout: seconds after which a worker without an answer, or stuck in one, hangs.
        max_failures: so many of one worker, without an episode that ends between them, are an
            error.

    Attributes:
        failures: how many there were.

    Raises:
        WorkerError: a worker does not start, or (any method) has failed ``max_failures`` times.
    """

    def __init__(
        self,
        make: Callable[..., EnvBase],
        num_workers: int,
        *,
        seed: int = 0,
        timeout: float = 120.0,
        max_failures: int = 5,
    ) -> None:
        super().__init__(device="cpu", batch_size=torch.Size([num_workers]))
        self._make, self._seed = cloudpickle.dumps(make), seed
        self._timeout, self._max_failures = timeout, max_failures
        self.failures = 0
        self._in_a_row = [0] * num_workers
        self._workers = [self._start(seed + i) for i in range(num_workers)]
        # They ignore what multiprocessing sends at the program's end, and that would be waited for.
        self._at_exit = partial(_end, self._workers)
        atexit.register(self._at_exit)
        try:
            specs = [worker.answer(START_SECONDS) for worker in self._workers][0]
        except WorkerError as error:
            _end(self._workers)
            raise WorkerError(
                f"an environment could not be made in its process: it {error}"
            ) from None
        for name, spec in specs.items():
            setattr(self, name, spec.expand(num_workers, *spec.shape))
        self._blank = TensorDict(
            {**self.observation_spec.zero(), **self.full_done_spec.zero()}, [num_workers]
        )
        # Of a step whose worker has failed.
        self._lost = self._blank.clone().update(self.full_reward_spec.zero())
        for key in {*self.done_keys, "dropped"} - {"terminated"}:
            self._lost[key] = torch.ones(num_workers, 1, dtype=torch.bool)

    def repeat(self, worker: int, seed: int, actions: Tensor) -> tuple[TensorDictBase, Tensor]:
        """As `repeat_episode`, in one worker.

        Raises:
            WorkerError: the worker has failed and was replaced.
        """
        seconds = self._timeout * (1 + len(actions))
        found, failed = self._ask({worker: ("repeat", seed, actions)}, seconds)
        if failed:
            raise WorkerError(failed[worker])
        return found[worker]

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        actions = tensordict["action"].unbind(0)
        found, failed = self._ask({i: ("step", action) for i, action in enumerate(actions)})
        for worker, step in found.items():
            if bool(step["done"]):
                self._in_a_row[worker] = 0
        found |= {worker: self._lost[worker] for worker in failed}
        return cast(TensorDictBase, torch.stack([found[i] for i in range(len(actions))]))

    def _reset(
        self,
        tensordict: TensorDictBase | None = None,
        *,
        seeds: Sequence[int] | None = None,
        **_: Any,
    ) -> TensorDictBase:
        """Begin episodes.

        Args:
            tensordict: ``_reset``, bool [N, 1], says which begin an episode. Default: all.
            seeds: of each worker's episode, see `begin_episode`. Default: what comes next.
        """
        chosen = [True] * len(self._workers)
        if tensordict is not None and "_reset" in tensordict.keys():
            chosen = cast(Tensor, tensordict["_reset"]).flatten().tolist()
        todo = {
            i: ("reset", None if seeds is None else seeds[i]) for i, it in enumerate(chosen) if it
        }
        found = self._ask_until_all_answer(todo)  # no episode is over before it began
        begun: list[Any] = [found.get(i, self._blank[i]) for i in range(len(chosen))]
        return cast(TensorDictBase, torch.stack(begun))

    def _set_seed(self, seed: int | None) -> None:
        self._seed = 0 if seed is None else seed
        seeds = range(self._seed, self._seed + len(self._workers))
        self._ask_until_all_answer({i: ("seed", it) for i, it in enumerate(seeds)})

    def _ask_until_all_answer(self, todo: dict[int, tuple[Any, ...]]) -> dict[int, Any]:
        """The answers to questions by worker; again, where one has failed and was replaced."""
        found: dict[int, Any] = {}
        while todo:
            answers, failed = self._ask(todo)
            found |= answers
            todo = {worker: todo[worker] for worker in failed}
        return found

    def _ask(
        self, questions: dict[int, tuple[Any, ...]], seconds: float | None = None
    ) -> tuple[dict[int, Any], dict[int, str]]:
        """The answers to questions by worker, and of those that have failed and were replaced, why.

        A worker hangs after ``seconds``. Default: the timeout.
        """
        failed: dict[int, str] = {}
        for worker, question in questions.items():
            try:
                self._workers[worker].send(*question)
            except WorkerError as error:
                failed[worker] = str(error)
        found: dict[int, Any] = {}
        deadline = time.monotonic() + (seconds or self._timeout)
        for worker in questions.keys() - failed.keys():
            try:
                found[worker] = self._workers[worker].answer(deadline - time.monotonic())
            except WorkerError as error:
                failed[worker] = str(error)
        for worker, why in failed.items():
            self._replace(worker, why, in_episode=questions[worker][0] == "step")
        return found, failed

    def _start(self, seed: int) -> _Worker:
        return _Worker(self._make, seed, self._timeout)

    def _replace(self, worker: int, why: str, *, in_episode: bool) -> None:
        """A new process for a worker that has failed."""
        old = self._workers[worker]
        self.failures += 1
        self._in_a_row[worker] += 1
        loss = ", its episode dropped" if in_episode else ""
        logger.warning(
            "worker %d (process %s) %s: it is replaced%s", worker, old.process.pid, why, loss
        )
        old.kill()
        if self._in_a_row[worker] >= self._max_failures:
            raise WorkerError(
                f"worker {worker} has failed {self._in_a_row[worker]} times in a row; the last "
                f"time it {why}"
            )
        seed = self._seed + worker + self.failures * len(self._workers)
        self._workers[worker] = self._start(seed)
        try:
            self._workers[worker].answer(START_SECONDS)
        except WorkerError as error:
            self._replace(worker, f"{error}, at its start", in_episode=False)

    def close(self, *, raise_if_closed: bool = True) -> None:
        """Ends the workers."""
        atexit.unregister(self._at_exit)
        _end(self._workers)
        super().close(raise_if_closed=raise_if_closed)


def worker_env(env: EnvBase) -> WorkerEnv | None:
    """The `WorkerEnv` under the transforms of an environment, if it is one."""
    while isinstance(env, TransformedEnv):
        env = env.base_env
    return env if isinstance(env, WorkerEnv) else None


def start_process(
    target: Callable[..., None], *args: Any, daemon: bool = True
) -> tuple[BaseProcess, Connection]:
    """A process, and the connection to it, whose other end is the first argument of ``target``.

    ``target`` calls `settle_process` first. One that is no daemon may start processes itself, and
    ends only when the connection is closed.
    """
    # Threads and OpenGL do not survive a fork: it is one of a process that has only imported.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", __name__])
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs, *args), daemon=daemon)
    with hold_signals(SIGNALS):  # it gets none of them until it ignores them
        process.start()
    theirs.close()
    return process, ours


def settle_process() -> None:
    """In a process of `start_process`: signals to stop are its parent's, with which it ends."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()
    torch.set_num_threads(1)


def _end(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.connection.close()  # it ends by itself when it reads that
    deadline = time.monotonic() + 5.0  # of all together, however many hang
    for worker in workers:
        worker.kill(patience=max(0.0, deadline - time.monotonic()))
    workers.clear()


class _Worker:
    """The parent's side of one process.

    Args:
        make, seed: of its environment.
        timeout: seconds that the process may stall within a question or an answer.
    """

    def __init__(self, make: bytes, seed: int, timeout: float) -> None:
        self.process, self.connection = start_process(_work, make, seed)
        limit = struct.pack("ll", *divmod(int(timeout * 1e6), 1_000_000))
        with socket.socket(fileno=os.dup(self.connection.fileno())) as end:
            for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                end.setsockopt(socket.SOL_SOCKET, option, limit)

    def send(self, *question: Any) -> None:
        with self._failures():
            self.connection.send_bytes(pickle.dumps(question))

    def answer(self, seconds: float) -> Any:
        """What it gives within that time."""
        with self._failures():
            if not self.connection.poll(max(0.0, seconds)):
                raise BlockingIOError
            error, answer = pickle.loads(self.connection.recv_bytes())
        if error is not None:
            raise WorkerError(f"raised {error}")
        return answer

    @contextmanager
    def _failures(self) -> Iterator[None]:
        begin = time.monotonic()
        try:
            yield
        except BlockingIOError:
            seconds = time.monotonic() - begin
            raise WorkerError(f"gave no answer for {seconds:.0f} s") from None
        except (EOFError, OSError):
            raise WorkerError(self._death()) from None

    def _death(self) -> str:
        self.process.join(5.0)
        return f"died (exit code {self.process.exitcode})"

    def kill(self, patience: float = 0.0) -> None:
        """Ends it, at once or after that many seconds."""
        self.connection.close()
        self.process.join(patience)
        self.process.kill()
        self.process.join()


def _work(connection: Connection, make: bytes, seed: int) -> None:
    """The process: answers questions until its parent closes the connection."""
    settle_process()
    env: EnvBase | None = None
    try:
        made: EnvBase = pickle.loads(make)(seed=seed)
        env, told = made, (None, _specs(made))
    except Exception as problem:
        told = _described(problem), None
    now: TensorDictBase = TensorDict()
    with suppress(EOFError, OSError):  # the parent has ended, or has given up
        connection.send_bytes(pickle.dumps(told))
        while env is not None:
            question = pickle.loads(connection.recv_bytes())
            error, answer = None, None
            try:
                match question:
                    case ("seed", number):
                        env.set_seed(number)
                    case ("reset", number):
                        now = env.reset() if number is None else begin_episode(env, number)
                        answer = _observed(env, now)
                    case ("step", action):
                        step = env.step(now.set("action", action))
                        now, answer = step_mdp(step), _observed(env, step["next"])
                    case ("repeat", number, actions):
                        now, frames = repeat_episode(env, number, actions)
                        answer = _observed(env, now), frames
            except Exception as problem:
                error = _described(problem)
            connection.send_bytes(pickle.dumps((error, answer)))
    if env is not None:
        env.close(raise_if_closed=False)


def _described(problem: Exception) -> str:
    """An error in one line; where it came from is logged."""
    logger.exception("an environment has raised an error")
    return " ".join(f"{type(problem).__name__}: {problem}".split())


def _specs(env: EnvBase) -> dict[str, Any]:
    observation = env.observation_spec.clone()
    observation["dropped"] = Binary(1, torch.Size([1]), dtype=torch.bool)
    return {
        "observation_spec": observation,
        "action_spec": env.action_spec,
        "reward_spec": env.reward_spec,
        "done_spec": env.full_done_spec,
    }


def _observed(env: EnvBase, now: TensorDictBase) -> TensorDictBase:
    """What the parent is told."""
    keys = [*env.observation_spec.keys(True, True), *env.reward_keys, *env.done_keys]
    told = now.select(*keys, strict=False).clone()
    return told.set("dropped", torch.zeros(1, dtype=torch.bool))
