"""Speed and less memory for a model, from outside: its maths stays where it is, and plain."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from tensordict import TensorDict, TensorDictBase
from torch import nn

from prelar_trl.fast import convnets
from prelar_trl.fast.checkpointing import CheckpointedBatchNorm2d
from prelar_trl.fast.linear import OneDNNLinear, cached_autocast_weights
from prelar_trl.fast.rssm import FastGRUCell, TimeBatchedRSSM
from prelar_trl.modules.actions import ActionEncoder, LatentActionEncoder
from prelar_trl.modules.context import ContextDecoder, ContextLayer
from prelar_trl.modules.convnets import (
    CNNDecoder,
    CNNEncoder,
    ResidualLayer,
    ResNetDecoder,
    ResNetEncoder,
)
from prelar_trl.modules.heads import MLP, Actor, OneHotActor
from prelar_trl.modules.patchnets import PatchEncoder
from prelar_trl.modules.rssm import RSSM, GRUCell
from prelar_trl.modules.world_model import RSSMWorldModel

__all__ = ["accelerate"]

M = TypeVar("M", bound=nn.Module)


class FastWorldModel(RSSMWorldModel):
    """Casts the frozen weights once for all steps of imagination."""

    def imagine(
        self,
        actor: Actor | OneHotActor,
        start: TensorDictBase,
        horizon: int = 15,
        sample: bool = True,
    ) -> TensorDict:
        if torch.compiler.is_compiling():  # a compiler casts once anyway
            return super().imagine(actor, start, horizon, sample)
        with cached_autocast_weights(self.rssm, self.action_encoder):
            return super().imagine(actor, start, horizon, sample)


FAST: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: OneDNNLinear,
    nn.BatchNorm2d: CheckpointedBatchNorm2d,
    CNNDecoder: convnets.FastCNNDecoder,
    CNNEncoder: convnets.FastCNNEncoder,
    ContextDecoder: convnets.FastContextDecoder,
    ContextLayer: convnets.FastContextLayer,
    GRUCell: FastGRUCell,
    PatchEncoder: convnets.FastPatchEncoder,
    RSSM: TimeBatchedRSSM,
    ResNetDecoder: convnets.FastResNetDecoder,
    ResNetEncoder: convnets.FastResNetEncoder,
    ResidualLayer: convnets.FastResidualLayer,
    RSSMWorldModel: FastWorldModel,
}
CHECKPOINTED = (convnets.FastResNetDecoder, convnets.FastResNetEncoder)
# Activations that follow a layer whose output nothing else reads.
ACTIVATIONS: dict[type[nn.Module], Callable[[Any], Sequence[Any]]] = {
    ActionEncoder: lambda part: [part.act],
    Actor: lambda part: [part.act],
    LatentActionEncoder: lambda part: [part.head[1]],
    MLP: lambda part: [part.act],
    OneHotActor: lambda part: [part.act],
    RSSM: lambda part: [part.act, *(head[1] for head in part.prior_heads)],
}


def accelerate(module: M, *, checkpoint: bool | None = None) -> M:
    """Replace the classes of a model's parts, in place, by their fast versions.

    Each of those is a subclass that overrides how something is computed, never what: parameters,
    buffers, names in the state dict, random draws and results (to rounding) stay as they are. Parts
    of other classes, such as a user's own encoder, stay too, but for their linear layers and batch
    norms. To do it twice is to do it once.

    - linear layers run in oneDNN's kernels (CPU, float32);
    - the recurrence computes before and after its loop what does not depend on it, and the GRU's
      gates, norm and activations are computed again in the backward pass, not kept;
    - of the ResNets only the convolutions' outputs are kept for the backward pass
      (``checkpoint``);
    - weights and maps are channels-last, but for a user's own; the plain CNNs take 50 frames at a
      time (CPU);
    - activations after linear layers work in place; under autocast imagination casts the frozen
      weights once.

    Nothing of this can be differentiated twice. Under ``torch.compile`` and :mod:`torch.func` the
    tricks step aside.

    Args:
        module: any module, such as a :class:`RSSMWorldModel`, an :class:`Agent` or a loss.
        checkpoint: keep only the convolutions' outputs of the ResNets for the backward pass: half
            of the memory, a few percent of the time. Default: where the module is on the CPU.

    Returns:
        The same module.
    """
    if checkpoint is None:
        checkpoint = all(x.device.type == "cpu" for x in module.parameters())
    for part in module.modules():
        kind = type(part)
        if kind in ACTIVATIONS:
            for activation in ACTIVATIONS[kind](part):
                activation.inplace = True
        if kind in FAST:
            part.__class__ = FAST[kind]
        if isinstance(part, CHECKPOINTED):
            part.checkpoint = checkpoint
    for weight in _weights(module):
        if weight.dim() == 4:
            weight.data = weight.data.to(memory_format=torch.channels_last)
    return module


def _weights(module: nn.Module) -> Iterator[nn.Parameter]:
    """Those of this package's and of torch's modules, but of none within another's."""
    if type(module).__module__.partition(".")[0] in ("prelar_trl", "torch"):
        yield from module.parameters(recurse=False)
        for part in module.children():
            yield from _weights(part)
