"""Kinds of latent actions behind one socket, found by name; see :class:`LatentActions`."""

from prelar_trl.modules.latent_actions.base import (
    LatentActions,
    latent_action_kinds,
    make_latent_actions,
    register_latent_actions,
)
from prelar_trl.modules.latent_actions.continuous import DeterministicActions, GaussianActions
from prelar_trl.modules.latent_actions.discrete import CategoricalActions, MixedActions
from prelar_trl.modules.latent_actions.quantized import FSQActions, VQActions

__all__ = [
    "CategoricalActions",
    "DeterministicActions",
    "FSQActions",
    "GaussianActions",
    "LatentActions",
    "MixedActions",
    "VQActions",
    "latent_action_kinds",
    "make_latent_actions",
    "register_latent_actions",
]
