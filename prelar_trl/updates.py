"""One training step of the world model, and one of actor and critic."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, cast, get_args

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from prelar_trl.collectives import ProcessGroup, joint_mean
from prelar_trl.config import PRETRAINED_PARTS
from prelar_trl.models import Agent, pretrained_modules
from prelar_trl.modules.actions import ActionEncoder, LatentActionEncoder
from prelar_trl.modules.pixels import normalize_pixels
from prelar_trl.modules.world_model import RSSMWorldModel
from prelar_trl.objectives import (
    ActorLoss,
    CriticLoss,
    LambdaTarget,
    RSSMWorldModelLoss,
    total_loss,
)
from prelar_trl.objectives.behavior import RewardNorm
from prelar_trl.rehearsal import Rehearsal
from prelar_trl.rollback import Rollback
from prelar_trl.schedules import Schedule
from prelar_trl.utils import check_choice

__all__ = ["Alignment", "BehaviorUpdate", "WorldModelUpdate", "frozen"]

Precision = Literal["32", "bf16"]


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """No gradient for the modules' parameters inside; what was frozen before stays so after."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def make_adam(parameters: Iterable[Tensor], lr: float) -> Adam:
    """Adam as published: eps 1e-5, L2 weight decay 1e-6 on everything."""
    trained = [p for p in parameters if p.requires_grad]
    fused = all(p.device.type in ("cpu", "cuda") for p in trained)  # not on the meta device
    return Adam(trained, lr=lr, eps=1e-5, weight_decay=1e-6, fused=fused)


def step_unless(skip: Tensor, optimizer: Optimizer) -> None:
    """Step unless ``skip``, bool [], whose value the host waits for."""
    if skip.is_meta or not skip:  # without values: as if all were well
        optimizer.step()


class Update:
    """Base of the updates: loss and gradient, optimizers by name, saving and loading.

    One whose loss or gradient is not finite is skipped: no optimizer steps.

    Args:
        module: has the parameters that are trained.
        precision: ``32``, or ``bf16`` for autocast.
        clip: largest global gradient norm of an optimizer's parameters.

    Attributes:
        count: updates so far, skipped ones among them.
        skipped, skipped_in_a_row: how many, on the loss's device: only who reads them waits.
        step_unless: of an optimizer; see :func:`prelar_trl.fast.skip_on_device`.
        cure: settings that may help where all are skipped.
    """

    step_unless: Callable[[Tensor, Optimizer], None] = staticmethod(step_unless)
    process_group: ProcessGroup | None = None  # whose processes share the batch
    cure = "a lower lr, or precision=32"

    def __init__(self, module: nn.Module, precision: Precision, clip: float) -> None:
        check_choice("precision", precision, get_args(Precision))
        self.module, self.mixed, self.clip = module, precision == "bf16", clip
        self.optimizers: dict[str, Optimizer] = {}
        self.count = 0
        self.skipped = self.skipped_in_a_row = torch.zeros((), dtype=torch.int64)

    def losses(self, *inputs: Any) -> TensorDict:
        """The losses of these inputs, ``loss_*`` entries among them."""
        raise NotImplementedError

    def forward_backward(self, *inputs: Any) -> TensorDict:
        """Add the gradient of the losses' sum to the parameters' ``grad``; the losses, detached."""
        losses = self.losses(*inputs)
        total_loss(losses).backward()
        return losses.detach()

    def autocast(self, device: torch.device) -> AbstractContextManager:
        return torch.autocast(device.type, torch.bfloat16) if self.mixed else nullcontext()

    def step_optimizers(self, loss: Tensor) -> dict[str, Tensor]:
        """Clip the global norm of each optimizer's gradients, step, clear; the norms before.

        If the loss or a norm is NaN or infinite, all parameters and moments stay as they are.
        """
        norms = {}
        for name, optimizer in self.optimizers.items():
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            norms[f"grad_norm_{name}"] = clip_grad_norm_(parameters, self.clip)
        skip = ~torch.stack([loss, *norms.values()]).isfinite().all()
        for optimizer in self.optimizers.values():
            self.step_unless(skip, optimizer)
            optimizer.zero_grad(set_to_none=True)
        self.skipped = self.skipped.to(skip.device) + skip
        self.skipped_in_a_row = (self.skipped_in_a_row.to(skip.device) + 1) * skip
        return norms

    def state_dict(self) -> dict:
        optimizers = {name: o.state_dict() for name, o in self.optimizers.items()}
        return {"count": self.count, "skipped": int(self.skipped), "optimizers": optimizers}

    def load_state_dict(self, state: dict) -> None:
        self.count = state["count"]
        self.skipped = torch.tensor(state.get("skipped", 0))
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])


