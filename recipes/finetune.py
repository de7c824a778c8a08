"""Fine-tune a world model with real actions, and learn to act in it. Also from scratch.

python recipes/finetune.py env=metaworld/drawer-open pretrained=runs/pretrain run=runs/finetune
torchrun --nproc-per-node=4 recipes/finetune.py ...
"""

from __future__ import annotations

import sys

from prelar_trl.recipes.entry import start

if __name__ == "__main__":  # before the imports that take seconds
    sys.exit(start("finetune"))

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from prelar_trl.checkpoint import save_checkpoint
from prelar_trl.checkpoint_files import BEST
from prelar_trl.envs import make_env
from prelar_trl.envs.workers import WorkerError
from prelar_trl.modules import WorldModelPolicy
from prelar_trl.recipes.async_collection import collect_async
from prelar_trl.recipes.common import (
    choose_device,
    chosen_loggers,
    drop_unweighted,
    note_continuation,
    open_logger,
    open_run,
    progress_metrics,
    seed_everything,
)
from prelar_trl.recipes.environments import interface
from prelar_trl.recipes.finetune_state import FinetuneState
from prelar_trl.recipes.guard import UpdateGuard
from prelar_trl.recipes.interaction import (
    Collection,
    EpisodeCollector,
    Evaluation,
    make_training_env,
)
from prelar_trl.recipes.learner import make_learner
from prelar_trl.recipes.processes import ALONE, Processes, joined
from prelar_trl.recipes.replays import open_replay, replay_bytes
from prelar_trl.recipes.resume import settle_preset, settle_resume
from prelar_trl.recipes.schema import FinetuneConfig
from prelar_trl.recipes.signals import Interruption
from prelar_trl.record import Logger, Progress, RunFolder
from prelar_trl.stopwatch import Stopwatch
from prelar_trl.types import Backend


def finetune(
    cfg: FinetuneConfig,
    env_factory: Any = make_env,
    watch: Stopwatch | None = None,
    processes: Processes = ALONE,
) -> None:
    """The whole run: environment, agent, loop.

    Several processes share each batch; each has environments and a replay of its own. All count
    the steps of all.

    ``env_factory`` is any function that makes an environment of TorchRL or gymnasium, such as
    ``lambda: MyEnv()``, or takes make_env's arguments (`build_env` says which it gets). ``watch``
    tells where the time goes. In a thread other than the main one Ctrl-C is not handled.
    """
    check(cfg)
    cfg, restart = settle_resume(cfg)
    cfg = settle_preset(cfg, restart)
    watch = watch or Stopwatch()
    loggers = chosen_loggers(cfg.logger)
    state, run, checkpoint = build(cfg, env_factory, watch, processes, restart)
    if checkpoint is not None and state.is_finished(checkpoint):
        done = f"its {checkpoint['step']} steps already; raise env_steps to continue"
        processes.say(f"finished: {run.path} has {done}")
        state.collection.close()
        return
    learner, collection = state.learner, state.collection
    with opened(state, run, checkpoint, loggers, env_factory) as session:
        logger, guard = session.logger, session.guard
        if state.evaluation_due:
            session.evaluate()
        while state.step < cfg.env_steps or state.training_due:
            if not state.training_due:
                if session.stopping():
                    break
                ended = collection.step(random=state.step < cfg.prefill)
                state.advance()
                session.log_episodes(ended)
            state.check_episodes()
            if state.can_train:
                while learner.unaligned and not session.stopping():
                    batch = collection.sample()
                    guard.watch(batch)
                    aligned = learner.align(batch)
                    guard.check(aligned, state.step, last=not learner.unaligned)
                    if not learner.unaligned:
                        logger.log(aligned, state.step)
                while state.updates_due >= 1 and not session.stopping():
                    losses = state.losses = learner.update(collection.sample(), guard.watch)
                    state.updates_due -= 1
                    guard.check(losses, state.step)
                if learner.unaligned or state.updates_due >= 1:
                    break  # interrupted: the run goes on with the rest of the updates
            state.training_due = False
            session.log_losses()
            if state.at_evaluation:
                state.evaluation_due = True
                if not session.stopping():
                    session.evaluate()
            if state.step >= cfg.env_steps:
                break
            # After the evaluation: a run that is killed within it comes back to it.
            if state.losses is not None and state.crossed(cfg.checkpoint_every):
                state.save(run)
            if state.crossed(cfg.log_every):
                logger.log_times(watch.summary(state.step), state.step)
        stopped = session.stopping()
        state.save(run)
        if not stopped:
            session.check_learned()
        logger.log_times(watch.summary(state.step), state.step)
    if stopped:
        processes.stop(
            f"stopped after {state.step} steps; to continue: the same command with resume=true"
        )
    processes.say(f"fine-tuned agent: {run.path}")


