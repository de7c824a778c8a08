"""Named, paper-exact presets: every system of the paper by name.

A method is a preset: the components of the world model and the weights of the loss, for
pre-training and for fine-tuning. Adding one is adding an entry to :data:`METHODS`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from prelar_trl.modules.actions import ActionEncoder, FrameInput, LatentActionEncoder, Variant
from prelar_trl.modules.context import Augmentation, ContextDecoder, ContextEncoder
from prelar_trl.modules.convnets import CNNDecoder, CNNEncoder, Norm, ResNetDecoder, ResNetEncoder
from prelar_trl.modules.heads import MLP, Actor
from prelar_trl.modules.rssm import RSSM
from prelar_trl.modules.world_model import WorldModel
from prelar_trl.objectives import LatentActionLoss, VideoBonus, WorldModelLoss
from prelar_trl.objectives.functional import ConsistencyMode

__all__ = [
    "METHODS",
    "SIZES",
    "Agent",
    "LossSettings",
    "Method",
    "ModelSettings",
    "load_pretrained",
    "make_agent",
    "make_world_model",
    "make_world_model_loss",
    "pretrained_modules",
]

Phase = Literal["pretrain", "finetune"]


@dataclass(frozen=True)
class ModelSettings:
    """What a world model is made of. Defaults: the published full size, components of PreLAR."""

    images: Literal["resnet", "cnn", "context"] = "resnet"
    actions: Literal["latent", "encoded", "real", "none"] = "latent"
    action_width: int | None = None  # the RSSM's action input; None: as wide as the action
    stacked: bool = False  # an action-free RSSM below the imagined one (APV)
    concat_embed: bool = False  # the upper RSSM of a stack also reads the image embedding
    heads: tuple[str, ...] = ()
    grad_heads: tuple[str, ...] = ("reward", "aux_reward")
    head_layers: int = 4
    head_units: int = 400
    # image networks
    depth: int = 48
    stages: int = 3
    layers: int = 2
    norm: Norm = "batch"
    augmentation: Augmentation = "none"
    context_mask: float = 0.75
    context_dropout: float = 0.1
    # dynamics
    stoch: int = 32
    classes: int = 32
    deter: int = 1024
    hidden: int = 1024
    ensemble: int = 1
    # latent actions
    frames: FrameInput = "concat"
    latent_action: Variant = "gaussian"
    latent_action_size: int = 64
    latent_action_classes: int = 0
    latent_action_deter: int = 64
    latent_action_hidden: int = 1024
    # action encoder, into the same space
    action_code: Variant = "deterministic"
    action_window: int = 1
    # video bonus
    bonus_embed: Literal["embed", "feat", "lower"] | None = None
    bonus_neighbours: int = 16
    bonus_memory: int = 4096
    bonus_projection: int = 128
    bonus_window: int = 5
    discount: float = 0.99


@dataclass(frozen=True)
class LossSettings:
    """How a world model is trained. Weights by term; a term without a weight is not computed."""

    weights: Mapping[str, float] = field(default_factory=lambda: {"image": 1.0, "kl": 1.0})
    kl_balance: float = 0.8
    free_nats: float = 0.0
    free_avg: bool = True
    consistency: ConsistencyMode = "soft"
    prior_std: float = 1.0
    negatives: int = 4
    temperature: float | None = 1.0
    contrast_dynamics: bool = True
    bonus_scale: float = 1.0


SIZES: dict[str, dict[str, Any]] = {
    "full": {},
    "small": {
        "depth": 24,
        "deter": 400,
        "hidden": 400,
        "head_units": 200,
        "latent_action_size": 32,
        "latent_action_deter": 32,
        "latent_action_hidden": 400,
    },
    "tiny": {
        "depth": 8,
        "layers": 1,
        "stoch": 16,
        "classes": 16,
        "deter": 128,
        "hidden": 128,
        "head_units": 128,
        "latent_action_size": 16,
        "latent_action_deter": 16,
        "latent_action_hidden": 128,
        "bonus_memory": 1024,
        "bonus_projection": 64,
    },
}


@dataclass(frozen=True)
class Method:
    """One system of the paper.

    Args:
        pretrain, finetune: overrides of :class:`ModelSettings`, or None without that phase.
        pretrain_weights, finetune_weights: weights of the loss terms.
        checkpoint: methods whose pre-training runs it fine-tunes from.
    """

    finetune: Mapping[str, Any] | None
    finetune_weights: Mapping[str, float] = field(default_factory=dict)
    pretrain: Mapping[str, Any] | None = None
    pretrain_weights: Mapping[str, float] = field(default_factory=dict)
    checkpoint: tuple[str, ...] = ()


VIDEO = {"image": 1.0, "kl": 1.0}
REWARD = {**VIDEO, "reward": 1.0}
SHAPED = {**REWARD, "aux_reward": 1.0}
STACK_SHAPED = {**SHAPED, "af_kl": 0.0}  # reported, without gradient

ACTION_FREE = {"actions": "none", "action_width": 50}
STACKED = {
    "actions": "real",
    "action_width": 50,
    "stacked": True,
    "heads": ("reward", "aux_reward"),
    "bonus_embed": "lower",
}
LATENT = {"actions": "latent"}
ENCODED = {"actions": "encoded", "heads": ("reward", "aux_reward"), "bonus_embed": "embed"}
PRELAR_WEIGHTS = {**VIDEO, "latent_kl": 1.0, "action_state_consistency": 1.0}
PRELAR_CHECKPOINTS = ("prelar", "prelar_no_cl", "prelar_no_al_cl")

METHODS: dict[str, Method] = {
    "dreamerv2": Method(
        finetune={"images": "cnn", "actions": "real", "heads": ("reward",)},
        finetune_weights=REWARD,
    ),
    "apv": Method(
        pretrain=ACTION_FREE,
        pretrain_weights=VIDEO,
        finetune=STACKED,
        finetune_weights=STACK_SHAPED,
        checkpoint=("apv",),
    ),
    "contextwm": Method(
        pretrain={**ACTION_FREE, "images": "context"},
        pretrain_weights=VIDEO,
        finetune={**STACKED, "images": "context"},
        finetune_weights=STACK_SHAPED,
        checkpoint=("contextwm",),
    ),
    "prelar": Method(
        pretrain=LATENT,
        pretrain_weights=PRELAR_WEIGHTS,
        finetune=ENCODED,
        finetune_weights=SHAPED,
        checkpoint=PRELAR_CHECKPOINTS,
    ),
    "prelar_no_cl": Method(
        pretrain=LATENT,
        pretrain_weights={**VIDEO, "latent_kl": 1.0},
        finetune=ENCODED,
        finetune_weights=SHAPED,
        checkpoint=PRELAR_CHECKPOINTS,
    ),
    "prelar_no_al_cl": Method(
        pretrain={**LATENT, "latent_action": "deterministic"},
        pretrain_weights=VIDEO,
        finetune=ENCODED,
        finetune_weights=SHAPED,
        checkpoint=PRELAR_CHECKPOINTS,
    ),
    "naive": Method(
        finetune={"actions": "real", "action_width": 50, "heads": ("reward",)},
        finetune_weights=REWARD,
        checkpoint=("apv", "contextwm"),
    ),
    "prelar_naive": Method(
        finetune={"actions": "encoded", "heads": ("reward",)},
        finetune_weights=REWARD,
        checkpoint=PRELAR_CHECKPOINTS,
    ),
}


class Agent(nn.Module):
    """World model, actor, critics and bonus of a fine-tuning run."""

    def __init__(self, world_model: WorldModel, actor: Actor, critic: MLP, bonus: nn.Module | None):
        super().__init__()
        self.world_model, self.actor, self.critic = world_model, actor, critic
        # Equal to the critic from the start; in the authors' code its first target is random.
        self.slow_critic = copy.deepcopy(critic).requires_grad_(False)
        self.video_bonus = bonus


def model_settings(
    method: str, phase: Phase, size: str = "full", overrides: Mapping[str, Any] | None = None
) -> ModelSettings:
    """The settings of a method's world model.

    Raises:
        ValueError: an unknown method, phase, size or override.
    """
    preset = getattr(_preset(method, phase), phase)
    if size not in SIZES:
        raise ValueError(f"size={size!r} is unknown; choose {', '.join(SIZES)}")
    overrides = dict(overrides or {})
    _check(overrides, ModelSettings)
    for name in ("heads", "grad_heads"):
        if name in overrides:
            overrides[name] = tuple(overrides[name])
    return replace(ModelSettings(), **{**SIZES[size], **preset, **overrides})


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
) -> WorldModel:
    """The world model of a method.

    Args:
        method: ``dreamerv2 | apv | contextwm | prelar | prelar_no_cl | prelar_no_al_cl | naive |
            prelar_naive``.
        phase: ``pretrain`` or ``finetune``.
        action_dim: size of the real action (fine-tuning).
        size: ``full`` (as published), ``small`` or ``tiny``. Default: ``full``.
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
        encoder = CNNEncoder(3, s.depth) if s.images == "cnn" else ResNetEncoder(3, **network)
    dynamics = {
        "stoch": s.stoch,
        "classes": s.classes,
        "deter": s.deter,
        "hidden": s.hidden,
        "ensemble": s.ensemble,
    }
    code = {
        "size": s.latent_action_size,
        "classes": s.latent_action_classes,
        "deter_size": s.latent_action_deter,
        "hidden": s.latent_action_hidden,
    }
    latent_action_encoder = action_encoder = lower_rssm = context_encoder = None
    code_dim, embed_dim = action_dim, encoder.embed_dim
    if s.actions == "latent":
        latent_action_encoder = LatentActionEncoder(
            frames=s.frames, variant=s.latent_action, **code, **network
        )
        code_dim = latent_action_encoder.code.dim
    elif s.actions == "encoded":
        action_encoder = ActionEncoder(
            action_dim, variant=s.action_code, window=s.action_window, **code
        )
        code_dim = action_encoder.code.dim
    width = code_dim if s.action_width is None else s.action_width
    if s.stacked:
        lower_rssm = RSSM(width, embed_dim, **dynamics)
        embed_dim = lower_rssm.feat_dim + (embed_dim if s.concat_embed else 0)
    rssm = RSSM(width, embed_dim, **dynamics)
    if s.images == "context":
        context_encoder = ContextEncoder(**network, augmentation=s.augmentation)
    if decoder is None:
        decoder = _make_decoder(s, rssm.feat_dim, network)
    world_model = WorldModel(
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
    return _initialise(world_model)


def make_agent(
    method: str, *, action_dim: int, size: str = "full", sample: bool = True, **overrides: Any
) -> Agent:
    """World model, actor, critics and bonus of a method's fine-tuning; see make_world_model."""
    s = model_settings(method, "finetune", size, overrides)
    world_model = make_world_model(
        method, "finetune", action_dim=action_dim, size=size, sample=sample, **overrides
    )
    feat_dim = world_model.rssm.feat_dim
    actor = _initialise(Actor(feat_dim, action_dim, s.head_layers, s.head_units))
    critic = _initialise(MLP(feat_dim, 1, s.head_layers, s.head_units))
    bonus = None
    if s.bonus_embed is not None:
        bonus = VideoBonus(
            world_model.encoder.embed_dim if s.bonus_embed == "embed" else feat_dim,
            k=s.bonus_neighbours,
            window=s.bonus_window,
            projection_dim=s.bonus_projection,
            memory_size=s.bonus_memory,
            embed_key=("lower", "feat") if s.bonus_embed == "lower" else s.bonus_embed,
        )
    return Agent(world_model, actor, critic, bonus)


def make_world_model_loss(
    method: str,
    phase: Phase,
    world_model: WorldModel,
    *,
    video_bonus: VideoBonus | None = None,
    weights: Mapping[str, float] | None = None,
    **overrides: Any,
) -> WorldModelLoss:
    """The loss of a method.

    Args:
        world_model: from :func:`make_world_model` with the same method and phase.
        video_bonus: the agent's bonus, in fine-tuning.
        weights: weights that replace the preset's one by one; ``None`` as a weight removes a term.
        overrides: further fields of :class:`LossSettings`.
    """
    preset = _preset(method, phase)
    _check(overrides, LossSettings)
    s = replace(LossSettings(), **overrides)
    merged = {**getattr(preset, f"{phase}_weights"), **(weights or {})}
    merged = {name: weight for name, weight in merged.items() if weight is not None}
    latent_weights = {name: merged.pop(name) for name in LatentActionLoss.TERMS if name in merged}
    latent = world_model.rssm.latent.kind
    latent_action_loss = None
    if latent_weights:
        if world_model.latent_action_encoder is None:
            raise ValueError(
                f"method={method} has no latent actions in phase={phase}, "
                f"so it cannot weigh {', '.join(latent_weights)}"
            )
        distribution = world_model.latent_action_encoder.code.latent
        latent_action_loss = LatentActionLoss(
            world_model.rssm,
            weights=latent_weights,
            latent=latent,
            action=None if distribution is None else distribution.kind,
            consistency=s.consistency,
            prior_std=s.prior_std,
            negatives=s.negatives,
            temperature=s.temperature,
            contrast_dynamics=s.contrast_dynamics,
        )
    loss = WorldModelLoss(
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


def pretrained_modules(world_model: WorldModel) -> dict[str, nn.Module]:
    """The parts that a pre-training run supplies, by their name there."""
    modules = {
        "encoder": world_model.encoder,
        "decoder": world_model.decoder,
        "rssm": world_model.lower_rssm or world_model.rssm,
        "context_encoder": world_model.context_encoder,
    }
    return {name: module for name, module in modules.items() if module is not None}


def load_pretrained(world_model: WorldModel, state: Mapping[str, Tensor]) -> None:
    """Copy encoder, decoder and RSSM of a pre-trained world model's ``state_dict``.

    Raises:
        ValueError: naming every tensor that is missing or has another shape; nothing is copied.
    """
    problems, parts = [], {}
    for name, module in pretrained_modules(world_model).items():
        prefix = name + "."
        part = {key[len(prefix) :]: x for key, x in state.items() if key.startswith(prefix)}
        own = module.state_dict()
        problems += [f"{prefix}{key} is missing" for key in own.keys() - part.keys()]
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
    for name, module in pretrained_modules(world_model).items():
        module.load_state_dict(parts[name], strict=False)


def _make_decoder(s: ModelSettings, feat_dim: int, network: Mapping[str, Any]) -> nn.Module:
    match s.images:
        case "cnn":
            return CNNDecoder(feat_dim, s.depth)
        case "resnet":
            return ResNetDecoder(feat_dim, **network)
        case "context":
            return ContextDecoder(
                feat_dim, **network, mask=s.context_mask, dropout=s.context_dropout
            )
    raise ValueError(f"images={s.images!r} is unknown; choose resnet, cnn or context")


@torch.no_grad()
def _initialise(module: nn.Module) -> Any:
    """Xavier-uniform weights and zero biases of linear and convolution layers, channels-last."""
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return module.to(memory_format=torch.channels_last)


def _preset(method: str, phase: str) -> Method:
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown; choose {', '.join(METHODS)}")
    if phase not in get_args(Phase):
        raise ValueError(f"phase={phase!r} is unknown; choose {', '.join(get_args(Phase))}")
    preset = METHODS[method]
    if getattr(preset, phase) is None:
        raise ValueError(f"method={method} has no phase {phase!r}")
    return preset


def _check(values: Mapping[str, Any], settings: type) -> None:
    """Reject names that ``settings`` does not have, and choices that are none of theirs."""
    hints = get_type_hints(settings)
    for name, value in values.items():
        if name not in hints:
            raise ValueError(f"unknown setting {name!r}; choose {', '.join(hints)}")
        kinds = (hints[name], *get_args(hints[name]))
        choices = [c for kind in kinds if get_origin(kind) is Literal for c in get_args(kind)]
        if choices and value is not None and value not in choices:
            raise ValueError(f"{name}={value!r} is unknown; choose {', '.join(choices)}")
