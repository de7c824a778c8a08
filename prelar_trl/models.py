"""World models, agents and losses of every system of the paper, built from their presets."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from prelar_trl.config import ModelSettings, Phase, find_preset, loss_settings, model_settings
from prelar_trl.modules.actions import FRAME_CHANNELS, ActionEncoder, LatentActionEncoder
from prelar_trl.modules.context import ContextDecoder, ContextEncoder
from prelar_trl.modules.convnets import CNNDecoder, CNNEncoder, ResNetDecoder, ResNetEncoder
from prelar_trl.modules.heads import MLP, Actor
from prelar_trl.modules.latent_actions import LatentActions, make_latent_actions
from prelar_trl.modules.patchnets import PatchDecoder, PatchEncoder
from prelar_trl.modules.rssm import RSSM
from prelar_trl.modules.world_model import RSSMWorldModel
from prelar_trl.objectives import LatentActionLoss, RSSMWorldModelLoss, VideoBonus
from prelar_trl.objectives.common import check_weights

__all__ = [
    "Agent",
    "load_pretrained",
    "make_agent",
    "make_inverse_model",
    "make_world_model",
    "make_world_model_loss",
    "pretrained_modules",
]


class Agent(nn.Module):
    """World model, actor, critics and bonus of a fine-tuning run."""

    def __init__(
        self, world_model: RSSMWorldModel, actor: Actor, critic: MLP, bonus: VideoBonus | None
    ):
        super().__init__()
        self.world_model, self.actor, self.critic = world_model, actor, critic
        # Equal to the critic from the start; in the authors' code its first target is random.
        self.slow_critic = copy.deepcopy(critic).requires_grad_(False)
        self.video_bonus = bonus


def make_world_model(
    method: str,
    phase: Phase,
    *,
    action_dim: int,
    size: str = "full",
    encoder: nn.Module | None = None,
    decoder: nn.Module | None = None,
    sample: bool = True,
    **overrides: Any,
) -> RSSMWorldModel:
    """The world model of a method.

    Args:
        method: ``dreamerv2 | apv | contextwm | prelar | prelar_no_cl | prelar_no_al_cl | naive |
            prelar_naive | prelar_plus``.
        phase: ``pretrain`` or ``finetune``.
        action_dim: size of the real action (fine-tuning).
        size: ``full`` (as published), ``small``, ``tiny``, or ``mini``, for a CPU. Default:
            ``full``.
        encoder: your own image encoder, ``[N, 3, 64, 64]`` -> ``[N, embed_dim]``, with the
            attribute ``embed_dim``. Default: the method's.
        decoder: your own image decoder, ``[N, F]`` -> ``[N, 3, 64, 64]``. Default: the method's.
        sample: draw latents; False takes modes. Default: True.
        overrides: fields of :class:`ModelSettings`.

    Raises:
        ValueError: an unknown name or a method without that phase.
    """
    s = model_settings(method, phase, size, overrides)
    network = {"depth": s.depth, "stages": s.stages, "layers": s.layers, "norm": s.norm}
    if encoder is None:
        encoder = _make_encoder(s, 3, network)
    dynamics = {
        "stoch": s.stoch,
        "classes": s.classes,
        "deter": s.deter,
        "hidden": s.hidden,
        "ensemble": s.ensemble,
    }
    latent_action_encoder = action_encoder = lower_rssm = context_encoder = None
    latent_dim, embed_dim = action_dim, cast(int, encoder.embed_dim)
    if s.actions == "latent":
        latent_actions = _make_latent_actions(s)
        latent_action_encoder = LatentActionEncoder(
            _make_encoder(s, FRAME_CHANNELS[s.frames], network),
            latent_actions,
            frames=s.frames,
            hidden=s.latent_action_hidden,
            shift=s.latent_action_shift,
        )
        latent_dim = latent_actions.dim
    elif s.actions == "encoded":
        latent_actions = _make_action_code(s)
        action_encoder = ActionEncoder(
            action_dim, latent_actions, hidden=s.latent_action_hidden, window=s.action_window
        )
        latent_dim = latent_actions.dim
    width = latent_dim if s.action_width is None else s.action_width
    if s.stacked:
        lower_rssm = RSSM(width, embed_dim, **dynamics)
        embed_dim = lower_rssm.feat_dim + (embed_dim if s.concat_embed else 0)
    rssm = RSSM(width, embed_dim, **dynamics)
    if s.images == "context":
        context_encoder = ContextEncoder(**network, augmentation=s.augmentation)
    if decoder is None:
        decoder = _make_decoder(s, rssm.feat_dim, network)
    world_model = RSSMWorldModel(
        encoder,
        decoder,
        rssm,
        heads={name: MLP(rssm.feat_dim, 1, s.head_layers, s.head_units) for name in s.heads},
        grad_heads=s.grad_heads,
        lower_rssm=lower_rssm,
        concat_embed=s.concat_embed,
        latent_action_encoder=latent_action_encoder,
        action_encoder=action_encoder,
        action_free=s.actions == "none",
        context_encoder=context_encoder,
        discount=s.discount,
        sample=sample,
    )
    return _initialize(world_model)


def make_agent(
    method: str,
    *,
    action_dim: int,
    size: str = "full",
    encoder: nn.Module | None = None,
    decoder: nn.Module | None = None,
    sample: bool = True,
    **overrides: Any,
) -> Agent:
    """World model, actor, critics and bonus of a method's fine-tuning; see make_world_model."""
    s = model_settings(method, "finetune", size, overrides)
    world_model = make_world_model(
        method,
        "finetune",
        action_dim=action_dim,
        size=size,
        encoder=encoder,
        decoder=decoder,
        sample=sample,
        **overrides,
    )
    feat_dim = world_model.rssm.feat_dim
    actor = _initialize(Actor(feat_dim, action_dim, s.head_layers, s.head_units))
    critic = _initialize(MLP(feat_dim, 1, s.head_layers, s.head_units))
    bonus = None
    if s.bonus_embed is not None:
        bonus = VideoBonus(
            cast(int, world_model.encoder.embed_dim) if s.bonus_embed == "embed" else feat_dim,
            k=s.bonus_neighbors,
            window=s.bonus_window,
            projection_dim=s.bonus_projection,
            memory_size=s.bonus_memory,
            embed_key=("lower", "feat") if s.bonus_embed == "lower" else s.bonus_embed,
        )
    return Agent(world_model, actor, critic, bonus)


