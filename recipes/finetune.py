"""Fine-tune a world model with real actions, and learn to act in it. Also from scratch.

python recipes/finetune.py env=metaworld/drawer-open pretrained=runs/pretrain run=runs/finetune
"""

from __future__ import annotations

import sys

from prelar_trl.recipes.entry import start

if __name__ == "__main__":  # before the imports that take seconds
    sys.exit(start("finetune"))

from contextlib import ExitStack, closing
from functools import partial
from typing import Any

import torch
from tensordict import TensorDictBase
from torchrl.envs import EnvBase

from prelar_trl.allocator import with_tcmalloc
from prelar_trl.checkpoint import rng_state, save_checkpoint, set_rng_state
from prelar_trl.config import METHODS
from prelar_trl.data import EpisodeReplay
from prelar_trl.envs import make_env
from prelar_trl.fast import accelerate, compile_update
from prelar_trl.models import Agent, load_pretrained, make_agent, make_world_model_loss
from prelar_trl.modules import WorldModelPolicy
from prelar_trl.recipes.common import (
    CHECKPOINT,
    EpisodeTracker,
    Interruption,
    check_finite,
    choose_device,
    chosen_loggers,
    drop_unweighted,
    ignore_sigint,
    open_logger,
    open_run,
    play,
    progress_metrics,
    seed_everything,
    summarize,
)
from prelar_trl.recipes.environments import build_env
from prelar_trl.recipes.pretrained import (
    make_alignment,
    make_rehearsal,
    read_pretrained_run,
    rehearsed_clips,
)
from prelar_trl.recipes.schema import FinetuneConfig, overrides
from prelar_trl.record import Logger, Progress
from prelar_trl.stopwatch import Stopwatch
from prelar_trl.updates import BehaviorUpdate, WorldModelUpdate

EVAL_SEED = 10_000  # the evaluation environment's seed lies apart from the training one's
FRAME_BYTES = 3 * 64 * 64


