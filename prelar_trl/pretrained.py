"""What a fine-tuned world model takes from a pre-trained one."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from prelar_trl.modules.world_model import RSSMWorldModel

__all__ = ["added_inputs", "copy_pretrained", "fingerprint", "load_weights", "pretrained_modules"]

# Where a pre-trained world model has a part, if it is called otherwise there.
PLACES = {"latent_actions": "latent_action_encoder.latent_actions"}
EMBED_WEIGHT = "posterior_hidden.weight"  # [hidden, D + E]: the embedding's columns come last


def pretrained_modules(world_model: RSSMWorldModel) -> dict[str, nn.Module]:
    """The parts that a pre-training run supplies, by their name there."""
    modules = {
        "encoder": world_model.encoder,
        "decoder": world_model.decoder,
        "rssm": world_model.lower_rssm or world_model.rssm,
        "context_encoder": world_model.context_encoder,
    }
    return {name: module for name, module in modules.items() if module is not None}


def added_inputs(world_model: RSSMWorldModel) -> list[str]:
    """The parts for what no video shows: further views and the vector. They always start anew."""
    there = {key.partition(".")[0] for key in world_model.state_dict()}
    parts = ("view_encoders", "view_decoders", "vector_encoder", "vector_decoder")
    return [name for name in parts if name in there]


def copy_pretrained(
    world_model: RSSMWorldModel,
    state: Mapping[str, Tensor],
    parts: Collection[str] | None = None,
) -> None:
    """Copy encoder, decoder and RSSM of a pre-trained world model's ``state_dict``.

    An action encoder that gives the same kind of latent action gets what that kind has learned.
    What is seen beside the first picture has parts of its own, which start anew, and columns of
    their own in the layer that reads the embedding; they keep their values too.

    Args:
        parts: those of ``config.PRETRAINED_PARTS`` that are copied. Default: all that there are.

    Raises:
        ValueError: naming a part that is not there, or every tensor that is missing or has another
            shape; nothing is copied.
    """
    modules = pretrained_modules(world_model)
    if world_model.action_encoder is not None:
        kind = world_model.action_encoder.latent_actions
        if any(f"{PLACES['latent_actions']}.{key}" in state for key in kind.state_dict()):
            modules["latent_actions"] = kind
    for name in parts or ():
        if name not in modules:
            raise ValueError(
                f"load={name}: this model and the pre-trained one do not share it; choose of "
                f"{', '.join(modules)}"
            )
    modules = {name: x for name, x in modules.items() if parts is None or name in parts}
    problems, loaded = [], {}
    for name, module in modules.items():
        prefix = PLACES.get(name, name) + "."
        part = {key[len(prefix) :]: x for key, x in state.items() if key.startswith(prefix)}
        own = module.state_dict()
        if EMBED_WEIGHT in own.keys() & part.keys() and added_inputs(world_model):
            part[EMBED_WEIGHT] = _widened(part[EMBED_WEIGHT], own[EMBED_WEIGHT])
        problems += _differences(part, own, prefix)
        loaded[name] = part
    if problems:
        wide = "" if world_model.action_encoder is None else ", an action_code as wide as its own"
        raise ValueError(
            f"the pre-trained run does not fit: {_listed(problems)}; use the size and model "
            f"options it was trained with{wide}"
        )
    for name, module in modules.items():
        module.load_state_dict(loaded[name])


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """The SHA-256 of the names and values of a ``state_dict``."""
    digest = hashlib.sha256()
    for name, x in sorted(state.items()):
        digest.update(name.encode())
        digest.update(x.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_weights(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load a ``state_dict`` that may be of another version of the package.

    Args:
        source: what it comes from, for the error.

    Raises:
        ValueError: naming what does not fit.
    """
    try:
        module.load_state_dict(state)
    except RuntimeError:
        problems = _differences(state, module.state_dict())
        if not problems:
            raise
        raise ValueError(
            f"{source} does not fit this version's model: {_listed(problems)}; use the version "
            "that made it"
        ) from None


def _differences(
    there: Mapping[str, Tensor], here: Mapping[str, Tensor], prefix: str = ""
) -> list[str]:
    problems = [f"{prefix}{key} is missing" for key in here.keys() - there.keys()]
    problems += [f"{prefix}{key} has no place" for key in there.keys() - here.keys()]
    return problems + [
        f"{prefix}{key} is {tuple(there[key].shape)} there and {tuple(here[key].shape)} here"
        for key in here.keys() & there.keys()
        if there[key].shape != here[key].shape
    ]


def _listed(problems: list[str]) -> str:
    return f"{len(problems)} tensors differ ({'; '.join(sorted(problems)[:4])})"


def _widened(trained: Tensor, own: Tensor) -> Tensor:
    """The trained columns ``[hidden, n]``, and behind them those of ``own`` ``[hidden, n + m]``."""
    if len(trained) != len(own) or trained.shape[1] >= own.shape[1]:
        return trained
    widened = own.clone()
    widened[:, : trained.shape[1]] = trained
    return widened
