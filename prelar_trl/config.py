"""Settings, their bounds, and the presets: what each system is made of and how it is trained.

A method is a preset of components and loss weights, for pre-training and for fine-tuning. Adding
one is adding an entry to :data:`METHODS`. The type of a setting says which values it takes, see
:func:`check_settings`. Importing this module imports neither torch nor any network.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, get_args

from prelar_trl.bounds import (
    Fraction,
    MediumInt,
    NonNegative,
    NonNegativeInt,
    NonNegativeMediumInt,
    NonNegativeSmallInt,
    Positive,
    PositiveInt,
    Rule,
    SmallInt,
    above,
    at_most,
    between,
    check_settings,
)
from prelar_trl.types import Augmentation, ClipRewards, ConsistencyMode, FrameInput, Norm
from prelar_trl.utils import check_choice

__all__ = [
    "METHODS",
    "PRETRAINED_PARTS",
    "SIZES",
    "LossSettings",
    "Method",
    "ModelSettings",
    "Phase",
    "agent_settings",
    "find_preset",
    "loss_settings",
    "model_settings",
    "named_modules",
]

PRETRAINED_PARTS = ("encoder", "decoder", "rssm", "context_encoder", "latent_actions")
Phase = Literal["pretrain", "finetune"]
Head = Literal["reward", "aux_reward", "discount"]
Classes = Annotated[
    int, Rule(lambda k: k == 0 or k > 1, "must be 0 (Gaussian) or at least 2"), at_most(2**16)
]


@dataclass(frozen=True)
class ModelSettings:
    """What a world model is made of. Defaults: the published full size, components of PreLAR."""

    images: Literal["resnet", "cnn", "context"] = "resnet"
    actions: Literal["latent", "encoded", "real", "none"] = "latent"
    action_width: MediumInt | None = None  # the RSSM's action input; None: that of the action
    stacked: bool = False  # an action-free RSSM below the imagined one (APV)
    concat_embed: bool = False  # the upper RSSM of a stack also reads the image embedding
    heads: tuple[Head, ...] = ()
    grad_heads: tuple[Head, ...] = ("reward", "aux_reward")
    head_layers: NonNegativeSmallInt = 4
    head_units: MediumInt = 400
    # image networks
    depth: MediumInt = 48
    stages: Annotated[int, between(1, 5)] = 3  # from 32x32 down to 1x1 at most
    layers: SmallInt = 2
    norm: Norm = "batch"
    patches: bool = False  # cnn: 4x4 kernels that do not overlap
    gray: bool = False  # networks see and predict brightness alone
    augmentation: Augmentation = "none"  # of the context
    context_mask: Annotated[float, between(0, 0.98)] = 0.75  # leaves at least one of 8x8
    context_dropout: Fraction = 0.1
    # dynamics
    stoch: MediumInt = 32
    classes: Classes = 32
    deter: MediumInt = 1024
    hidden: MediumInt = 1024
    ensemble: SmallInt = 1
    # latent actions
    frames: FrameInput = "concat"
    latent_action: str = "gaussian"  # a registered kind, or package.module:Class
    latent_action_size: MediumInt = 64
    latent_action_classes: NonNegativeMediumInt = 0  # of kinds that have classes
    latent_action_deter: NonNegativeMediumInt = 64  # of kinds with a deterministic part
    latent_action_options: Mapping[str, Any] = field(default_factory=dict)  # further ones
    latent_action_hidden: MediumInt = 1024
    latent_action_shift: NonNegativeSmallInt = 0  # pixels by which its frames are moved in training
    # action encoder, into the same space
    action_code: str = "deterministic"  # kind of latent action that it gives
    action_window: SmallInt = 1
    # video bonus
    bonus_embed: Literal["embed", "feat", "lower"] | None = None
    bonus_neighbors: Annotated[PositiveInt, at_most(10**7)] = 16
    bonus_memory: Annotated[PositiveInt, at_most(10**7)] = 4096
    bonus_projection: MediumInt = 128
    bonus_window: SmallInt = 5
    discount: Fraction = 0.99

    def __post_init__(self) -> None:
        check_settings(type(self), vars(self))
        if self.images != "cnn" and (self.depth < 2 or self.depth % 2 and self.images == "context"):
            raise ValueError(
                f"depth={self.depth} must be at least 2 with images=resnet, and even with context"
            )


@dataclass(frozen=True)
class LossSettings:
    """How a world model is trained. Weights by term; a term without a weight is not computed."""

    weights: Mapping[str, NonNegative | None] = field(
        default_factory=lambda: {"image": 1.0, "kl": 1.0}
    )
    kl_balance: Fraction = 0.8
    free_nats: NonNegative = 0.0
    free_avg: bool = True
    consistency: ConsistencyMode = "soft"
    latent_free_nats: NonNegative = 0.0  # of latent_kl
    latent_warmup: NonNegativeInt = 0  # updates over which latent_kl rises to its weight
    latent_warmup_start: Annotated[Fraction, above(0)] = 0.01  # share of the weight at the start
    negatives: SmallInt = 4
    temperature: Positive | Literal["learned"] = 1.0  # of action_contrast
    contrast_dynamics: bool = True
    bonus_scale: NonNegative = 1.0
    clip_rewards: ClipRewards = "identity"  # what the reward heads learn

    def __post_init__(self) -> None:
        check_settings(type(self), vars(self))


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


# What a CPU core trains in minutes: few dense products in place of large maps.
SIZES["mini"] = {
    **SIZES["tiny"],
    "images": "cnn",
    "patches": True,
    "depth": 16,
    "stoch": 8,
    "classes": 8,
    "head_layers": 2,
}


@dataclass(frozen=True)
class Method:
    """One system of the paper.

    Args:
        pretrain, finetune: overrides of :class:`ModelSettings`, or None without that phase.
        pretrain_weights, finetune_weights: weights of the loss terms.
        loss: overrides of :class:`LossSettings`, for both phases.
        checkpoint: methods whose pre-training runs it fine-tunes from.
        align_updates: of the action encoder, before a pre-trained model is fine-tuned.
        shift_by_motion: ``pretrain.py`` sets ``latent_action_shift`` to that many times the videos'
            typical motion; 0: it stays as it is.
    """

    finetune: Mapping[str, Any] | None
    finetune_weights: Mapping[str, float] = field(default_factory=dict)
    pretrain: Mapping[str, Any] | None = None
    pretrain_weights: Mapping[str, float] = field(default_factory=dict)
    loss: Mapping[str, Any] = field(default_factory=dict)
    checkpoint: tuple[str, ...] = ()
    align_updates: int = 0
    shift_by_motion: float = 0.0


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
PRELAR_CHECKPOINTS = ("prelar", "prelar_no_cl", "prelar_no_al_cl", "prelar_plus")

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
    # Latent actions that act; every choice is explained in docs/latent_actions.md.
    "prelar_plus": Method(
        pretrain={**LATENT, "frames": "diff", "latent_action_shift": 20},
        pretrain_weights={**VIDEO, "latent_kl": 0.03},
        finetune={**ENCODED, "action_window": 8},
        finetune_weights=SHAPED,
        loss={"latent_free_nats": 8.0, "bonus_scale": 0.1},
        checkpoint=PRELAR_CHECKPOINTS,
        align_updates=800,
        shift_by_motion=8.0,
    ),
    "prelar_naive": Method(
        finetune={"actions": "encoded", "heads": ("reward",)},
        finetune_weights=REWARD,
        checkpoint=PRELAR_CHECKPOINTS,
    ),
}


def model_settings(
    method: str, phase: Phase, size: str = "full", overrides: Mapping[str, Any] | None = None
) -> ModelSettings:
    """The settings of a method's world model.

    Raises:
        ValueError: an unknown method, phase, size or override, or a value out of bounds.
    """
    preset = getattr(find_preset(method, phase), phase)
    check_choice("size", size, SIZES)
    overrides = dict(overrides or {})
    check_settings(ModelSettings, overrides)
    for name in ("heads", "grad_heads"):
        if name in overrides:
            overrides[name] = tuple(overrides[name])
    return replace(ModelSettings(), **{**SIZES[size], **preset, **overrides})


def agent_settings(
    method: str, size: str = "full", overrides: Mapping[str, Any] | None = None
) -> ModelSettings:
    """:func:`model_settings` of fine-tuning, whose world model must predict the reward.

    Raises:
        ValueError: it does not, or as :func:`model_settings`.
    """
    settings = model_settings(method, "finetune", size, overrides)
    if "reward" not in settings.heads:
        raise ValueError(
            f"model.heads={list(settings.heads)} leaves out reward, from which the agent learns to "
            "act: add it"
        )
    return settings


def loss_settings(
    method: str, phase: Phase, overrides: Mapping[str, Any] | None = None
) -> LossSettings:
    """The settings of a method's loss; ``weights`` replace the preset's one by one.

    Raises:
        ValueError: an unknown method, phase or override, or a value out of bounds.
    """
    preset = find_preset(method, phase)
    overrides = dict(overrides or {})
    check_settings(LossSettings, overrides)
    weights = {**getattr(preset, f"{phase}_weights"), **(overrides.pop("weights", None) or {})}
    return replace(LossSettings(), **{**preset.loss, **overrides, "weights": weights})


def named_modules(overrides: Mapping[str, Any]) -> dict[str, str]:
    """Those of a model's settings that name a module, whose import runs its code."""
    kinds = {name: str(overrides.get(name)) for name in ("latent_action", "action_code")}
    return {name: value for name, value in kinds.items() if ":" in value}


def find_preset(method: str, phase: str) -> Method:
    """The preset of a method.

    Raises:
        ValueError: an unknown method or phase, or a method without that phase.
    """
    check_choice("method", method, METHODS)
    check_choice("phase", phase, get_args(Phase))
    preset = METHODS[method]
    if getattr(preset, phase) is None:
        raise ValueError(f"method={method} has no phase {phase!r}")
    return preset