def check(cfg: FinetuneConfig) -> None:
    """Raise ValueError for settings that do not go together."""
    if cfg.prefill >= cfg.env_steps:
        raise ValueError(f"prefill={cfg.prefill} leaves nothing of env_steps={cfg.env_steps}")
    if (cfg.min_length or 1) > cfg.batch_length:
        raise ValueError(
            f"min_length={cfg.min_length} must not exceed batch_length={cfg.batch_length}"
        )
    if cfg.eval_from is not None and cfg.eval_from < cfg.prefill:
        raise ValueError(
            f"eval_from={cfg.eval_from} lies in the prefill of {cfg.prefill} steps, in which "
            f"nothing is learned: use eval_from={cfg.prefill} or more"
        )
    if cfg.capacity < cfg.batch_length:
        raise ValueError(f"capacity={cfg.capacity} is less than batch_length={cfg.batch_length}")


def build(
    cfg: FinetuneConfig, env_factory: Any, watch: Stopwatch, processes: Processes, restart: bool
) -> tuple[FinetuneState, RunFolder, dict[str, Any] | None]:
    """The run before its first step: environment, agent, run folder, replay.

    Returns:
        All that is saved of the run, its folder, and the checkpoint to continue from, if any.
    """
    device = choose_device(cfg.device)
    seed = processes.seed(cfg.seed)
    seed_everything(seed)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)

    here = cfg.collector == "sync"  # else this environment only tells what an agent must know
    env = make_training_env(cfg, env_factory, seed, cfg.num_workers if here else 1)
    known = interface(env)
    learner = make_learner(cfg, known, device, watch, processes)
    policy = WorldModelPolicy(learner.agent.world_model, learner.agent.actor, noise=cfg.expl_noise)

    data_bytes = replay_bytes(cfg, env.observation_spec["pixels"].shape, processes)
    run, checkpoint = open_run(cfg, learner.agent, data_bytes, restart, processes)
    replay = open_replay(cfg, run.path, learner.video_clips, device, processes, checkpoint)
    if here:
        collector = EpisodeCollector(env, policy, device, watch, seed)
    else:
        env.close()
        num_envs = max(cfg.num_workers, env.batch_size.numel())
        step = checkpoint["step"] if checkpoint else 0
        collector = collect_async(
            cfg, env_factory, known, policy, learner, processes, num_envs, step
        )
    collection = Collection(collector, replay)
    if checkpoint is not None and "collection" not in checkpoint:
        raise ValueError(
            f"the run in {cfg.run} is of an older version, which kept no running episodes: "
            "continue it with that version, or start a new run"
        )
    return FinetuneState(cfg, known, learner, collection, processes), run, checkpoint