class WorldModelUpdate(Update):
    """Loss, backward, clip, step.

    Args:
        loss: the world-model loss; its network is put into training mode.
        lr: learning rate. Default: 3e-4.
        frozen_updates: the pre-trained encoder and RSSM form a group of their own that does not
            move during the first ``frozen_updates`` updates; None: one group. Default: None.
        pretrained_lr: learning rate of that group, which there then is. Default: ``lr``.
        pretrained: the parts that were loaded, of ``config.PRETRAINED_PARTS``. Default: all.
        clip: largest global gradient norm of a group. Default: 100.
        precision: ``32``, or ``bf16`` for autocast. Default: ``32``.
        rehearsal: pre-training video that is rehearsed. Default: none.
    """

    def __init__(
        self,
        loss: RSSMWorldModelLoss,
        *,
        lr: float = 3e-4,
        frozen_updates: int | None = None,
        pretrained_lr: float | None = None,
        pretrained: Collection[str] = PRETRAINED_PARTS,
        clip: float = 100.0,
        precision: Precision = "32",
        rehearsal: Rehearsal | None = None,
    ) -> None:
        super().__init__(loss, precision, clip)
        self.loss, self.rehearsal = loss, rehearsal
        model = cast(RSSMWorldModel, loss.world_model)
        groups = {"model": list(loss.parameters())}
        modules = pretrained_modules(model)
        loaded = [
            p
            for name, module in modules.items()
            if name in pretrained and name != "decoder"
            for p in module.parameters()
        ]
        if loaded and (frozen_updates is not None or pretrained_lr is not None):
            own = {id(p) for p in loaded}
            groups = {
                "pretrained": loaded,
                "model": [p for p in loss.parameters() if id(p) not in own],
            }
        rates = {"model": lr, "pretrained": lr if pretrained_lr is None else pretrained_lr}
        self.optimizers = {name: make_adam(params, rates[name]) for name, params in groups.items()}
        self.scheduler = None
        if "pretrained" in groups and frozen_updates is not None:
            self.scheduler = LambdaLR(
                self.optimizers["pretrained"], lambda update: float(update >= frozen_updates)
            )

    def __call__(self, batch: TensorDictBase, video: TensorDictBase | None = None) -> TensorDict:
        """Train on a batch ``[B, T]``; returns the losses and the posterior ``state``.

        With ``rehearsal``, ``video`` is a batch of clips.
        """
        self.loss.train()
        if self.rehearsal is not None:
            self.rehearsal.train()
        buffers = Rollback(self.module.buffers())
        losses = self.forward_backward(batch, video)
        losses.update(self.step_optimizers(total_loss(losses)))
        buffers.undo_if(self.skipped_in_a_row > 0)  # statistics know no skipped batch
        if self.scheduler is not None:
            self.scheduler.step()
        self.count += 1
        return losses

    def losses(self, batch: TensorDictBase, video: TensorDictBase | None) -> TensorDict:
        with self.autocast(cast(Tensor, batch["pixels"]).device):
            losses = self.loss(batch)
            return losses if self.rehearsal is None else self.rehearsal(losses, video)

    def own_tensors(self) -> dict[str, Tensor]:
        """What the loss has beside its networks: temperature, heads of labels, counters."""
        if self.loss.latent_action is None:
            return {}
        state = self.loss.latent_action.state_dict()
        networks = ("dynamics.", "latent_actions.")
        return {name: x for name, x in state.items() if not name.startswith(networks)}

    def state_dict(self) -> dict:
        state = {**super().state_dict(), "loss": self.own_tensors()}
        if self.scheduler is not None:
            state["scheduler"] = {"last_epoch": self.scheduler.last_epoch}
        return state

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        if self.loss.latent_action is not None:
            self.loss.latent_action.load_state_dict(state["loss"], strict=False)
        if self.scheduler is not None:
            self.scheduler.last_epoch = state["scheduler"]["last_epoch"]


