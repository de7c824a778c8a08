"""Networks. Inside: plain tensors. At the edge: TensorDictModules."""

from prelar_trl.modules.actions import ActionEncoder, LatentActionEncoder
from prelar_trl.modules.context import ContextDecoder, ContextEncoder
from prelar_trl.modules.convnets import CNNDecoder, CNNEncoder, ResNetDecoder, ResNetEncoder
from prelar_trl.modules.distributions import Categorical, Gaussian, OneHot, TruncatedNormal
from prelar_trl.modules.dreamer_v3 import V3_KEYS, InferredActions, PriorV3Logits
from prelar_trl.modules.heads import MLP, Actor, OneHotActor, VectorEncoder
from prelar_trl.modules.latent_actions import (
    LatentActions,
    make_latent_actions,
    register_latent_actions,
)
from prelar_trl.modules.policy import StatefulPolicy, WorldModelPolicy
from prelar_trl.modules.rssm import RSSM, State
from prelar_trl.modules.world_model import RSSMWorldModel

__all__ = [
    "MLP",
    "RSSM",
    "StatefulPolicy",
    "V3_KEYS",
    "ActionEncoder",
    "Actor",
    "CNNDecoder",
    "CNNEncoder",
    "Categorical",
    "ContextDecoder",
    "ContextEncoder",
    "Gaussian",
    "InferredActions",
    "LatentActionEncoder",
    "LatentActions",
    "OneHot",
    "OneHotActor",
    "PriorV3Logits",
    "ResNetDecoder",
    "ResNetEncoder",
    "State",
    "TruncatedNormal",
    "VectorEncoder",
    "RSSMWorldModel",
    "WorldModelPolicy",
    "make_latent_actions",
    "register_latent_actions",
]