@contextmanager
def opened(
    state: FinetuneState,
    run: RunFolder,
    checkpoint: dict[str, Any] | None,
    loggers: tuple[Backend, ...],
    env_factory: Any,
) -> Iterator[Session]:
    """The run, started or continued. When it ends or fails, all of it is closed.

    Workers that fail again and again stop it, but it is saved.
    """
    cfg, collection, processes = state.cfg, state.collection, state.processes
    device = next(state.learner.agent.parameters()).device
    guard = UpdateGuard(run, state.learner.updates, cfg.max_skipped, processes.rank)
    step = checkpoint["step"] if checkpoint else 0
    bar = Progress(
        cfg.env_steps, initial=step, name="finetune", unit="steps", hidden=not processes.first
    )
    interruption = Interruption()
    evaluation = Evaluation(cfg, env_factory, state.learner.agent, device, interruption)
    with ExitStack() as stack:
        for resource in (closing(collection), closing(evaluation), run, interruption):
            stack.enter_context(resource)
        state.start(checkpoint)  # which refuses a checkpoint: before anything is written
        note_continuation(cfg, run, checkpoint, processes)
        logger = stack.enter_context(open_logger(run, loggers, checkpoint, processes))
        stack.enter_context(bar)
        startup = state.learner.watch.summary(state.step)["seconds"]
        logger.log_times({"startup_s": startup}, state.step)
        dropped = checkpoint["collection"]["dropped"] if checkpoint else 0
        updates = state.learner.model_update.count
        try:
            yield Session(
                state, run, logger, bar, guard, interruption, evaluation, dropped, updates
            )
        except WorkerError as error:
            if processes.group is not None:  # the others would wait for one that has failed
                raise
            state.save(run)
            raise WorkerError(f"{error}; the run is saved, resume=auto continues it") from error


@dataclass
class Session:
    """A run between its start, or a continuation, and its end: what watches, logs and shows it."""

    state: FinetuneState
    run: RunFolder
    logger: Logger
    bar: Progress
    guard: UpdateGuard
    interruption: Interruption
    evaluation: Evaluation
    dropped: int  # episodes, as far as it was logged
    updates: int  # as far as they were shown

    def stopping(self) -> bool:
        """Whether a process was asked to stop; all must ask."""
        return self.state.processes.any(self.interruption.requested)

    def evaluate(self) -> None:
        """By the first process, while the others wait; the best agent is saved."""
        state, processes = self.state, self.state.processes
        with state.learner.watch("evaluation"):
            score = self.evaluation(self.logger, state.step) if processes.first else None
            state.evaluation_due = processes.any(processes.first and self.evaluation.cut_off)
            better = score is not None and (state.best is None or score > state.best)
            if processes.any(better):
                state.best = score
                whole = state.state_dict()
                if processes.first:
                    save_checkpoint(self.run.checkpoints / BEST, whole)

    def log_episodes(self, ended: list[dict[str, Any]]) -> None:
        """Log the episodes that have ended, and how many were lost if more were."""
        state = self.state
        with state.learner.watch("logging"):
            for episode in ended:
                names = ("return", "success", "length")
                self.logger.log({f"train/{name}": episode[name] for name in names}, state.step)
            if state.collection.collector.dropped > self.dropped:
                self.dropped = state.collection.collector.dropped
                self.logger.log({"train/dropped": self.dropped}, state.step)

    def log_losses(self) -> None:
        """Show the losses of the last update, if there was one; log them every ``log_every``."""
        state, cfg, losses = self.state, self.state.cfg, self.state.losses
        count = state.learner.model_update.count
        metrics = {}
        if losses is not None:
            metrics = {"updates": count, **progress_metrics(losses), **self.guard.shown()}
        trained = (count - self.updates) * cfg.batch_size * cfg.batch_length
        self.updates = count
        with state.learner.watch("logging"):
            self.bar.update(state.step - self.bar.count, frames=trained, metrics=metrics)
            if losses is not None and state.crossed(cfg.log_every):
                metrics = {**self.guard.metrics(), **state.collection.collector.metrics()}
                self.logger.log({**drop_unweighted(losses), **metrics}, state.step)

    def check_learned(self) -> None:
        """At the end of the run.

        Raises:
            RuntimeError: the last update was skipped.
            ValueError: there was nothing to learn from.
        """
        state = self.state
        if state.losses is not None:
            self.guard.check(state.losses, state.step, last=True)
        if not state.ready:
            raise ValueError(
                f"no episode was finished in {state.step} steps, so nothing was learned: raise "
                "env_steps, or lower max_steps"
            )


def main(cfg: FinetuneConfig) -> None:
    """Entry point."""
    with joined(choose_device(cfg.device)) as processes:
        finetune(cfg, processes=processes)