class Alignment(Update):
    """Regresses the action encoder on the latent actions that the inverse model infers.

    Before fine-tuning the action encoder is random, and the pre-trained dynamics gets latent
    actions that mean nothing to it. Here ``action_encoder(a_t)`` learns ``u_t(x_{t-1}, x_t)``.

    Args:
        action_encoder: it alone is trained.
        inverse_model: of the pre-training run; stands still.
        lr: learning rate of Adam. Default: 1e-3.
        preprocess: pixels -> what the inverse model sees. Default: in [-0.5, 0.5].
    """

    cure = "a lower align_lr"

    def __init__(
        self,
        action_encoder: ActionEncoder,
        inverse_model: LatentActionEncoder,
        lr: float = 1e-3,
        preprocess: Callable[[Tensor], Tensor] = normalize_pixels,
    ) -> None:
        super().__init__(action_encoder, "32", clip=100.0)
        self.action_encoder, self.inverse_model = action_encoder, inverse_model.eval()
        self.preprocess = preprocess
        self.optimizers = {"align": make_adam(action_encoder.parameters(), lr)}

    def __call__(self, batch: TensorDictBase) -> dict[str, Tensor]:
        """Train on ``pixels, action, is_first`` ``[B, T]``.

        Returns:
            ``align_error``, the mean squared error, and ``align_r2``, the share of the latent
            actions' variance that the true actions explain: both of the batch that it learns from.
        """
        losses = self.forward_backward(batch)
        self.step_optimizers(total_loss(losses))
        self.count += 1
        return {name: losses[name] for name in ("align_error", "align_r2")}

    def losses(self, batch: TensorDictBase) -> TensorDict:
        def joint_sum(x: Tensor) -> Tensor:  # over the processes their mean, as of losses
            return joint_mean((x * known).sum((0, 1)), self.process_group)

        known = ~batch["is_first"][:, 1:]  # [B, T-1, 1]
        with torch.no_grad():
            target, _ = self.inverse_model(self.preprocess(batch["pixels"]), sample=False)
            target = target[:, 1:]
            count = joint_sum(torch.ones_like(target[..., :1])).clamp_min(1e-6)
            mean = joint_sum(target) / count
            variance = joint_sum((target - mean).square()) / count
        latent, _ = self.action_encoder(batch["action"], sample=False, is_first=batch["is_first"])
        error = joint_sum((latent[:, 1:] - target).square()) / count  # [U]
        r2 = 1 - error.detach().sum() / variance.sum().clamp_min(1e-8)
        loss = error.mean()
        return TensorDict({"loss_align": loss, "align_error": loss.detach(), "align_r2": r2})


