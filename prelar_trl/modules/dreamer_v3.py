"""Latent actions on TorchRL's own DreamerV3: what lies between its modules and ours.

TorchRL keeps the stochastic state flat, ``state`` ``[..., S*K]``, calls the deterministic one
``belief`` ``[..., D]``, and writes both under ``next``. :data:`V3_KEYS` tells
:class:`prelar_trl.objectives.LatentActionLoss` where everything lies, :class:`PriorV3Logits` is the
dynamics that it steps, :class:`InferredActions` writes the latent actions that
``RSSMRolloutV3`` takes; :func:`prelar_trl.data.to_dreamer_v3` brings frames into TorchRL's layout.
"""

from __future__ import annotations

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.modules import RSSMPriorV3

from prelar_trl.modules.actions import LatentActionEncoder
from prelar_trl.modules.pixels import normalize_pixels

__all__ = ["V3_KEYS", "InferredActions", "PriorV3Logits"]

V3_KEYS: dict[str, NestedKey] = {
    "stoch": ("next", "state"),
    "deter": ("next", "belief"),
    "posterior": ("next", "posterior_logits"),
    "prior": ("next", "prior_logits"),
}
"""For ``LatentActionLoss.set_keys``: what TorchRL's ``RSSMRolloutV3`` calls its entries."""


class PriorV3Logits(nn.Module):
    """TorchRL's prior as the dynamics of :class:`prelar_trl.objectives.LatentActionLoss`.

    The logits are those of the network, before the uniform mixture of DreamerV3 (``unimix``).

    Args:
        prior: the world model's own, shared with it.
    """

    def __init__(self, prior: RSSMPriorV3) -> None:
        super().__init__()
        self.prior = prior

    def forward(self, stoch: Tensor, deter: Tensor, action: Tensor) -> Tensor:
        """``[N, S*K]``, ``[N, D]``, ``[N, U]`` -> the logits one step later, ``[N, S, K]``."""
        logits, _, _ = self.prior(stoch, deter, action)
        return logits


class InferredActions(TensorDictModuleBase):
    """Infers the latent actions of a video.

    Reads ``("next", "pixels")``, uint8 ``[B, T, 3, H, W]``. Writes ``latent_action``
    ``[B, T, U]`` and, of kinds with a distribution, ``latent_action_statistics`` ``[B, T, ...]``;
    at t = 0, where no frame lies before, both are zero.

    Args:
        encoder: the inverse-dynamics model, one that sees frames (not ``flow``).
    """

    def __init__(self, encoder: LatentActionEncoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.in_keys: list[NestedKey] = [("next", "pixels")]
        self.out_keys = ["latent_action"]
        if encoder.latent_actions.outputs().has_params:
            self.out_keys.append("latent_action_statistics")

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        action, params = self.encoder(normalize_pixels(tensordict["next", "pixels"]))
        tensordict["latent_action"] = action
        if params is not None:
            tensordict["latent_action_statistics"] = params
        return tensordict
