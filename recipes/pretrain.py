"""Pre-train a world model on action-free video.

python recipes/pretrain.py method=prelar data=videos/metaworld run=runs/pretrain
torchrun --nproc-per-node=4 recipes/pretrain.py ...
"""

from __future__ import annotations

import sys

from prelar_trl.recipes.entry import start

if __name__ == "__main__":  # before the imports that take seconds
    sys.exit(start("pretrain"))

from dataclasses import dataclass, replace
from typing import Any

import torch
from tensordict import TensorDict

from prelar_trl.checkpoint import kept_rng, rng_state, set_rng_state
from prelar_trl.config import METHODS, model_settings
from prelar_trl.data import VideoClips, shift_for_motion
from prelar_trl.fast import accelerate
from prelar_trl.models import make_world_model, make_world_model_loss
from prelar_trl.modules import RSSMWorldModel
from prelar_trl.objectives import RSSMWorldModelLoss, total_loss
from prelar_trl.pretrained import load_weights
from prelar_trl.probes import action_usage
from prelar_trl.recipes.base_config import overrides
from prelar_trl.recipes.common import (
    choose_device,
    chosen_loggers,
    drop_unweighted,
    note_continuation,
    open_logger,
    open_run,
    prepare_update,
    progress_metrics,
    save_run,
    seed_everything,
)
from prelar_trl.recipes.guard import UpdateGuard
from prelar_trl.recipes.processes import ALONE, Processes, joined
from prelar_trl.recipes.resume import other_kind, settle_preset, settle_resume
from prelar_trl.recipes.schema import PretrainConfig
from prelar_trl.recipes.signals import Interruption
from prelar_trl.record import (
    Logger,
    Progress,
    RunFolder,
    frame_strip,
    plot_psnr_by_step,
    psnr,
    video_grid,
    write_picture,
)
from prelar_trl.types import Inputs
from prelar_trl.updates import WorldModelUpdate

MOTION_PAIRS = 256  # of frames, by which the videos' motion is measured


def pretrain(cfg: PretrainConfig, processes: Processes = ALONE) -> None:
    """The whole run: data, model, loop. Several processes share each batch."""
    cfg, restart = settle_resume(cfg)
    cfg = settle_preset(settle_shift(cfg, processes), restart)
    loggers = chosen_loggers(cfg.logger)
    state, heldout = build(cfg, processes)
    world_model, update = state.world_model, state.update
    run, checkpoint = open_run(cfg, world_model, restart=restart, processes=processes)
    if checkpoint is not None:
        state.load_state_dict(checkpoint)
        if update.count >= cfg.updates:
            done = f"its {update.count} updates already; raise updates to continue"
            processes.say(f"finished: {run.path} has {done}")
            return
        note_continuation(cfg, run, checkpoint, processes)
    fixed = heldout.sample()  # the same held-out clips throughout
    usage = UsageGuard(cfg, world_model, fixed, heldout.num_clips)
    guard = UpdateGuard(run, [update], cfg.max_skipped, processes.rank)
    losses, stopped = None, False
    frames = cfg.batch_size * cfg.clip_len
    bar = Progress(cfg.updates, initial=update.count, name="pretrain", hidden=not processes.first)
    with (
        run,
        open_logger(run, loggers, checkpoint, processes) as logger,
        Interruption() as interruption,
        bar,
    ):
        while update.count < cfg.updates:
            if stopped := processes.any(interruption.requested):
                break
            batch = state.clips.sample()
            guard.watch(batch)
            losses = update(batch)
            losses.pop("state")
            step = update.count
            guard.check(losses, step)
            last = step == cfg.updates
            if step % cfg.log_every == 0 or step == 1 or last:
                logged = {**drop_unweighted(losses), "loss": total_loss(losses), **guard.metrics()}
                logger.log(logged, step)
            if usage.watches and processes.first and (step % cfg.usage_every == 0 or last):
                logger.log(usage(step), step)
            if processes.first and (step % cfg.video_every == 0 or step == 1 or last):
                predict(world_model, fixed, logger, step, cfg.context)
            if step % cfg.checkpoint_every == 0:
                state.save(run)
            metrics = {**progress_metrics(losses), **guard.shown(), **usage.latest}
            bar.update(frames=frames, metrics=metrics)
        if losses is not None:
            state.save(run)
            if not stopped:
                guard.check(losses, update.count, last=True)
    if stopped:
        processes.stop(
            f"stopped after {update.count} updates; to continue: the same command with resume=true"
        )
    processes.say(f"pre-trained world model: {run.path}")