class BehaviorUpdate(Update):
    """Imagine, then train actor and critic on the imagined trajectories.

    Args:
        agent: the networks; the world model is not trained here.
        horizon: imagined steps, at least 2: the actor learns from the second on. Default: 15.
        lmbda: lambda of the return. Default: 0.95.
        actor_lr, critic_lr: learning rates. Default: 8e-5.
        entropy_scale, gradient, gradient_mix: see :class:`ActorLoss`; the numbers also as a
            :class:`Schedule` in text, by the updates of this object. Default of the mix: 0.1.
        slow_every: updates from copy to copy of the slow critic, the first included. Default: 100.
        slow_target_fraction: how far the slow critic moves to the critic then; the first time all
            the way. Default: 1.
        reward_norm_momentum: see :class:`RewardNorm`. Default: 1, which is off.
        imag_batch: start from that many random states instead of all. Default: all.
        clip, precision: see :class:`WorldModelUpdate`.
    """

    def __init__(
        self,
        agent: Agent,
        *,
        horizon: int = 15,
        lmbda: float = 0.95,
        actor_lr: float = 8e-5,
        critic_lr: float = 8e-5,
        entropy_scale: float | str = 1e-4,
        gradient: Literal["dynamics", "reinforce", "both"] = "dynamics",
        gradient_mix: float | str = 0.1,
        slow_every: int = 100,
        slow_target_fraction: float = 1.0,
        reward_norm_momentum: float = 1.0,
        imag_batch: int | None = None,
        clip: float = 100.0,
        precision: Precision = "32",
    ) -> None:
        super().__init__(agent, precision, clip)
        if horizon < 2:
            raise ValueError(
                f"horizon={horizon} must be at least 2: the first step trains no actor"
            )
        self.agent, self.horizon = agent, horizon
        if not 0 < slow_target_fraction <= 1:
            raise ValueError(f"slow_target_fraction={slow_target_fraction} must lie in (0, 1]")
        self.slow_every, self.imag_batch = slow_every, imag_batch
        self.slow_target_fraction = slow_target_fraction
        device = next(agent.parameters()).device
        self.reward_norm = RewardNorm(reward_norm_momentum).to(device)
        self.target = LambdaTarget(agent.slow_critic, lmbda)
        schedules = {"entropy_scale": entropy_scale, "mix": gradient_mix}
        self.schedules = {name: Schedule.parse(value) for name, value in schedules.items()}
        # What changes is a tensor, which a recorded or compiled update reads anew.
        values: dict[str, Any] = {
            name: schedule(0) if schedule.is_constant else torch.tensor(schedule(0), device=device)
            for name, schedule in self.schedules.items()
        }
        self.actor_loss = ActorLoss(gradient=gradient, **values)
        self.critic_loss = CriticLoss(agent.critic, delay_value=False)
        self.optimizers = {
            "actor": make_adam(agent.actor.parameters(), actor_lr),
            "critic": make_adam(agent.critic.parameters(), critic_lr),
        }

    def __call__(self, start: TensorDictBase, sample: bool = True) -> TensorDict:
        """Train from the posterior states ``stoch, deter`` of a batch; returns the losses."""
        self.agent.eval()
        if self.imag_batch is not None:
            start = self.agent.world_model.flatten_start_states(start)
            start = start[torch.randperm(len(start), device=start["deter"].device)]
            start = start[: self.imag_batch]
        for name, schedule in self.schedules.items():
            if not schedule.is_constant:
                getattr(self.actor_loss, name).fill_(schedule(self.count))
        before = self.reward_norm.magnitude.clone()
        with frozen(self.agent.world_model):
            losses = self.forward_backward(start, sample)
        losses.update(self.step_optimizers(total_loss(losses)))
        magnitude = self.reward_norm.magnitude  # knows no skipped batch
        magnitude.copy_(torch.where(self.skipped_in_a_row > 0, before, magnitude))
        if self.count % self.slow_every == 0:
            self.move_slow_critic(self.slow_target_fraction if self.count else 1.0)
        self.count += 1
        return losses

    @torch.no_grad()
    def move_slow_critic(self, fraction: float) -> None:
        """Move the slow critic's weights that share of the way to the critic's."""
        critics = (self.agent.slow_critic, self.agent.critic)
        for slow, weight in zip(*(critic.parameters() for critic in critics), strict=True):
            slow.lerp_(weight, fraction)

    def state_dict(self) -> dict:
        return {**super().state_dict(), "reward_norm": self.reward_norm.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        if "reward_norm" in state:
            self.reward_norm.load_state_dict(state["reward_norm"])

    def losses(self, start: TensorDictBase, sample: bool) -> TensorDict:
        with self.autocast(cast(Tensor, start["deter"]).device):
            imagined = self.agent.world_model.imagine(self.agent.actor, start, self.horizon, sample)
            imagined["reward"] = self.reward_norm(imagined["reward"])
            imagined = self.target(imagined)
            return self.actor_loss(imagined).update(self.critic_loss(imagined))
