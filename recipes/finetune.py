"""Fine-tune a world model with real actions, and learn to act in it. Also from scratch.

python recipes/finetune.py env=metaworld/drawer-open pretrained=runs/pretrain run=runs/finetune
"""

from __future__ import annotations

import sys

from prelar_trl.recipes.entry import start

if __name__ == "__main__":  # before the imports that take seconds
    sys.exit(start("finetune"))

from contextlib import ExitStack, closing
from dataclasses import asdict
from typing import Any

import torch

from prelar_trl.allocator import with_tcmalloc
from prelar_trl.checkpoint import rng_state, save_checkpoint, set_rng_state
from prelar_trl.data import EpisodeReplay
from prelar_trl.envs import make_env
from prelar_trl.modules import WorldModelPolicy
from prelar_trl.recipes.common import (
    CHECKPOINT,
    Interruption,
    check_finite,
    choose_device,
    chosen_loggers,
    drop_unweighted,
    ignore_sigint,
    open_logger,
    open_run,
    progress_metrics,
    seed_everything,
)
from prelar_trl.recipes.environments import interface
from prelar_trl.recipes.interaction import Collection, Evaluation, make_training_env
from prelar_trl.recipes.learner import Learner, make_learner
from prelar_trl.recipes.schema import FinetuneConfig, overrides
from prelar_trl.record import Progress
from prelar_trl.stopwatch import Stopwatch