def settle_shift(cfg: PretrainConfig, processes: Processes) -> PretrainConfig:
    """The configuration with the shift of the latent actions' frames as a number.

    Where the method has it by motion, it is measured in the videos, unless the run goes on.
    """
    name, times = "latent_action_shift", cfg.shift_by_motion
    if times is None:
        times = METHODS[cfg.method].shift_by_motion
    if cfg.shift_by_motion and cfg.model[name] is not None:
        raise ValueError(f"shift_by_motion={times} sets model.{name}: give one of them")
    if not times or cfg.model[name] is not None:
        return cfg
    if cfg.resume:
        config = RunFolder.load(cfg.run).config
        if not other_kind(cfg, config) and "shift_by_motion" not in config:
            raise ValueError(
                f"the run in {cfg.run} is of an older version, whose method={cfg.method} had other "
                "losses: continue it with that version, or start a new run"
            )
        return cfg
    if model_settings(cfg.method, cfg.phase, cfg.size, overrides(cfg.model)).actions != "latent":
        if cfg.shift_by_motion:
            raise ValueError(f"shift_by_motion={times}: method={cfg.method} has no latent actions")
        return cfg
    split = "train" if cfg.heldout else "all"
    pairs = VideoClips(cfg.data, 2, MOTION_PAIRS, split=split, heldout=cfg.heldout).sample()
    shift = shift_for_motion(pairs["pixels"], times)
    processes.say(
        f"latent actions see frames moved by up to {shift} pixels (model.{name}), {times:g} times "
        "the videos' motion"
    )
    return replace(cfg, model={**cfg.model, name: shift})


def build(cfg: PretrainConfig, processes: Processes) -> tuple[PretrainState, VideoClips]:
    """The run before its first update: data, model, loss, optimizer; and held-out clips."""
    device = choose_device(cfg.device)
    seed_everything(processes.seed(cfg.seed))
    if cfg.threads:
        torch.set_num_threads(cfg.threads)

    inputs = Inputs(cfg.pixels)
    world_model = make_world_model(
        cfg.method, "pretrain", action_dim=0, inputs=inputs, size=cfg.size, **cfg.model
    )
    clips, heldout = open_clips(cfg, world_model, device, processes)
    loss = make_loss(cfg, world_model, clips.action_dim if cfg.labels else None)
    loss = accelerate(loss.to(device))
    update = WorldModelUpdate(loss, lr=cfg.lr, clip=cfg.clip, precision=cfg.precision)
    prepare_update(update, cfg.compile, processes)
    return PretrainState(cfg, world_model, update, clips, processes), heldout


