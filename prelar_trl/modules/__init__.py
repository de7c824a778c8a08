"""Networks. Inside: plain tensors. At the edge: TensorDictModules."""

from prelar_trl.modules.actions import ActionCode, ActionEncoder, LatentActionEncoder
from prelar_trl.modules.context import ContextDecoder, ContextEncoder
from prelar_trl.modules.convnets import CNNDecoder, CNNEncoder, ResNetDecoder, ResNetEncoder
from prelar_trl.modules.distributions import Categorical, Gaussian, TruncatedNormal
from prelar_trl.modules.heads import MLP, Actor
from prelar_trl.modules.policy import WorldModelPolicy
from prelar_trl.modules.rssm import RSSM, State
from prelar_trl.modules.world_model import WorldModel

__all__ = [
    "MLP",
    "RSSM",
    "ActionCode",
    "ActionEncoder",
    "Actor",
    "CNNDecoder",
    "CNNEncoder",
    "Categorical",
    "ContextDecoder",
    "ContextEncoder",
    "Gaussian",
    "LatentActionEncoder",
    "ResNetDecoder",
    "ResNetEncoder",
    "State",
    "TruncatedNormal",
    "WorldModel",
    "WorldModelPolicy",
]
