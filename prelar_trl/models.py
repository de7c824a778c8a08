"""World models, agents and losses of every system of the paper, built from their presets."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

from torch import nn

from prelar_trl.config import ModelSettings, Phase, agent_settings, loss_settings, model_settings
from prelar_trl.modules.actions import FRAME_CHANNELS, ActionEncoder, LatentActionEncoder
from prelar_trl.modules.checks import embed_width
from prelar_trl.modules.context import ContextDecoder, ContextEncoder
from prelar_trl.modules.convnets import CNNDecoder, CNNEncoder, ResNetDecoder, ResNetEncoder
from prelar_trl.modules.heads import MLP, Actor, OneHotActor, VectorEncoder
from prelar_trl.modules.initialization import initialize
from prelar_trl.modules.latent_actions import LatentActions, make_latent_actions
from prelar_trl.modules.own_networks import try_networks
from prelar_trl.modules.patchnets import PatchDecoder, PatchEncoder
from prelar_trl.modules.rssm import RSSM
from prelar_trl.modules.world_model import RSSMWorldModel
from prelar_trl.objectives import LatentActionLoss, RSSMWorldModelLoss, VideoBonus
from prelar_trl.objectives.common import check_weights
from prelar_trl.pretrained import copy_pretrained, load_weights, pretrained_modules
from prelar_trl.types import Inputs

__all__ = [
    "Agent",
    "copy_pretrained",
    "make_agent",
    "make_inverse_model",
    "make_model",
    "make_world_model",
    "make_world_model_loss",
    "pretrained_modules",
]


class Agent(nn.Module):
    """World model, actor, critics and bonus of a fine-tuning run."""

    def __init__(
        self,
        world_model: RSSMWorldModel,
        actor: Actor | OneHotActor,
        critic: MLP,
        bonus: VideoBonus | None,
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
    inputs: Inputs | None = None,
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
        inputs: what it sees. Default: one picture of 64x64.
        size: ``full`` (as published), ``small``, ``tiny``, or ``mini``, for a CPU. Default:
            ``full``.
        encoder: your own image encoder, ``[N, 3, 64, 64]`` -> ``[N, embed_dim]``, with the
            attribute ``embed_dim``; of several pictures for the first. Default: the method's.
        decoder: your own image decoder, ``[N, F]`` -> ``[N, 3, 64, 64]``, likewise. Default: the
            method's. Networks of your own are tried once, on zeros, and keep their weights.
        sample: draw latents; False takes modes. Default: True.
        overrides: fields of :class:`ModelSettings`.

    Raises:
        ValueError: an unknown name or a method without that phase.
        TypeError, ValueError: a network of your own cannot be used.
    """
    s = model_settings(method, phase, size, overrides)
    inputs = inputs or Inputs()
    if phase == "pretrain" and (inputs.views, inputs.vector) != (1, 0):
        raise ValueError(f"pre-training takes one picture and no vector, not {inputs}")
    channels = 1 if s.gray else 3
    network = {
        "depth": s.depth,
        "stages": s.stages,
        "layers": s.layers,
        "norm": s.norm,
        "image_size": inputs.size,
    }
    own = {"encoder": encoder, "decoder": decoder}
    if encoder is None:
        encoder = _make_encoder(s, channels, network)
    view_encoders = [_make_encoder(s, channels, network) for _ in range(inputs.views - 1)]
    vector_encoder = None
    if inputs.vector:
        vector_encoder = VectorEncoder(inputs.vector, s.head_layers, s.head_units)
    dynamics = {
        "stoch": s.stoch,
        "classes": s.classes,
        "deter": s.deter,
        "hidden": s.hidden,
        "ensemble": s.ensemble,
    }
    latent_action_encoder = action_encoder = lower_rssm = context_encoder = None
    latent_dim, embed_dim = action_dim, embed_width("encoder", encoder)
    embed_dim += sum(cast(int, view.embed_dim) for view in view_encoders)
    embed_dim += 0 if vector_encoder is None else vector_encoder.embed_dim
    if s.actions == "latent":
        latent_actions = _make_latent_actions(s)
        latent_action_encoder = LatentActionEncoder(
            _make_encoder(s, _frame_channels(s, channels), network),
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
        context_encoder = ContextEncoder(
            **network, augmentation=s.augmentation, in_channels=channels
        )
    network["out_channels"] = channels
    if decoder is None:
        decoder = _make_decoder(s, s.images, rssm.feat_dim, network)
    plain = "resnet" if s.images == "context" else s.images  # no context of other views
    view_decoders = [_make_decoder(s, plain, rssm.feat_dim, network) for _ in view_encoders]
    vector_decoder = None
    if inputs.vector:
        vector_decoder = MLP(rssm.feat_dim, inputs.vector, s.head_layers, s.head_units)
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
        view_encoders=view_encoders,
        view_decoders=view_decoders,
        vector_encoder=vector_encoder,
        vector_decoder=vector_decoder,
        gray=s.gray,
        sample=sample,
        action_dim=action_dim if s.actions in ("real", "encoded") else None,
    )
    try_networks(world_model, inputs.size, **own)
    return initialize(world_model, kept=own.values())