def make_world_model_loss(
    method: str,
    phase: Phase,
    world_model: RSSMWorldModel,
    *,
    video_bonus: VideoBonus | None = None,
    weights: Mapping[str, float | None] | None = None,
    action_dim: int | None = None,
    **overrides: Any,
) -> RSSMWorldModelLoss:
    """The loss of a method.

    Args:
        world_model: from :func:`make_world_model` with the same method and phase.
        video_bonus: the agent's bonus, in fine-tuning.
        weights: weights that replace the preset's one by one; ``None`` as a weight removes a term.
        action_dim: size of the true actions that ``action_label`` reads from latent ones.
        overrides: further fields of :class:`LossSettings`.
    """
    preset = find_preset(method, phase)
    s = loss_settings(overrides)
    merged = {**getattr(preset, f"{phase}_weights"), **(weights or {})}
    kind = None
    if world_model.latent_action_encoder is not None:
        kind = world_model.latent_action_encoder.latent_actions
    latent_terms = LatentActionLoss.TERMS + (kind.outputs().losses if kind is not None else ())
    check_weights(dict.fromkeys(merged, 0), (*RSSMWorldModelLoss.TERMS, *latent_terms))
    latent_weights = {name: merged.pop(name) for name in latent_terms if name in merged}
    merged = {name: weight for name, weight in merged.items() if weight is not None}
    for name in ("reward", "aux_reward", "discount"):
        if (name in merged) != (name in world_model.heads):
            raise ValueError(
                f"method={method}, phase={phase}: {name!r} needs both a head (model.heads) and a "
                f"weight (loss.weights), but has {'a weight' if name in merged else 'a head'} only"
            )
    if "af_kl" in merged and world_model.lower_rssm is None:
        raise ValueError(f"method={method} has no lower RSSM in phase={phase}: remove weight af_kl")
    latent = world_model.rssm.latent.kind
    latent_action_loss = None
    if kind is None and any(weight is not None for weight in latent_weights.values()):
        raise ValueError(
            f"method={method} has no latent actions in phase={phase}, "
            f"so it cannot weigh {', '.join(latent_weights)}"
        )
    if kind is not None:
        latent_action_loss = LatentActionLoss(
            world_model.rssm,
            kind,
            weights=latent_weights,
            latent=latent,
            consistency=s.consistency,
            free_nats=s.latent_free_nats,
            warmup=s.latent_warmup,
            warmup_start=s.latent_warmup_start,
            negatives=s.negatives,
            temperature=s.temperature,
            contrast_dynamics=s.contrast_dynamics,
            action_dim=action_dim,
        )
    loss = RSSMWorldModelLoss(
        world_model,
        weights=merged,
        latent=latent,
        kl_balance=s.kl_balance,
        free_nats=s.free_nats,
        free_avg=s.free_avg,
        discount=world_model.discount,
        latent_action=latent_action_loss,
        video_bonus=video_bonus,
        bonus_scale=s.bonus_scale,
    )
    if video_bonus is not None:
        loss.set_keys(bonus_embed=video_bonus.embed_key)
    return loss


