"""Pre-train a world model on action-free video.

python recipes/pretrain.py method=prelar data=videos/metaworld run=runs/pretrain
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from omegaconf import DictConfig
from tensordict import TensorDict

from prelar_trl.allocator import with_tcmalloc
from prelar_trl.checkpoint import rng_state, save_checkpoint, set_rng_state
from prelar_trl.data import VideoClips
from prelar_trl.models import make_world_model, make_world_model_loss
from prelar_trl.modules import WorldModel
from prelar_trl.objectives import total_loss
from prelar_trl.recipes.common import (
    CHECKPOINT,
    Interruption,
    check_finite,
    check_run,
    choose_device,
    open_logger,
    open_run,
    overrides,
    seed_everything,
    shown,
    without_twins,
)
from prelar_trl.recipes.entry import recipe, settings
from prelar_trl.recipes.schema import PretrainConfig, register
from prelar_trl.record import (
    Logger,
    Progress,
    film_strip,
    plot_psnr_by_step,
    psnr,
    video_grid,
    write_picture,
)
from prelar_trl.updates import WorldModelUpdate

register()


def pretrain(cfg: PretrainConfig) -> None:
    """The whole run: data, model, loop."""
    loggers = check_run(cfg, "pretrain")
    device = choose_device(cfg.device)
    seed_everything(cfg.seed)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)

    world_model = make_world_model(
        cfg.method, "pretrain", action_dim=0, size=cfg.size, **overrides(cfg.model)
    )
    loss = make_world_model_loss(cfg.method, "pretrain", world_model, **overrides(cfg.loss))
    loss.to(device)
    clips, heldout = open_clips(cfg, world_model, device)
    update = WorldModelUpdate(
        loss, lr=cfg.lr, clip=cfg.clip, precision=cfg.precision, compile=cfg.compile
    )

    run, checkpoint = open_run(cfg, world_model)
    if checkpoint is not None:
        load_state(checkpoint, world_model, update, clips)
        if update.count >= cfg.updates:
            print(f"{run.path} has its {update.count} updates already; raise updates to continue")
            return
    fixed = heldout.sample()  # the same held-out clips throughout
    losses = None

    def save() -> None:
        state = {
            "phase": "pretrain",
            "method": cfg.method,
            "size": cfg.size,
            "overrides": overrides(cfg.model),
            "step": update.count,
            "model": world_model.state_dict(),
            "update": update.state_dict(),
            "clips": clips.state_dict(),
            "rng": rng_state(),
        }
        save_checkpoint(run.checkpoints / CHECKPOINT, state)

    frames = cfg.batch_size * cfg.clip_len
    bar = Progress(cfg.updates, initial=update.count, name="pretrain", unit="updates")
    with open_logger(run, loggers, checkpoint) as logger, Interruption() as interruption, bar:
        while update.count < cfg.updates and not interruption.requested:
            losses = update(clips.sample())
            step = update.count
            last = step == cfg.updates
            if step % cfg.log_every == 0 or step == 1 or last:
                losses.pop("state")
                check_finite(losses, step)
                logger.log({**without_twins(losses), "loss": total_loss(losses)}, step)
            if step % cfg.video_every == 0 or step == 1 or last:
                predict(world_model, fixed, logger, step, cfg.context)
            if step % cfg.checkpoint_every == 0:
                check_finite(losses, step)
                save()
            bar.update(frames=frames, metrics=shown(losses))
        if losses is not None:
            check_finite(losses, update.count)
            save()
    if interruption.requested:
        sys.exit(
            f"stopped after {update.count} updates; to continue: the same command with resume=true"
        )
    print(f"pre-trained world model: {run.path}")


def open_clips(
    cfg: PretrainConfig, world_model: WorldModel, device: torch.device
) -> tuple[VideoClips, VideoClips]:
    """Training clips and held-out clips."""
    streams = ["pixels"] + (["flow"] if "flow" in world_model.in_keys else [])
    common: dict[str, Any] = {"clip_len": cfg.clip_len, "device": device, "streams": streams}
    splits = ("train", "heldout") if cfg.heldout else ("all", "all")
    if not 0 < cfg.context < cfg.clip_len:
        raise ValueError(
            f"context={cfg.context} must lie between 1 and clip_len={cfg.clip_len} - 1"
        )
    share = {"heldout": cfg.heldout} if cfg.heldout else {}
    clips = VideoClips(
        cfg.data,
        batch_size=cfg.batch_size,
        seed=cfg.seed,
        split=splits[0],
        prefetch=cfg.prefetch,
        **share,
        **common,
    )
    heldout = VideoClips(cfg.data, batch_size=8, seed=0, split=splits[1], **share, **common)
    height, width = clips.stores[0].size
    if (height, width) != (64, 64):
        raise ValueError(f"data={cfg.data} has frames of {height}x{width}; make it with pixels=64")
    return clips, heldout


def load_state(
    checkpoint: dict[str, Any], world_model: WorldModel, update: WorldModelUpdate, clips: VideoClips
) -> None:
    world_model.load_state_dict(checkpoint["model"])
    update.load_state_dict(checkpoint["update"])
    clips.load_state_dict(checkpoint["clips"])
    set_rng_state(checkpoint["rng"])


def predict(
    world_model: WorldModel, batch: TensorDict, logger: Logger, step: int, context: int
) -> None:
    """Open-loop prediction on held-out clips: PSNR, a video grid and a film strip."""
    world_model.eval()
    device = batch["pixels"].device
    # Looking must not change the training's random draws.
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        model = world_model.open_loop(batch, context)
    quality = psnr(model, batch["pixels"]).mean(0).cpu()  # [T]
    logger.log(
        {"psnr_seen": quality[:context].mean(), "psnr_openloop": quality[context:].mean()}, step
    )
    grid = video_grid(batch["pixels"], model, context=context)
    logger.log_video("openloop", grid, step, fps=5)
    pictures = logger.run.pictures
    strip = film_strip(batch["pixels"][0], model[0], context=context)
    write_picture(pictures / f"openloop_{step:06d}.png", strip)
    curve = {f"after {step} updates": quality.tolist()}
    plot_psnr_by_step(curve, pictures / "psnr_by_frame.png", context=context)


@recipe("pretrain")
def main(config: DictConfig) -> None:
    """Entry point."""
    cfg = settings(config)
    if choose_device(cfg.device).type == "cpu":
        with_tcmalloc()
    pretrain(cfg)


if __name__ == "__main__":
    main()
