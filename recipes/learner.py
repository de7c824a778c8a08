"""What fine-tuning trains, as one object that is saved, and what it takes from pre-training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from tensordict import TensorDictBase

from prelar_trl.config import METHODS, PRETRAINED_PARTS
from prelar_trl.data import VideoClips
from prelar_trl.fast import accelerate
from prelar_trl.hub import is_export, read_export
from prelar_trl.models import (
    Agent,
    copy_pretrained,
    make_agent,
    make_inverse_model,
    make_world_model_loss,
)
from prelar_trl.modules import RSSMWorldModel
from prelar_trl.objectives import RSSMWorldModelLoss
from prelar_trl.pretrained import added_inputs, fingerprint, load_weights
from prelar_trl.recipes.common import prepare_update, read_run
from prelar_trl.recipes.processes import Processes
from prelar_trl.recipes.replays import prefetched
from prelar_trl.recipes.schema import FinetuneConfig
from prelar_trl.record import RunFolder
from prelar_trl.rehearsal import Rehearsal
from prelar_trl.stopwatch import Stopwatch
from prelar_trl.updates import Alignment, BehaviorUpdate, Update, WorldModelUpdate
from prelar_trl.utils import absolute, map_paths

Pretrained = dict[str, Any]  # a checkpoint, and under "config" the configuration of its run


@dataclass
class Learner:
    """The agent with its updates; ``alignment`` and rehearsed ``clips`` where a run has them.

    ``pretrained`` is the fingerprint of the pre-trained weights; None where they were not read.
    """

    cfg: FinetuneConfig
    agent: Agent
    model_update: WorldModelUpdate
    behavior_update: BehaviorUpdate
    alignment: Alignment | None
    clips: VideoClips | None
    pretrained: str | None
    watch: Stopwatch

    @property
    def video_clips(self) -> int:
        """Clips of a model batch that are rehearsed video, not the replay's."""
        return 0 if self.clips is None else self.clips.batch_size

    @property
    def updates(self) -> list[Update]:
        """All that there are."""
        updates = [self.model_update, self.behavior_update, self.alignment]
        return [update for update in updates if update is not None]

    def update(
        self, batch: TensorDictBase, note: Callable[..., None] = lambda *batches: None
    ) -> TensorDictBase:
        """One update of the world model, and of the behavior from the states that it infers.

        ``note`` is shown all that goes into it. Returns the losses, scalars.
        """
        batches = [batch]
        if self.clips is not None:
            with self.watch("replay"):
                batches.append(self.clips.sample())
        note(*batches)
        with self.watch("world_model"):
            losses = self.model_update(*batches)
        state = losses.pop("state")
        assert isinstance(state, TensorDictBase)
        if self.model_update.count <= self.cfg.behavior_after:
            self.agent.eval()  # it acts now
            return losses
        with self.watch("behavior"):
            state.update(batch.select("terminated", "action", "is_first"))
            return losses.update(self.behavior_update(state))

    @property
    def aligned(self) -> int:
        """Updates of the action encoder alone that were made."""
        return 0 if self.alignment is None else self.alignment.count

    @property
    def unaligned(self) -> bool:
        """Whether updates of the action encoder alone are still to be made, before all others."""
        return self.aligned < (self.cfg.align_updates or 0)

    def align(self, batch: TensorDictBase) -> dict[str, torch.Tensor]:
        """One update of the action encoder towards the pre-trained latent actions."""
        assert self.alignment is not None
        with self.watch("alignment"):
            return self.alignment(batch)

    def state_dict(self) -> dict[str, Any]:
        return {
            "agent": self.agent.state_dict(),
            "model_update": self.model_update.state_dict(),
            "behavior_update": self.behavior_update.state_dict(),
            "alignment": None if self.alignment is None else self.alignment.state_dict(),
            "clips": None if self.clips is None else self.clips.state_dict(),
            "pretrained": self.pretrained,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        load_weights(self.agent, state["agent"], "the checkpoint of the run")
        self.model_update.load_state_dict(state["model_update"])
        self.behavior_update.load_state_dict(state["behavior_update"])
        if self.alignment is not None:
            self.alignment.load_state_dict(state["alignment"])
        if self.clips is not None:
            self.clips.load_state_dict(state["clips"])
        before = state.get("pretrained") or self.pretrained  # an older checkpoint has none
        needed = self.unaligned or self.cfg.rehearse or is_moved(self.cfg)
        if needed and self.pretrained not in (None, before):
            raise ValueError(
                f"the weights of pretrained={self.cfg.pretrained} are others than those that the "
                f"run in {self.cfg.run} began with: bring them back, or start a new run"
            )
        self.pretrained = before


def make_learner(
    cfg: FinetuneConfig,
    known: Mapping[str, Any],
    device: torch.device,
    watch: Stopwatch,
    processes: Processes,
) -> Learner:
    """Networks, losses and optimizers, with the pre-trained weights if there are any.

    ``known`` is of the environment, see :func:`prelar_trl.recipes.environments.interface`.

    Raises:
        ValueError: settings, or a pre-training run, that do not go together.
    """
    agent = make_agent(cfg.method, size=cfg.size, **known, **cfg.model)
    if agent.video_bonus is not None and cfg.batch_length < agent.video_bonus.window:
        raise ValueError(
            f"batch_length={cfg.batch_length} is shorter than the video bonus's window of "
            f"{agent.video_bonus.window} frames: raise it"
        )
    pretrained = read_pretrained_run(cfg)
    if pretrained and not cfg.resume:
        copy_pretrained(agent.world_model, pretrained["model"], cfg.load)
        if anew := added_inputs(agent.world_model):
            processes.say(f"not seen in {cfg.pretrained}, starts anew: {', '.join(anew)}")
    accelerate(agent.to(device).eval())
    alignment = rehearsal = clips = None
    if cfg.align_updates:
        alignment = make_alignment(cfg, agent.world_model, pretrained, device)
    loss = make_world_model_loss(
        cfg.method, "finetune", agent.world_model, video_bonus=agent.video_bonus, **cfg.loss
    ).to(device)
    if cfg.rehearse:
        rehearsal = make_rehearsal(cfg, loss, pretrained, device)
        clips = rehearsed_clips(cfg, rehearsal, pretrained["config"], device, processes)
    model_update = WorldModelUpdate(
        loss,
        lr=cfg.lr,
        frozen_updates=cfg.frozen_updates if cfg.pretrained else None,
        pretrained_lr=cfg.pretrained_lr,
        pretrained=PRETRAINED_PARTS if cfg.load is None else cfg.load,
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
        gradient_mix=cfg.actor_gradient_mix,
        slow_every=cfg.slow_every,
        slow_target_fraction=cfg.slow_target_fraction,
        reward_norm_momentum=cfg.reward_norm_momentum,
        imag_batch=cfg.imag_batch and processes.share("imag_batch", cfg.imag_batch),
        clip=cfg.clip,
        precision=cfg.precision,
    )
    for update in (model_update, behavior_update):
        prepare_update(update, cfg.compile, processes)
    if alignment is not None:  # the model's update trains the action encoder, too
        prepare_update(alignment, "off", processes, overlap=False)
    weights = fingerprint(pretrained["model"]) if pretrained else None
    return Learner(cfg, agent, model_update, behavior_update, alignment, clips, weights, watch)


def is_moved(cfg: FinetuneConfig) -> bool:
    """Whether the run that goes on names another place of the pre-trained one than before."""
    before = RunFolder.load(cfg.run).config.get("pretrained")
    return map_paths(absolute, cfg.pretrained) != map_paths(absolute, before)


def read_pretrained_run(cfg: FinetuneConfig) -> Pretrained:
    """The pre-training run; empty where there is none, or this run needs nothing of it.

    Raises:
        ValueError: it does not suit this run.
    """
    for name in ("align_updates", "rehearse", "load", "pretrained_lr"):
        if getattr(cfg, name) not in (None, 0) and cfg.pretrained is None:
            raise ValueError(f"{name}={getattr(cfg, name)} needs a pre-training run: pretrained=")
    needed = not cfg.resume or cfg.align_updates or cfg.rehearse or is_moved(cfg)
    if cfg.pretrained is None or not needed:
        return {}
    if is_export(cfg.pretrained):
        checkpoint = read_export(cfg.pretrained, trust_code=cfg.trust_code, typed=cfg.model)
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
    cfg: FinetuneConfig, world_model: RSSMWorldModel, pretrained: Pretrained, device: torch.device
) -> Alignment:
    """What aligns the action encoder with the pre-trained latent actions."""
    if world_model.action_encoder is None:
        raise ValueError(
            f"align_updates={cfg.align_updates}: method={cfg.method} has no action encoder"
        )
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
    cfg: FinetuneConfig, loss: RSSMWorldModelLoss, pretrained: Pretrained, device: torch.device
) -> Rehearsal:
    """The video's share of the loss."""
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
    config: Mapping[str, Any],
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
    if config.get("data") is None:
        raise ValueError(
            f"rehearse={cfg.rehearse}: the run pretrained={cfg.pretrained} was imported and names "
            "no videos; use rehearse=0"
        )
    streams = [key for key in rehearsal.loss.world_model.in_keys if key in ("pixels", "flow")]
    return VideoClips(
        config["data"],
        clip_len=min(cfg.batch_length, config["clip_len"]),
        batch_size=min(max(1, round(cfg.rehearse * rows)), rows - 1),
        seed=cfg.seed,
        device=device,
        streams=streams,
        split="train" if config["heldout"] else "all",
        heldout=config["heldout"],
        prefetch=prefetched(cfg, device),
        rank=processes.rank,
        world_size=processes.size,
    )