def finetune(
    cfg: FinetuneConfig, env_factory: Any = make_env, watch: Stopwatch | None = None
) -> None:
    """The whole run: environment, agent, loop.

    ``env_factory`` is any function that makes an environment of TorchRL or gymnasium, such as
    ``lambda: MyEnv()``, or takes make_env's arguments (`build_env` says which it gets). ``watch``
    tells where the time goes. In a thread other than the main one Ctrl-C is not handled.
    """
    watch = watch or Stopwatch()
    loggers = chosen_loggers(cfg.logger)
    if cfg.prefill >= cfg.env_steps:
        raise ValueError(f"prefill={cfg.prefill} leaves nothing of env_steps={cfg.env_steps}")
    if (cfg.min_length or 1) > cfg.batch_length:
        raise ValueError(
            f"min_length={cfg.min_length} must not exceed batch_length={cfg.batch_length}"
        )
    if cfg.capacity < cfg.batch_length:
        raise ValueError(f"capacity={cfg.capacity} is less than batch_length={cfg.batch_length}")
    device = choose_device(cfg.device)
    seed_everything(cfg.seed)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)

    env = make_training_env(cfg, env_factory, cfg.seed, cfg.num_workers)
    agent = make_agent(
        cfg.method,
        action_dim=env.action_spec.shape[-1],
        size=cfg.size,
        **overrides(cfg.model),
    )
    if agent.video_bonus is not None and cfg.batch_length < agent.video_bonus.window:
        raise ValueError(
            f"batch_length={cfg.batch_length} is shorter than the video bonus's window of "
            f"{agent.video_bonus.window} frames: raise it"
        )
    if cfg.align_updates is None:
        cfg.align_updates = METHODS[cfg.method].align_updates if cfg.pretrained else 0
    pretrained = read_pretrained_run(cfg)
    if pretrained is not None and not cfg.resume:
        load_pretrained(agent.world_model, pretrained["model"])
    accelerate(agent.to(device).eval())
    alignment = make_alignment(cfg, agent.world_model, pretrained, device)
    loss = make_world_model_loss(
        cfg.method,
        "finetune",
        agent.world_model,
        video_bonus=agent.video_bonus,
        **overrides(cfg.loss),
    ).to(device)
    rehearsal = make_rehearsal(cfg, loss, pretrained, device)
    clips = None if rehearsal is None else rehearsed_clips(cfg, rehearsal, pretrained, device)
    model_update = WorldModelUpdate(
        loss,
        lr=cfg.lr,
        frozen_updates=cfg.frozen_updates if cfg.pretrained else None,
        clip=cfg.clip,
        precision=cfg.precision,
        rehearsal=rehearsal,
    )
    behavior_update = BehaviorUpdate(
        agent,
        horizon=cfg.horizon,
        lmbda=cfg.lmbda,
        actor_lr=cfg.actor_lr,
        critic_lr=cfg.critic_lr,
        entropy_scale=cfg.entropy_scale,
        gradient=cfg.actor_gradient,
        slow_every=cfg.slow_every,
        imag_batch=cfg.imag_batch,
        clip=cfg.clip,
        precision=cfg.precision,
    )
    for update in (model_update, behavior_update):
        compile_update(update, cfg.compile)
    policy = WorldModelPolicy(agent.world_model, agent.actor)
    env = env.append_transform(policy.make_primer())

    frames = min(cfg.capacity, cfg.env_steps // cfg.action_repeat)
    run, checkpoint = open_run(cfg, agent, data_bytes=frames * FRAME_BYTES)
    replay = EpisodeReplay(
        run.path / "replay",
        window=cfg.batch_length,
        batch_size=cfg.batch_size - (0 if clips is None else clips.batch_size),
        capacity=cfg.capacity,
        seed=cfg.seed,
        device=device,
        min_length=cfg.min_length,
        pack=True,  # the official replay never trains on shorter episodes
    )
    steps, debt = 0, float(cfg.pretrain_updates)  # debt: updates to make up for
    cut_off = False  # the last evaluation, by an interruption
    if checkpoint is not None:
        steps, debt = checkpoint["step"], checkpoint["debt"]
        cut_off = checkpoint.get("evaluation_cut_off", False)
        with ignore_sigint():
            env.set_seed(cfg.seed + steps)  # not the first episodes again
        agent.load_state_dict(checkpoint["agent"])
        model_update.load_state_dict(checkpoint["model_update"])
        behavior_update.load_state_dict(checkpoint["behavior_update"])
        replay.load_state_dict({**checkpoint["replay"], "pending": {}})
        if alignment is not None:
            alignment.load_state_dict(checkpoint["alignment"])
        if clips is not None:
            clips.load_state_dict(checkpoint["clips"])
        set_rng_state(checkpoint["rng"])
        if steps >= cfg.env_steps and not cut_off:
            print(f"{run.path} has its {steps} steps already; raise env_steps to continue")
            return

    def save() -> None:
        replay_state = replay.state_dict()
        replay_state.pop("pending")  # the simulator cannot be saved: an episode starts anew
        state = {
            "phase": "finetune",
            "method": cfg.method,
            "size": cfg.size,
            "overrides": overrides(cfg.model),
            "action_dim": policy.action_dim,
            "step": steps,
            "debt": debt,
            "evaluation_cut_off": evaluation.cut_off,
            "agent": agent.state_dict(),
            "model_update": model_update.state_dict(),
            "behavior_update": behavior_update.state_dict(),
            "replay": replay_state,
            "alignment": None if alignment is None else alignment.state_dict(),
            "clips": None if clips is None else clips.state_dict(),
            "rng": rng_state(),
        }
        save_checkpoint(run.checkpoints / CHECKPOINT, state)

    def train() -> TensorDictBase:
        with watch("replay"):
            batches = [replay.sample()] + ([] if clips is None else [clips.sample()])
        with watch("world_model"):
            losses = model_update(*batches)
        if model_update.count <= cfg.behavior_after:
            losses.pop("state")
            return losses
        with watch("behavior"):
            start = losses.pop("state").update(batches[0].select("terminated", "action"))
            return losses.update(behavior_update(start))

    per_step = cfg.action_repeat * max(1, env.batch_size.numel())  # environment steps a call
    bar = Progress(cfg.env_steps, initial=steps, name="finetune", unit="steps")
    with (
        ExitStack() as opened,
        open_logger(run, loggers, checkpoint) as logger,
        Interruption() as interruption,
        bar,
    ):
        opened.callback(replay.close)
        opened.callback(env.close, raise_if_closed=False)
        evaluation = Evaluation(cfg, env_factory, agent, device, interruption)
        opened.enter_context(closing(evaluation))
        with ignore_sigint():
            td, losses = env.reset(), None
        logger.log_times({"startup_s": watch.summary(steps)["seconds"]}, steps)
        tracker = EpisodeTracker(td.numel())
        if cut_off:
            evaluation(logger, steps)
        while steps < cfg.env_steps and not interruption.requested:
            random_phase = steps < cfg.prefill
            with watch("policy"):
                td = env.rand_action(td) if random_phase else act(policy, td, device)
            with watch("env"):
                td, following = env.step_and_maybe_reset(td)
            with watch("replay"):
                replay.add(td.exclude("belief", ("next", "belief")))
            before, steps, updates = steps, steps + per_step, model_update.count
            with watch("logging"):
                for episode in tracker.update(td["next"]):
                    names = ("return", "success", "length")
                    logger.log({f"train/{name}": episode[name] for name in names}, steps)
            td = following

            if before < cfg.prefill <= steps and not replay.num_episodes and not cfg.max_steps:
                raise ValueError(
                    f"no episode has ended in the prefill of {cfg.prefill} steps, and nothing can "
                    "be learned before: give max_steps, or a longer prefill"
                )
            if steps >= cfg.prefill and replay.num_episodes:
                while (
                    alignment is not None
                    and alignment.count < cfg.align_updates
                    and not interruption.requested
                ):
                    with watch("alignment"):
                        aligned = alignment(replay.sample())
                    if alignment.count == cfg.align_updates:
                        logger.log(aligned, steps)
                debt += per_step / cfg.train_every
                while debt >= 1 and not interruption.requested:
                    losses = train()
                    debt -= 1
            metrics = (
                {}
                if losses is None
                else {"updates": model_update.count, **progress_metrics(losses)}
            )
            trained = (model_update.count - updates) * cfg.batch_size * cfg.batch_length
            with watch("logging"):
                bar.update(per_step, frames=trained, metrics=metrics)
                if losses is not None and crossed(before, steps, cfg.log_every):
                    check_finite(losses, steps)
                    logger.log(drop_unweighted(losses), steps)
            if not random_phase and crossed(before, steps, cfg.eval_every):
                with watch("evaluation"):
                    evaluation(logger, steps)
            if steps >= cfg.env_steps:
                break
            # After the evaluation: a run that is killed within it comes back to it.
            if losses is not None and crossed(before, steps, cfg.checkpoint_every):
                with watch("logging"):
                    check_finite(losses, steps)
                    save()
            if crossed(before, steps, cfg.log_every):
                logger.log_times(watch.summary(steps), steps)
        if losses is not None:
            check_finite(losses, steps)
        complete = not interruption.requested
        if complete and replay.num_episodes and evaluation.last != steps:
            with watch("evaluation"):
                evaluation(logger, steps)
            complete = not interruption.requested
        with watch("logging"):
            save()
        if complete and not replay.num_episodes:
            raise ValueError(
                f"no episode was finished in {steps} steps, so nothing was learned: raise "
                "env_steps, or lower max_steps"
            )
        logger.log_times(watch.summary(steps), steps)
    if interruption.requested:
        sys.exit(f"stopped after {steps} steps; to continue: the same command with resume=true")
    print(f"fine-tuned agent: {run.path}")


def crossed(before: int, now: int, every: int) -> bool:
    """Whether a multiple of ``every`` lies in (before, now]."""
    return now // every > before // every


def make_training_env(
    cfg: FinetuneConfig, env_factory: Any, seed: int, num_workers: int
) -> EnvBase:
    return build_env(
        env_factory,
        cfg.env,
        seed=seed,
        camera=cfg.camera,
        render_quality=cfg.render_quality,
        action_repeat=cfg.action_repeat,
        max_steps=cfg.max_steps,
        num_workers=num_workers,
    )


def act(policy: WorldModelPolicy, td: TensorDictBase, device: torch.device) -> TensorDictBase:
    """The policy's action, computed on its device."""
    out = policy(td.select(*policy.in_keys).to(device))
    return td.update(out.select(*policy.out_keys).to("cpu"))


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
        self.policy = WorldModelPolicy(agent.world_model, agent.actor, mode="mode")
        self.env: EnvBase | None = None

    def __call__(self, logger: Logger, step: int) -> None:
        cfg, device, seed = self.cfg, self.device, self.cfg.seed + EVAL_SEED
        if not cfg.eval_episodes:
            return
        if self.env is None:
            workers = min(cfg.num_workers, cfg.eval_episodes)
            env = make_training_env(cfg, self.env_factory, seed, workers)
            self.env = env.append_transform(self.policy.make_primer())
        with ignore_sigint():
            self.env.set_seed(seed)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            policy = partial(act, self.policy, device=device)
            stopped = partial(getattr, self.interruption, "requested")
            records, films = play(self.env, policy, cfg.eval_episodes, stopped=stopped)
        self.cut_off = len(records) < cfg.eval_episodes
        if self.cut_off:
            return
        self.last = step
        logger.log({f"eval/{name}": value for name, value in summarize(records).items()}, step)
        logger.log_video("eval", films[0], step, fps=30)

    def close(self) -> None:
        if self.env is not None:
            self.env.close(raise_if_closed=False)


def main(cfg: FinetuneConfig) -> None:
    """Entry point."""
    if choose_device(cfg.device).type == "cpu":
        with_tcmalloc()
    finetune(cfg)