def pretrained_modules(world_model: RSSMWorldModel) -> dict[str, nn.Module]:
    """The parts that a pre-training run supplies, by their name there."""
    modules = {
        "encoder": world_model.encoder,
        "decoder": world_model.decoder,
        "rssm": world_model.lower_rssm or world_model.rssm,
        "context_encoder": world_model.context_encoder,
    }
    return {name: module for name, module in modules.items() if module is not None}


def load_pretrained(world_model: RSSMWorldModel, state: Mapping[str, Tensor]) -> None:
    """Copy encoder, decoder and RSSM of a pre-trained world model's ``state_dict``.

    An action encoder that gives the same kind of latent action gets what that kind has learned.

    Raises:
        ValueError: naming every tensor that is missing or has another shape; nothing is copied.
    """
    problems, parts = [], {}
    modules = pretrained_modules(world_model)
    if world_model.action_encoder is not None:
        kind, name = (
            world_model.action_encoder.latent_actions,
            "latent_action_encoder.latent_actions",
        )
        if any(f"{name}.{key}" in state for key in kind.state_dict()):
            modules[name] = kind
    for name, module in modules.items():
        prefix = name + "."
        part = {key[len(prefix) :]: x for key, x in state.items() if key.startswith(prefix)}
        own = module.state_dict()
        problems += [f"{prefix}{key} is missing" for key in own.keys() - part.keys()]
        problems += [f"{prefix}{key} has no place" for key in part.keys() - own.keys()]
        problems += [
            f"{prefix}{key} is {tuple(part[key].shape)} there and {tuple(own[key].shape)} here"
            for key in own.keys() & part.keys()
            if part[key].shape != own[key].shape
        ]
        parts[name] = part
    if problems:
        shown = "; ".join(sorted(problems)[:4])
        raise ValueError(
            f"the pre-trained run does not fit: {len(problems)} tensors differ ({shown}); "
            "use the size and model options it was trained with"
        )
    for name, module in modules.items():
        module.load_state_dict(parts[name])


def make_inverse_model(checkpoint: Mapping[str, Any]) -> LatentActionEncoder:
    """The latent-action encoder of a pre-training checkpoint, frozen and in evaluation mode.

    Raises:
        ValueError: the run has no latent actions.
    """
    method = checkpoint["method"]
    world_model = make_world_model(
        method, "pretrain", action_dim=0, size=checkpoint["size"], **checkpoint["overrides"]
    )
    inverse_model = world_model.latent_action_encoder
    if inverse_model is None:
        raise ValueError(f"a pre-training run of method={method} has no latent actions")
    world_model.load_state_dict(checkpoint["model"])
    return inverse_model.requires_grad_(False).eval()


def _make_encoder(s: ModelSettings, channels: int, network: Mapping[str, Any]) -> nn.Module:
    if s.images == "cnn":
        return (PatchEncoder if s.patches else CNNEncoder)(channels, s.depth)
    return ResNetEncoder(channels, **network)


def _make_latent_actions(s: ModelSettings) -> LatentActions:
    """The kind that pre-training infers."""
    shared = {"classes": s.latent_action_classes, "deter_size": s.latent_action_deter}
    return make_latent_actions(
        s.latent_action, size=s.latent_action_size, shared=shared, **s.latent_action_options
    )


def _make_action_code(s: ModelSettings) -> LatentActions:
    """The kind that the action encoder gives: as wide as the latent actions of pre-training."""
    latent_actions = _make_latent_actions(s)
    if s.action_code == s.latent_action:
        return latent_actions
    shared = {"classes": s.latent_action_classes, "deter_size": s.latent_action_deter}
    return make_latent_actions(s.action_code, size=latent_actions.dim, shared=shared)


def _make_decoder(s: ModelSettings, feat_dim: int, network: Mapping[str, Any]) -> nn.Module:
    match s.images:
        case "cnn":
            return (PatchDecoder if s.patches else CNNDecoder)(feat_dim, s.depth)
        case "resnet":
            return ResNetDecoder(feat_dim, **network)
        case "context":
            return ContextDecoder(
                feat_dim, **network, mask=s.context_mask, dropout=s.context_dropout
            )


@torch.no_grad()
def _initialize(module: nn.Module) -> Any:
    """Xavier-uniform weights and zero biases of linear and convolution layers."""
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return module
