"""What fine-tuning trains: the agent and its updates, as one object that is saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDictBase

from prelar_trl.config import PRETRAINED_PARTS
from prelar_trl.data import VideoClips
from prelar_trl.fast import accelerate
from prelar_trl.models import Agent, copy_pretrained, make_agent, make_world_model_loss
from prelar_trl.pretrained import added_inputs, load_weights
from prelar_trl.recipes.common import prepare_update
from prelar_trl.recipes.pretrained import (
    make_alignment,
    make_rehearsal,
    read_pretrained_run,
    rehearsed_clips,
)
from prelar_trl.recipes.processes import Processes
from prelar_trl.recipes.schema import FinetuneConfig
from prelar_trl.stopwatch import Stopwatch
from prelar_trl.updates import Alignment, BehaviorUpdate, Update, WorldModelUpdate


@dataclass
class Learner:
    """The agent with its updates; ``alignment`` and rehearsed ``clips`` where a run has them."""

    agent: Agent
    model_update: WorldModelUpdate
    behavior_update: BehaviorUpdate
    behavior_after: int  # updates of the model alone
    alignment: Alignment | None
    align_updates: int
    clips: VideoClips | None
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
        self, batch: TensorDictBase, watch: Callable[..., None] = lambda *batches: None
    ) -> TensorDictBase:
        """One update of the world model, and of the behavior from the states that it infers.

        Args:
            batch: of the replay.
            watch: is shown all that goes into the update.

        Returns:
            The losses, scalars.
        """
        batches = [batch]
        if self.clips is not None:
            with self.watch("replay"):
                batches.append(self.clips.sample())
        watch(*batches)
        with self.watch("world_model"):
            losses = self.model_update(*batches)
        state = losses.pop("state")
        assert isinstance(state, TensorDictBase)
        if self.model_update.count <= self.behavior_after:
            self.agent.eval()  # it acts now
            return losses
        with self.watch("behavior"):
            state.update(batch.select("terminated", "action"))
            return losses.update(self.behavior_update(state))

    @property
    def aligned(self) -> int:
        """Updates of the action encoder alone that were made."""
        return 0 if self.alignment is None else self.alignment.count

    @property
    def unaligned(self) -> bool:
        """Whether they come first."""
        return self.alignment is not None and self.aligned < self.align_updates

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
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        load_weights(self.agent, state["agent"], "the checkpoint of the run")
        self.model_update.load_state_dict(state["model_update"])
        self.behavior_update.load_state_dict(state["behavior_update"])
        if self.alignment is not None:
            self.alignment.load_state_dict(state["alignment"])
        if self.clips is not None:
            self.clips.load_state_dict(state["clips"])


def make_learner(
    cfg: FinetuneConfig,
    known: Mapping[str, Any],
    device: torch.device,
    watch: Stopwatch,
    processes: Processes,
) -> Learner:
    """Networks, losses and optimizers, with the pre-trained weights if there are any.

    Args:
        known: of the environment, see :func:`prelar_trl.recipes.environments.interface`.
        processes: those that share each batch.

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
    parts = PRETRAINED_PARTS if cfg.load is None else cfg.load
    if pretrained is not None and not cfg.resume:
        copy_pretrained(agent.world_model, pretrained["model"], parts)
        if anew := added_inputs(agent.world_model):
            processes.say(f"not seen in {cfg.pretrained}, starts anew: {', '.join(anew)}")
    accelerate(agent.to(device).eval())
    alignment = make_alignment(cfg, agent.world_model, pretrained, device)
    loss = make_world_model_loss(
        cfg.method,
        "finetune",
        agent.world_model,
        video_bonus=agent.video_bonus,
        **cfg.loss,
    ).to(device)
    rehearsal = make_rehearsal(cfg, loss, pretrained, device)
    clips = None
    if rehearsal is not None:
        clips = rehearsed_clips(cfg, rehearsal, pretrained, device, processes)
    model_update = WorldModelUpdate(
        loss,
        lr=cfg.lr,
        frozen_updates=cfg.frozen_updates if cfg.pretrained else None,
        pretrained_lr=cfg.pretrained_lr,
        pretrained=parts,
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
    return Learner(
        agent,
        model_update,
        behavior_update,
        cfg.behavior_after,
        alignment,
        cfg.align_updates or 0,
        clips,
        watch,
    )
