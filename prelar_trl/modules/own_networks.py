"""A user's own encoder and decoder are tried once, where the model is made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prelar_trl.modules.checks import check_output, embed_width, trial
from prelar_trl.modules.world_model import RSSMWorldModel

__all__ = ["try_networks"]


def try_networks(
    model: RSSMWorldModel, size: int, *, encoder: nn.Module | None, decoder: nn.Module | None
) -> None:
    """One pass of zeros through the networks that are a user's own, in evaluation mode.

    Those whose weights are on another device than the model's, or of half precision, are meant for
    later and are not tried.

    Args:
        model: that they are part of.
        size: height and width of its pictures.
        encoder, decoder: None where it is not the user's.

    Raises:
        TypeError, ValueError: one is no module, raises an error, or gives something else than the
            model takes.
    """
    weight = model.rssm.input_layer.weight
    images = weight.new_zeros(2, 1 if model.gray else 3, size, size)
    if encoder is not None:
        shape = (2, embed_width("encoder", encoder))
        _try("encoder", encoder, [images], shape, weight)
    if decoder is not None:
        inputs: list[Any] = [weight.new_zeros(2, model.rssm.feat_dim)]
        if model.context_encoder is not None:
            with trial(model.context_encoder):
                inputs.append(model.context_encoder(images[None]))
        _try("decoder", decoder, inputs, images.shape, weight)


def _try(
    name: str, network: nn.Module, inputs: list[Any], shape: Sequence[int], weight: Tensor
) -> None:
    kind = f"{name} {type(network).__name__}"
    if not isinstance(network, nn.Module):
        raise TypeError(f"{kind} is no torch.nn.Module: give an instance of one")
    half = (torch.float16, torch.bfloat16)
    own = [*network.parameters(), *network.buffers()]
    if any(x.device != weight.device or x.dtype in half for x in own):
        return
    try:
        with trial(network):
            out = network(*inputs)
    except Exception as error:
        given = f"{inputs[0].dtype} {list(inputs[0].shape)}".removeprefix("torch.")
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{kind} cannot take {given}: {why}") from error
    check_output(f"output of {kind}", out, shape, weight)
