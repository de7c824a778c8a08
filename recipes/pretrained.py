"""What fine-tuning takes from a pre-training run besides its weights."""

from __future__ import annotations

from typing import Any, cast

import torch

from prelar_trl.config import METHODS
from prelar_trl.data import VideoClips
from prelar_trl.fast import accelerate
from prelar_trl.hub import is_export, read_export
from prelar_trl.models import make_inverse_model
from prelar_trl.modules import RSSMWorldModel
from prelar_trl.objectives import RSSMWorldModelLoss
from prelar_trl.pretrained import added_inputs
from prelar_trl.recipes.common import read_run
from prelar_trl.recipes.processes import Processes
from prelar_trl.recipes.replays import prefetched
from prelar_trl.recipes.schema import FinetuneConfig
from prelar_trl.rehearsal import Rehearsal
from prelar_trl.updates import Alignment

Pretrained = dict[str, Any]  # a checkpoint, and under "config" the configuration of its run


def read_pretrained_run(cfg: FinetuneConfig) -> Pretrained | None:
    """The pre-training run, if there is one and this run needs it.

    Raises:
        ValueError: it does not suit this run.
    """
    for name in ("align_updates", "rehearse", "load", "pretrained_lr"):
        if getattr(cfg, name) not in (None, 0) and cfg.pretrained is None:
            raise ValueError(f"{name}={getattr(cfg, name)} needs a pre-training run: pretrained=")
    if cfg.pretrained is None or (cfg.resume and not (cfg.align_updates or cfg.rehearse)):
        return None
    if is_export(cfg.pretrained):
        checkpoint = read_export(cfg.pretrained, trust_code=cfg.trust_code)
        config = checkpoint["training"]
        if cfg.rehearse:
            raise ValueError(
                f"rehearse={cfg.rehearse} needs the videos of a pre-training run, of which "
                f"pretrained={cfg.pretrained} holds only the model; use rehearse=0"
            )
    else:
        run, checkpoint = read_run(cfg.pretrained, trust_code=cfg.trust_code, typed=cfg.model)
        config = run.config
    accepted = METHODS[cfg.method].checkpoint
    if checkpoint["phase"] != "pretrain" or checkpoint["method"] not in accepted:
        suits = f"runs of {', '.join(accepted)}" if accepted else "no pre-training run"
        raise ValueError(
            f"pretrained={cfg.pretrained} is a {checkpoint['phase']} run of "
            f"{checkpoint['method']}; method={cfg.method} takes {suits}"
        )
    if checkpoint["size"] != cfg.size:
        raise ValueError(
            f"pretrained={cfg.pretrained} has size={checkpoint['size']}, this run size={cfg.size}; "
            f"use size={checkpoint['size']}"
        )
    size = checkpoint.get("inputs", {}).get("size", 64)
    if size != cfg.pixels:
        raise ValueError(
            f"pretrained={cfg.pretrained} saw pictures of {size}x{size}, this run pixels="
            f"{cfg.pixels}; use pixels={size}"
        )
    return {**checkpoint, "config": config}


def make_alignment(
    cfg: FinetuneConfig,
    world_model: RSSMWorldModel,
    pretrained: Pretrained | None,
    device: torch.device,
) -> Alignment | None:
    """What aligns the action encoder with the pre-trained latent actions, if it is asked for."""
    if not cfg.align_updates:
        return None
    if world_model.action_encoder is None:
        raise ValueError(
            f"align_updates={cfg.align_updates}: method={cfg.method} has no action encoder"
        )
    assert pretrained is not None, "the configuration requires it"
    inverse_model = accelerate(make_inverse_model(pretrained).to(device))
    if inverse_model.frames == "flow":
        raise ValueError(
            f"align_updates={cfg.align_updates}: pretrained={cfg.pretrained} infers its latent "
            "actions from optical flow, which an environment does not give; use align_updates=0"
        )
    return Alignment(
        world_model.action_encoder,
        inverse_model,
        cfg.align_lr,
        preprocess=lambda pixels: world_model.first_view(world_model.preprocess(pixels)),
    )


def make_rehearsal(
    cfg: FinetuneConfig,
    loss: RSSMWorldModelLoss,
    pretrained: Pretrained | None,
    device: torch.device,
) -> Rehearsal | None:
    """The video's share of the loss, if pre-training video is to be rehearsed."""
    if not cfg.rehearse:
        return None
    assert pretrained is not None, "the configuration requires it"
    if added_inputs(cast(RSSMWorldModel, loss.world_model)):
        raise ValueError(
            f"rehearse={cfg.rehearse}: videos show neither further cameras nor vectors; use "
            "rehearse=0, or one picture"
        )
    inverse_model = None
    if loss.world_model.action_encoder is not None:
        inverse_model = accelerate(make_inverse_model(pretrained).to(device))
    return Rehearsal(loss, inverse_model, cfg.rehearse)


def rehearsed_clips(
    cfg: FinetuneConfig,
    rehearsal: Rehearsal,
    pretrained: Pretrained | None,
    device: torch.device,
    processes: Processes,
) -> VideoClips:
    """The clips that the pre-training run was trained on, as its share of each model batch.

    Their windows are as long as the replay's, or as those of the pre-training run if these are
    shorter: it has chosen its clips by them.
    """
    rows = processes.share("batch_size", cfg.batch_size)
    if rows < 2:
        raise ValueError(
            f"rehearse={cfg.rehearse} needs batch_size of at least {2 * processes.size}, not "
            f"{cfg.batch_size}"
        )
    assert pretrained is not None, "the configuration requires it"
    config = pretrained["config"]
    if config.get("data") is None:
        raise ValueError(
            f"rehearse={cfg.rehearse}: the run pretrained={cfg.pretrained} was imported and names "
            "no videos; use rehearse=0"
        )
    heldout = config["heldout"]
    streams = [key for key in rehearsal.loss.world_model.in_keys if key in ("pixels", "flow")]
    return VideoClips(
        config["data"],
        clip_len=min(cfg.batch_length, config["clip_len"]),
        batch_size=min(max(1, round(cfg.rehearse * rows)), rows - 1),
        seed=cfg.seed,
        device=device,
        streams=streams,
        split="train" if heldout else "all",
        prefetch=prefetched(cfg, device),
        rank=processes.rank,
        world_size=processes.size,
        **({"heldout": heldout} if heldout else {}),
    )