def make_agent(
    method: str,
    *,
    action_dim: int,
    discrete: bool = False,
    inputs: Inputs | None = None,
    size: str = "full",
    encoder: nn.Module | None = None,
    decoder: nn.Module | None = None,
    sample: bool = True,
    **overrides: Any,
) -> Agent:
    """World model, actor, critics and bonus of a method's fine-tuning; see make_world_model.

    With ``discrete`` an action is one of ``action_dim`` choices, a one-hot vector. Default: False.
    """
    s = agent_settings(method, size, overrides)
    world_model = make_world_model(
        method,
        "finetune",
        action_dim=action_dim,
        inputs=inputs,
        size=size,
        encoder=encoder,
        decoder=decoder,
        sample=sample,
        **overrides,
    )
    feat_dim = world_model.rssm.feat_dim
    policy = OneHotActor if discrete else Actor
    actor = initialize(policy(feat_dim, action_dim, s.head_layers, s.head_units))
    critic = initialize(MLP(feat_dim, 1, s.head_layers, s.head_units))
    bonus = None
    if s.bonus_embed == "lower" and world_model.lower_rssm is None:
        raise ValueError(
            f"method={method} has no lower RSSM for bonus_embed='lower': use embed or feat"
        )
    if s.bonus_embed is not None:
        observing = world_model.lower_rssm or world_model.rssm  # what is given the embedding
        bonus = VideoBonus(
            observing.embed_dim if s.bonus_embed == "embed" else feat_dim,
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
        overrides: further fields of :class:`LossSettings`, before the preset's.

    Raises:
        ValueError: terms that the world model cannot have.
    """
    s = loss_settings(method, phase, {**overrides, "weights": weights or {}})
    merged = dict(s.weights)
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
    if world_model.vector_encoder is not None:
        merged.setdefault("vector", 1.0)
    elif "vector" in merged:
        raise ValueError("loss.weights has 'vector', but the world model sees none: give vectors")
    if "af_kl" in merged and world_model.lower_rssm is None:
        raise ValueError(f"method={method} has no lower RSSM in phase={phase}: remove weight af_kl")
    latent_action_loss = None
    if kind is None and any(weight is not None for weight in latent_weights.values()):
        raise ValueError(
            f"method={method} has no latent actions in phase={phase}, "
            f"so it cannot weigh {', '.join(latent_weights)}"
        )
    if kind is not None:
        heads = len(world_model.rssm.prior_heads)
        if heads > 1 and latent_weights.get("action_state_consistency") is not None:
            raise ValueError(
                f"model.ensemble={heads}: the consistency would compare heads that are drawn at "
                "random, not actions; use loss.weights={action_state_consistency: null}, or one"
            )
        latent_action_loss = LatentActionLoss(
            world_model.rssm,
            kind,
            weights=latent_weights,
            consistency=s.consistency,
            free_nats=s.latent_free_nats,
            warmup=s.latent_warmup,
            warmup_start=s.latent_warmup_start,
            negatives=s.negatives,
            temperature=None if s.temperature == "learned" else s.temperature,
            contrast_dynamics=s.contrast_dynamics,
            action_dim=action_dim,
        )
    return RSSMWorldModelLoss(
        world_model,
        weights=merged,
        kl_balance=s.kl_balance,
        free_nats=s.free_nats,
        free_avg=s.free_avg,
        latent_action=latent_action_loss,
        video_bonus=video_bonus,
        bonus_scale=s.bonus_scale,
        clip_rewards=s.clip_rewards,
    )


def make_model(checkpoint: Mapping[str, Any]) -> RSSMWorldModel | Agent:
    """A model like a checkpoint's, or an export's, with random weights."""
    options = {
        "inputs": Inputs(**checkpoint.get("inputs", {})),
        "size": checkpoint["size"],
        **checkpoint["overrides"],
    }
    if checkpoint["phase"] == "pretrain":
        return make_world_model(checkpoint["method"], "pretrain", action_dim=0, **options)
    return make_agent(
        checkpoint["method"],
        action_dim=checkpoint["action_dim"],
        discrete=checkpoint.get("discrete", False),
        **options,
    )


def make_inverse_model(checkpoint: Mapping[str, Any]) -> LatentActionEncoder:
    """The latent-action encoder of a pre-training checkpoint, frozen and in evaluation mode.

    Raises:
        ValueError: the run has no latent actions.
    """
    world_model = cast(RSSMWorldModel, make_model(checkpoint))
    inverse_model = world_model.latent_action_encoder
    if inverse_model is None:
        raise ValueError(
            f"a pre-training run of method={checkpoint['method']} has no latent actions"
        )
    load_weights(world_model, checkpoint["model"], "the pre-training run")
    return inverse_model.requires_grad_(False).eval()


def _make_encoder(s: ModelSettings, channels: int, network: Mapping[str, Any]) -> nn.Module:
    if s.images == "cnn":
        net = PatchEncoder if s.patches else CNNEncoder
        return net(channels, s.depth, image_size=network["image_size"])
    return ResNetEncoder(channels, **network)


def _frame_channels(s: ModelSettings, channels: int) -> int:
    """What the latent-action encoder sees of a pair of frames; optical flow has colors always."""
    seen = FRAME_CHANNELS[s.frames]
    return seen if s.frames == "flow" else seen * channels // 3


def _make_latent_actions(s: ModelSettings) -> LatentActions:
    """The kind that pre-training infers."""
    shared = {"classes": s.latent_action_classes, "deter_size": s.latent_action_deter}
    return make_latent_actions(
        s.latent_action, size=s.latent_action_size, shared=shared, **s.latent_action_options
    )


def _make_action_code(s: ModelSettings) -> LatentActions:
    """The kind that the action encoder gives, of pre-training's width where it can choose one."""
    latent_actions = _make_latent_actions(s)
    if s.action_code == s.latent_action:
        return latent_actions
    shared = {"classes": s.latent_action_classes, "deter_size": s.latent_action_deter}
    return make_latent_actions(s.action_code, size=latent_actions.dim, shared=shared)


def _make_decoder(
    s: ModelSettings, images: str, feat_dim: int, network: Mapping[str, Any]
) -> nn.Module:
    match images:
        case "cnn":
            net = PatchDecoder if s.patches else CNNDecoder
            view = {name: network[name] for name in ("image_size", "out_channels")}
            return net(feat_dim, s.depth, **view)
        case "resnet":
            return ResNetDecoder(feat_dim, **network)
        case "context":
            return ContextDecoder(
                feat_dim, **network, mask=s.context_mask, dropout=s.context_dropout
            )
    raise ValueError(f"images={images!r} is unknown; choose resnet, cnn or context")