@dataclass
class PretrainState:
    """All that is saved of a pre-training run, and restored."""

    cfg: PretrainConfig
    world_model: RSSMWorldModel
    update: WorldModelUpdate
    clips: VideoClips
    processes: Processes
    saved: int = 0  # updates at the newest checkpoint

    def save(self, run: RunFolder) -> None:
        """Write the newest checkpoint; all processes must come here."""
        whole = self.state_dict()
        if self.processes.first:
            save_run(self.cfg, run, whole, self.saved)
        self.saved = self.update.count

    def state_dict(self) -> dict[str, Any]:
        """The whole run's, in each of its processes: all must ask for it."""
        rng, *others = self.processes.gather(rng_state())
        return {
            "phase": "pretrain",
            "method": self.cfg.method,
            "size": self.cfg.size,
            "overrides": self.cfg.model,
            "inputs": {"size": self.cfg.pixels},
            "step": self.update.count,
            "model": self.world_model.state_dict(),
            "update": self.update.state_dict(),
            "clips": self.clips.state_dict(),
            "rng": rng,
            "others": [{"rng": each} for each in others],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where the checkpoint was written; a process that is new starts at that step."""
        load_weights(self.world_model, state["model"], f"the run in {self.cfg.run}")
        self.update.load_state_dict(state["update"])
        self.clips.load_state_dict(state["clips"])
        self.saved = self.update.count
        states, rank = [state, *state.get("others", [])], self.processes.rank
        if rank < len(states):
            set_rng_state(states[rank]["rng"])
        else:  # the run had fewer processes
            seed_everything(self.processes.seed(self.cfg.seed) + self.update.count)


def make_loss(
    cfg: PretrainConfig, world_model: RSSMWorldModel, action_dim: int | None
) -> RSSMWorldModelLoss:
    """The method's loss, with a term for the labels, of that size, if there are any."""
    settings = dict(cfg.loss)
    weights = dict(settings.pop("weights", {}))
    if cfg.labels:
        weights.setdefault("action_label", 1.0)
    elif weights.get("action_label") is not None:
        raise ValueError("loss.weights has action_label but labels=0: add labels=<share or number>")
    return make_world_model_loss(
        cfg.method,
        "pretrain",
        world_model,
        weights=weights,
        action_dim=action_dim,
        **settings,
    )


class UsageGuard:
    """Watches on held-out clips whether the dynamics uses the latent actions; warns once if not.

    A single look at a few clips is noisy: two in a row have to be near chance, or the last one. Of
    one or two clips many actions are exchanged for themselves, which looks like chance: no warning.
    """

    LEAST = 0.1  # of action_usage
    CLIPS = 3
    CURES = (
        "lower loss.weights.latent_kl or action_state_consistency, raise loss.latent_free_nats, "
        "use method=prelar_plus, or, where code_perplexity is 1, model.frames=diff"
    )

    def __init__(
        self, cfg: PretrainConfig, world_model: RSSMWorldModel, batch: TensorDict, clips: int
    ) -> None:
        self.cfg, self.world_model, self.batch = cfg, world_model, batch
        self.watches = world_model.latent_action_encoder is not None
        self.latest: dict[str, float] = {}
        self.low_before = False
        self.warned = clips < self.CLIPS

    def __call__(self, step: int) -> dict[str, float]:
        """``action_usage`` and ``action_psnr_gap``."""
        self.world_model.eval()
        with kept_rng():  # the training does not feel what is drawn here
            metrics = action_usage(self.world_model, self.batch, self.cfg.context)
        self.latest = {"usage": metrics["action_usage"]}
        early = step < max(self.cfg.updates // 10, self.cfg.loss["latent_warmup"] or 0)
        low = metrics["action_usage"] < self.LEAST and not early
        sure = low and (self.low_before or step >= self.cfg.updates)
        self.low_before = low
        if sure and not self.warned:
            self.warned = True
            print(
                f"warning: after {step} updates the dynamics ignores the latent actions "
                f"(action_usage {metrics['action_usage']:.2f}, 0 is chance): {self.CURES}",
                file=sys.stderr,
            )
        return metrics


def open_clips(
    cfg: PretrainConfig, world_model: RSSMWorldModel, device: torch.device, processes: Processes
) -> tuple[VideoClips, VideoClips]:
    """Training clips and held-out clips."""
    streams = ["pixels"] + (["flow"] if "flow" in world_model.in_keys else [])
    common: dict[str, Any] = {"clip_len": cfg.clip_len, "device": device, "streams": streams}
    train, test = ("train", "heldout") if cfg.heldout else ("all", "all")
    if not 0 < cfg.context < cfg.clip_len:
        raise ValueError(
            f"context={cfg.context} must lie between 1 and clip_len={cfg.clip_len} - 1"
        )
    clips = VideoClips(
        cfg.data,
        batch_size=processes.share("batch_size", cfg.batch_size),
        seed=cfg.seed,
        split=train,
        heldout=cfg.heldout,
        prefetch=cfg.prefetch,
        labels=cfg.labels,
        rank=processes.rank,
        world_size=processes.size,
        **common,
    )
    heldout = VideoClips(cfg.data, batch_size=8, seed=0, split=test, heldout=cfg.heldout, **common)
    height, width = clips.stores[0].size
    if (height, width) != (cfg.pixels, cfg.pixels):
        raise ValueError(
            f"data={cfg.data} has frames of {height}x{width}; make it with pixels={cfg.pixels}, or "
            "train with its pixels="
        )
    return clips, heldout


def predict(
    world_model: RSSMWorldModel, batch: TensorDict, logger: Logger, step: int, context: int
) -> None:
    """Open-loop prediction on held-out clips: PSNR, a video grid and a film strip."""
    world_model.eval()
    with kept_rng():
        model = world_model.open_loop(batch, context)
    quality = psnr(model, batch["pixels"]).mean(0).cpu()  # [T]
    logger.log(
        {"psnr_seen": quality[:context].mean(), "psnr_openloop": quality[context:].mean()}, step
    )
    grid = video_grid(batch["pixels"], model, context=context)
    logger.log_video("openloop", grid, step, fps=5)
    pictures = logger.run.pictures
    strip = frame_strip(batch["pixels"][0], model[0], context=context)
    write_picture(pictures / f"openloop_{step:06d}.png", strip)
    curve = {f"after {step} updates": quality.tolist()}
    plot_psnr_by_step(curve, pictures / "psnr_by_frame.png", context=context)


def main(cfg: PretrainConfig) -> None:
    """Entry point."""
    with joined(choose_device(cfg.device)) as processes:
        pretrain(cfg, processes)
