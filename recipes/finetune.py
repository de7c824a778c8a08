"""Fine-tune a world model with real actions, and learn to act in it. Also from scratch.

python recipes/finetune.py env=metaworld/drawer-open pretrained=runs/pretrain run=runs/finetune
torchrun --nproc-per-node=4 recipes/finetune.py ...
"""

from __future__ import annotations

import sys

from prelar_trl.recipes.entry import start

if __name__ == "__main__":  # before the imports that take seconds
    sys.exit(start("finetune"))

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase

from prelar_trl.allocator import with_tcmalloc
from prelar_trl.checkpoint import rng_state, save_checkpoint, set_rng_state
from prelar_trl.envs import make_env
from prelar_trl.envs.workers import WorkerError
from prelar_trl.modules import WorldModelPolicy
from prelar_trl.recipes.common import (
    BEST,
    choose_device,
    chosen_loggers,
    crossed,
    drop_unweighted,
    open_logger,
    open_run,
    progress_metrics,
    save_run,
    seed_everything,
    settle_resume,
)
from prelar_trl.recipes.environments import interface
from prelar_trl.recipes.guard import UpdateGuard
from prelar_trl.recipes.interaction import Collection, Evaluation, make_training_env
from prelar_trl.recipes.learner import Learner, make_learner
from prelar_trl.recipes.processes import ALONE, Processes, joined
from prelar_trl.recipes.replays import open_replay, share_replays
from prelar_trl.recipes.schema import FinetuneConfig, overrides
from prelar_trl.recipes.signals import Interruption
from prelar_trl.record import Progress
from prelar_trl.stopwatch import Stopwatch

