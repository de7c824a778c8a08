"""Fine-tune a world model with real actions, and learn to act in it. Also from scratch.

python recipes/finetune.py env=metaworld/drawer-open pretrained=runs/pretrain run=runs/finetune
"""

from __future__ import annotations

import sys

from prelar_trl.recipes.entry import Stopped, start

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
from prelar_trl.data import EpisodeReplay
from prelar_trl.envs import make_env
from prelar_trl.envs.workers import WorkerError
from prelar_trl.modules import WorldModelPolicy
from prelar_trl.recipes.common import (
    BEST,
    Interruption,
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
from prelar_trl.recipes.schema import FinetuneConfig, overrides
from prelar_trl.record import Progress
from prelar_trl.stopwatch import Stopwatch

COUNTERS = ("step", "before", "updates_due", "training_due", "evaluation_due", "best")


def finetune(
    cfg: FinetuneConfig, env_factory: Any = make_env, watch: Stopwatch | None = None
) -> None:
    """The whole run: environment, agent, loop.

    ``env_factory`` is any function that makes an environment of TorchRL or gymnasium, such as
    ``lambda: MyEnv()``, or takes make_env's arguments (`build_env` says which it gets). ``watch``
    tells where the time goes. In a thread other than the main one Ctrl-C is not handled.
    """
    check(cfg)
    cfg, restart = settle_resume(cfg)
    watch = watch or Stopwatch()
    loggers = chosen_loggers(cfg.logger)
    device = choose_device(cfg.device)
    seed_everything(cfg.seed)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)

    env = make_training_env(cfg, env_factory, cfg.seed, cfg.num_workers)
    known = interface(env)
    learner = make_learner(cfg, known, device, watch)
    policy = WorldModelPolicy(learner.agent.world_model, learner.agent.actor)
    env = env.append_transform(policy.make_primer())
    # Beyond the capacity stays what the last checkpoints need.
    capacity = cfg.capacity + (cfg.keep + 1) * cfg.checkpoint_every
    frames = min(capacity, cfg.env_steps // cfg.action_repeat)
    data_bytes = frames * env.observation_spec["pixels"].shape[-3:].numel()
    run, checkpoint = open_run(cfg, learner.agent, data_bytes, restart)
    replay = EpisodeReplay(
        run.path / "replay",
        window=cfg.batch_length,
        batch_size=cfg.batch_size - learner.video_clips,
        capacity=cfg.capacity,
        seed=cfg.seed,
        device=device,
        min_length=cfg.min_length,
        pack=True,  # the official replay never trains on shorter episodes
    )
    collection = Collection(env, policy, replay, device, watch, cfg.seed)
    state = FinetuneState(cfg, known, learner, collection)
    if checkpoint is not None and "collection" not in checkpoint:
        raise ValueError(
            f"the run in {cfg.run} is of an older version, which kept no running episodes: "
            "continue it with that version, or start a new run"
        )
    if checkpoint is not None and state.is_finished(checkpoint):
        done = f"its {checkpoint['step']} steps already; raise env_steps to continue"
        print(f"finished: {run.path} has {done}")
        return

    guard = UpdateGuard(run, learner.updates, cfg.max_skipped)
    first = first_evaluation(cfg)
    per_step = cfg.action_repeat * max(1, env.batch_size.numel())  # environment steps a call
    done = checkpoint["step"] if checkpoint else 0
    bar = Progress(cfg.env_steps, initial=done, name="finetune", unit="steps")
    with (
        ExitStack() as opened,
        run,
        open_logger(run, loggers, checkpoint) as logger,
        Interruption() as interruption,
        bar,
    ):
        opened.enter_context(closing(collection))
        evaluation = Evaluation(cfg, env_factory, learner.agent, device, interruption)
        opened.enter_context(closing(evaluation))

        saved = done

        def evaluate() -> None:
            with watch("evaluation"):
                score = evaluation(logger, state.step)
                state.evaluation_due = evaluation.cut_off
                if score is not None and (state.best is None or score > state.best):
                    state.best = score
                    save_checkpoint(run.checkpoints / BEST, state.state_dict())

        def save() -> None:
            nonlocal saved
            with watch("logging"):
                now = state.state_dict()
                save_run(cfg, run, now, saved)
                replay.hold(now["replay"], cfg.keep)
            saved = state.step

        if checkpoint is None:
            collection.reset()
        else:
            state.load_state_dict(checkpoint)
        logger.log_times({"startup_s": watch.summary(state.step)["seconds"]}, state.step)
        opened.enter_context(saved_first(save))
        dropped = checkpoint["collection"]["dropped"] if checkpoint else 0
        if state.evaluation_due:
            evaluate()
        while state.step < cfg.env_steps or state.training_due:
            if not state.training_due:
                if interruption.requested:
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
            if before < cfg.prefill <= step and not replay.num_episodes and not cfg.max_steps:
                raise ValueError(
                    f"no episode has ended in the prefill of {cfg.prefill} steps, and nothing can "
                    "be learned before: give max_steps, or a longer prefill"
                )
            if state.can_train:
                while learner.unaligned and not interruption.requested:
                    aligned = learner.align(collection.sample())
                    if not learner.unaligned:
                        logger.log(aligned, step)
                while state.updates_due >= 1 and not interruption.requested:
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
            last = step >= cfg.env_steps and replay.num_episodes > 0
            due = step >= first and crossed(before - first, step - first, cfg.eval_every)
            if last or due:
                state.evaluation_due = True
                if not interruption.requested:
                    evaluate()
            if step >= cfg.env_steps:
                break
            # After the evaluation: a run that is killed within it comes back to it.
            if losses is not None and crossed(before, step, cfg.checkpoint_every):
                save()
            if crossed(before, step, cfg.log_every):
                logger.log_times(watch.summary(step), step)
        save()
        if state.losses is not None and not interruption.requested:
            guard.check(state.losses, state.step, last=True)
        if not interruption.requested and not replay.num_episodes:
            raise ValueError(
                f"no episode was finished in {state.step} steps, so nothing was learned: raise "
                "env_steps, or lower max_steps"
            )
        logger.log_times(watch.summary(state.step), state.step)
    if interruption.requested:
        raise Stopped(
            f"stopped after {state.step} steps; to continue: the same command with resume=true"
        )
    print(f"fine-tuned agent: {run.path}")


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


def first_evaluation(cfg: FinetuneConfig) -> int:
    """The step of the first evaluation: after the random actions."""
    if cfg.eval_from is not None:
        return cfg.eval_from
    return (cfg.prefill // cfg.eval_every + 1) * cfg.eval_every


class FinetuneState:
    """What a checkpoint holds of a fine-tuning run."""

    def __init__(
        self,
        cfg: FinetuneConfig,
        known: dict[str, Any],
        learner: Learner,
        collection: Collection,
    ) -> None:
        self.cfg, self.known = cfg, known  # of the environment, see `interface`
        self.learner, self.collection = learner, collection
        self.step = 0  # of the environment
        self.before = 0  # the step before that one
        self.updates_due = float(cfg.pretrain_updates)
        self.training_due = False  # not all that follows a step is done: updates, what is logged
        self.evaluation_due = False  # an interruption has cut the last one off
        self.best: list[float] | None = None  # success and return of the best evaluation
        self.losses: TensorDictBase | None = None  # of the last update

    @property
    def can_train(self) -> bool:
        """Whether the prefill is over, and there is something to learn from."""
        return self.step >= self.cfg.prefill and self.collection.replay.num_episodes > 0

    def advance(self, steps: int) -> None:
        """Count steps of the environment, and the updates that they call for."""
        self.before, self.step = self.step, self.step + steps
        self.training_due = True
        if self.can_train:
            self.updates_due += steps / self.cfg.train_every

    def is_finished(self, state: dict[str, Any]) -> bool:
        """Whether nothing is left to do for a run with that checkpoint."""
        due = state["evaluation_due"] or state["training_due"]
        return state["step"] >= self.cfg.env_steps and not due

    def state_dict(self) -> dict[str, Any]:
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
            **self.collection.state_dict(),
            "rng": rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in COUNTERS:
            setattr(self, name, state[name])
        self.losses = None if state["losses"] is None else TensorDict(state["losses"])
        self.learner.load_state_dict(state)
        self.collection.load_state_dict(state)
        set_rng_state(state["rng"])


def main(cfg: FinetuneConfig) -> None:
    """Entry point."""
    if choose_device(cfg.device).type == "cpu":
        with_tcmalloc()
    finetune(cfg)