def finetune(
    cfg: FinetuneConfig, env_factory: Any = make_env, watch: Stopwatch | None = None
) -> None:
    """The whole run: environment, agent, loop.

    ``env_factory`` is any function that makes an environment of TorchRL or gymnasium, such as
    ``lambda: MyEnv()``, or takes make_env's arguments (`build_env` says which it gets). ``watch``
    tells where the time goes. In a thread other than the main one Ctrl-C is not handled.
    """
    check(cfg)
    watch = watch or Stopwatch()
    loggers = chosen_loggers(cfg.logger)
    device = choose_device(cfg.device)
    seed_everything(cfg.seed)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)

    env = make_training_env(cfg, env_factory, cfg.seed, cfg.num_workers)
    known = interface(env)
    learner = make_learner(cfg, known, device, watch)
    policy = WorldModelPolicy(learner.agent.world_model, learner.agent.actor, noise=cfg.expl_noise)
    env = env.append_transform(policy.make_primer())
    frames = min(cfg.capacity, cfg.env_steps // cfg.action_repeat)
    run, checkpoint = open_run(
        cfg, learner.agent, data_bytes=frames * env.observation_spec["pixels"].shape[-3:].numel()
    )
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
    collection = Collection(env, policy, replay, device, watch)
    state = FinetuneState(cfg, known, learner, collection)
    if checkpoint is not None:
        state.load_state_dict(checkpoint)
        if state.step >= cfg.env_steps and not state.evaluation_due:
            print(f"{run.path} has its {state.step} steps already; raise env_steps to continue")
            return

    def save() -> None:
        state.evaluation_due = evaluation.cut_off
        save_checkpoint(run.checkpoints / CHECKPOINT, state.state_dict())

    model_update = learner.model_update
    per_step = cfg.action_repeat * max(1, env.batch_size.numel())  # environment steps a call
    bar = Progress(cfg.env_steps, initial=state.step, name="finetune", unit="steps")
    with (
        ExitStack() as opened,
        open_logger(run, loggers, checkpoint) as logger,
        Interruption() as interruption,
        bar,
    ):
        opened.enter_context(closing(collection))
        evaluation = Evaluation(cfg, env_factory, learner.agent, device, interruption)
        opened.enter_context(closing(evaluation))
        collection.reset()
        losses = None
        logger.log_times({"startup_s": watch.summary(state.step)["seconds"]}, state.step)
        if state.evaluation_due:
            evaluation(logger, state.step)
        while state.step < cfg.env_steps and not interruption.requested:
            random_phase = state.step < cfg.prefill
            ended = collection.step(random=random_phase)
            before, state.step, updates = state.step, state.step + per_step, model_update.count
            step = state.step
            with watch("logging"):
                for episode in ended:
                    names = ("return", "success", "length")
                    logger.log({f"train/{name}": episode[name] for name in names}, step)
            if before < cfg.prefill <= step and not replay.num_episodes and not cfg.max_steps:
                raise ValueError(
                    f"no episode has ended in the prefill of {cfg.prefill} steps, and nothing can "
                    "be learned before: give max_steps, or a longer prefill"
                )
            if step >= cfg.prefill and replay.num_episodes:
                while learner.unaligned and not interruption.requested:
                    aligned = learner.align(collection.sample())
                    if not learner.unaligned:
                        logger.log(aligned, step)
                state.updates_due += per_step / cfg.train_every
                while state.updates_due >= 1 and not interruption.requested:
                    losses = learner.update(collection.sample())
                    state.updates_due -= 1
            metrics = (
                {}
                if losses is None
                else {"updates": model_update.count, **progress_metrics(losses)}
            )
            trained = (model_update.count - updates) * cfg.batch_size * cfg.batch_length
            with watch("logging"):
                bar.update(per_step, frames=trained, metrics=metrics)
                if losses is not None and crossed(before, step, cfg.log_every):
                    check_finite(losses, step)
                    logger.log(drop_unweighted(losses), step)
            if not random_phase and crossed(before, step, cfg.eval_every):
                with watch("evaluation"):
                    evaluation(logger, step)
            if step >= cfg.env_steps:
                break
            # After the evaluation: a run that is killed within it comes back to it.
            if losses is not None and crossed(before, step, cfg.checkpoint_every):
                with watch("logging"):
                    check_finite(losses, step)
                    save()
            if crossed(before, step, cfg.log_every):
                logger.log_times(watch.summary(step), step)
        if losses is not None:
            check_finite(losses, state.step)
        if not interruption.requested and replay.num_episodes and evaluation.last != state.step:
            with watch("evaluation"):
                evaluation(logger, state.step)
        with watch("logging"):
            save()
        if not interruption.requested and not replay.num_episodes:
            raise ValueError(
                f"no episode was finished in {state.step} steps, so nothing was learned: raise "
                "env_steps, or lower max_steps"
            )
        logger.log_times(watch.summary(state.step), state.step)
    if interruption.requested:
        sys.exit(
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
    if cfg.capacity < cfg.batch_length:
        raise ValueError(f"capacity={cfg.capacity} is less than batch_length={cfg.batch_length}")


def crossed(before: int, now: int, every: int) -> bool:
    """Whether a multiple of ``every`` lies in (before, now]."""
    return now // every > before // every


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
        self.updates_due = float(cfg.pretrain_updates)
        self.evaluation_due = False  # an interruption has cut the last one off

    def state_dict(self) -> dict[str, Any]:
        return {
            "phase": "finetune",
            "method": self.cfg.method,
            "size": self.cfg.size,
            "overrides": overrides(self.cfg.model),
            **self.known,
            "inputs": asdict(self.known["inputs"]),
            "step": self.step,
            "updates_due": self.updates_due,
            "evaluation_due": self.evaluation_due,
            **self.learner.state_dict(),
            **self.collection.state_dict(),
            "rng": rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.updates_due = state["step"], state["updates_due"]
        self.evaluation_due = state["evaluation_due"]
        with ignore_sigint():
            self.collection.env.set_seed(self.cfg.seed + self.step)  # not the first episodes again
        self.learner.load_state_dict(state)
        self.collection.load_state_dict(state)
        set_rng_state(state["rng"])


def main(cfg: FinetuneConfig) -> None:
    """Entry point."""
    if choose_device(cfg.device).type == "cpu":
        with_tcmalloc()
    finetune(cfg)