COUNTERS = ("step", "before", "updates_due", "training_due", "evaluation_due", "best")


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
    watch = watch or Stopwatch()
    loggers = chosen_loggers(cfg.logger)
    device = choose_device(cfg.device)
    seed = processes.seed(cfg.seed)
    seed_everything(seed)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)

    env = make_training_env(cfg, env_factory, seed, cfg.num_workers)
    known = interface(env)
    learner = make_learner(cfg, known, device, watch, processes)
    policy = WorldModelPolicy(learner.agent.world_model, learner.agent.actor, noise=cfg.expl_noise)
    env = env.append_transform(policy.make_primer())
    # Beyond the capacity stays what the last checkpoints need.
    capacity = processes.size * cfg.capacity + (cfg.keep + 1) * cfg.checkpoint_every
    frames = min(capacity, cfg.env_steps // cfg.action_repeat)
    data_bytes = frames * env.observation_spec["pixels"].shape[-3:].numel()
    run, checkpoint = open_run(cfg, learner.agent, data_bytes, restart, processes)
    replay = open_replay(cfg, run.path, learner.video_clips, device, processes, checkpoint)
    collection = Collection(env, policy, replay, device, watch, seed)
    state = FinetuneState(cfg, known, learner, collection, processes)
    if checkpoint is not None and "collection" not in checkpoint:
        raise ValueError(
            f"the run in {cfg.run} is of an older version, which kept no running episodes: "
            "continue it with that version, or start a new run"
        )
    if checkpoint is not None and state.is_finished(checkpoint):
        done = f"its {checkpoint['step']} steps already; raise env_steps to continue"
        processes.say(f"finished: {run.path} has {done}")
        return

    saved = checkpoint["step"] if checkpoint else 0

    def save() -> None:
        nonlocal saved
        with watch("logging"):
            whole = state.state_dict()
            if processes.first:
                save_run(cfg, run, whole, saved)
            own = [whole, *whole["others"]][processes.rank]
            replay.hold(own["replay"], cfg.keep)
        saved = state.step

    def evaluate() -> None:  # by the first; the others wait
        with watch("evaluation"):
            score = evaluation(logger, state.step) if processes.first else None
            state.evaluation_due = processes.any(processes.first and evaluation.cut_off)
            better = score is not None and (state.best is None or score > state.best)
            if processes.any(better):
                state.best = score
                whole = state.state_dict()
                if processes.first:
                    save_checkpoint(run.checkpoints / BEST, whole)

    def stopping() -> bool:
        return processes.any(interruption.requested)

    guard = UpdateGuard(run, learner.updates, cfg.max_skipped, processes.rank)
    first = cfg.first_evaluation
    # Environment steps a call, those of all processes.
    per_step = processes.size * cfg.action_repeat * max(1, env.batch_size.numel())
    bar = Progress(
        cfg.env_steps, initial=saved, name="finetune", unit="steps", hidden=not processes.first
    )
    with (
        ExitStack() as opened,
        run,
        open_logger(run, loggers, checkpoint, processes) as logger,
        Interruption() as interruption,
        bar,
    ):
        opened.enter_context(closing(collection))
        evaluation = Evaluation(cfg, env_factory, learner.agent, device, interruption)
        opened.enter_context(closing(evaluation))
        if checkpoint is None:
            collection.reset()
        else:
            state.load_state_dict(checkpoint)
            share_replays(replay, checkpoint, processes)
            state.look_for_episodes()
        logger.log_times({"startup_s": watch.summary(state.step)["seconds"]}, state.step)
        if processes.group is None:  # the others would wait for one that has failed
            opened.enter_context(saved_first(save))
        dropped = checkpoint["collection"]["dropped"] if checkpoint else 0
        if state.evaluation_due:
            evaluate()
        while state.step < cfg.env_steps or state.training_due:
            if not state.training_due:
                if stopping():
                    break
                ended = collection.step(random=state.step < cfg.prefill)
                state.advance(per_step)
                with watch("logging"):
                    for episode in ended:
                        names = ("return", "success", "length")
                        logger.log({f"train/{name}": episode[name] for name in names}, state.step)
                    if collection.dropped > dropped:
                        dropped = collection.dropped
                        logger.log({"train/dropped": dropped}, state.step)
            before, step, updates = state.before, state.step, learner.model_update.count
            looked_at = cfg.prefill or first  # an evaluation may have no end either
            if before < looked_at <= step and not state.ready and not cfg.max_steps:
                where = "the prefill of " if cfg.prefill else ""
                raise ValueError(
                    f"no episode has ended in {where}{looked_at} steps, and nothing can be learned "
                    "before: give max_steps, or a longer prefill"
                )
            if state.can_train:
                while learner.unaligned and not stopping():
                    aligned = learner.align(collection.sample())
                    if not learner.unaligned:
                        logger.log(aligned, step)
                while state.updates_due >= 1 and not stopping():
                    state.losses = learner.update(collection.sample(), guard.watch)
                    state.updates_due -= 1
                    guard.check(state.losses, step)
                if learner.unaligned or state.updates_due >= 1:
                    break  # interrupted: the run goes on with the rest of the updates
            state.training_due = False
            losses = state.losses
            count = learner.model_update.count
            metrics = {}
            if losses is not None:
                metrics = {"updates": count, **progress_metrics(losses), **guard.shown()}
            trained = (count - updates) * cfg.batch_size * cfg.batch_length
            with watch("logging"):
                bar.update(step - bar.count, frames=trained, metrics=metrics)
                if losses is not None and crossed(before, step, cfg.log_every):
                    logger.log({**drop_unweighted(losses), **guard.metrics()}, step)
            last = step >= cfg.env_steps and state.ready
            if last or (step >= first and crossed(before - first, step - first, cfg.eval_every)):
                state.evaluation_due = True
                if not stopping():
                    evaluate()
            if step >= cfg.env_steps:
                break
            # After the evaluation: a run that is killed within it comes back to it.
            if losses is not None and crossed(before, step, cfg.checkpoint_every):
                save()
            if crossed(before, step, cfg.log_every):
                logger.log_times(watch.summary(step), step)
        stopped = stopping()
        save()
        if state.losses is not None and not stopped:
            guard.check(state.losses, state.step, last=True)
        if not stopped and not state.ready:
            raise ValueError(
                f"no episode was finished in {state.step} steps, so nothing was learned: raise "
                "env_steps, or lower max_steps"
            )
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


@contextmanager
def saved_first(save: Callable[[], None]) -> Iterator[None]:
    """Workers that fail again and again stop the run, but it is saved."""
    try:
        yield
    except WorkerError as error:
        save()
        raise WorkerError(f"{error}; the run is saved, resume=auto continues it") from error


class FinetuneState:
    """What a checkpoint holds of a fine-tuning run."""

    def __init__(
        self,
        cfg: FinetuneConfig,
        known: dict[str, Any],
        learner: Learner,
        collection: Collection,
        processes: Processes,
    ) -> None:
        self.processes = processes
        self.cfg, self.known = cfg, known  # of the environment, see `interface`
        self.learner, self.collection = learner, collection
        self.step = 0  # of the environment
        self.before = 0  # the step before that one
        self.updates_due = float(cfg.pretrain_updates)
        self.training_due = False  # not all that follows a step is done: updates, what is logged
        self.evaluation_due = False  # an interruption has cut the last one off
        self.best: list[float] | None = None  # success and return of the best evaluation
        self.losses: TensorDictBase | None = None  # of the last update
        self.ready = False  # there is something to learn from, in all processes

    @property
    def can_train(self) -> bool:
        """Whether the prefill is over, and there is something to learn from."""
        return self.step >= self.cfg.prefill and self.ready

    def advance(self, steps: int) -> None:
        """Count steps of the environment, and the updates that they call for."""
        self.before, self.step = self.step, self.step + steps
        self.training_due = True
        self.look_for_episodes()
        if self.can_train:
            self.updates_due += steps / self.cfg.train_every

    def look_for_episodes(self) -> None:
        """Whether all processes have one; all must ask."""
        has_one = self.collection.replay.num_episodes > 0
        self.ready = self.ready or self.processes.all(has_one)

    def is_finished(self, state: dict[str, Any]) -> bool:
        """Whether nothing is left to do for a run with that checkpoint."""
        due = state["evaluation_due"] or state["training_due"]
        return state["step"] >= self.cfg.env_steps and not due

    def state_dict(self) -> dict[str, Any]:
        """The whole run's, in each of its processes: all must ask for it."""
        own, *others = self.processes.gather({**self.collection.state_dict(), "rng": rng_state()})
        return {
            "phase": "finetune",
            "method": self.cfg.method,
            "size": self.cfg.size,
            "overrides": overrides(self.cfg.model),
            **self.known,
            "inputs": asdict(self.known["inputs"]),
            **{name: getattr(self, name) for name in COUNTERS},
            "losses": None if self.losses is None else self.losses.detach().to_dict(),
            **self.learner.state_dict(),
            **own,
            "others": others,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in COUNTERS:
            setattr(self, name, state[name])
        self.losses = None if state["losses"] is None else TensorDict(state["losses"])
        self.learner.load_state_dict(state)
        states, rank = [state, *state.get("others", [])], self.processes.rank
        if rank < len(states):
            self.collection.load_state_dict(states[rank])
            set_rng_state(states[rank]["rng"])
        else:  # the run had fewer processes
            seed_everything(self.processes.seed(self.cfg.seed) + self.step)
            self.collection.reset()


def main(cfg: FinetuneConfig) -> None:
    """Entry point."""
    device = choose_device(cfg.device)
    if device.type == "cpu":
        with_tcmalloc()
    with joined(device) as processes:
        finetune(cfg, processes=processes)
