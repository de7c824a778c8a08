"""What networks and losses ask of tensors, so that a wrong one is named where it enters.

Unequal shapes would broadcast to plausible numbers; other mistakes would end as an error of torch
that knows no names. Nothing here looks at values, so no device is waited for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from tensordict import NestedKey
from torch import Tensor, nn

from prelar_trl.utils import check_integers

__all__ = [
    "LARGEST_WIDTH",
    "check_device",
    "check_entry",
    "check_equal_shapes",
    "check_input",
    "check_output",
    "check_width",
    "embed_width",
    "trial",
]

LARGEST_WIDTH = 2**20  # of an embedding or action: the layers behind it would fill the memory


def check_equal_shapes(dims: int = 0, **tensors: Tensor) -> None:
    """Raise ValueError where shapes or devices differ: they would broadcast silently, or are empty.

    So it does where there are fewer than ``dims`` dimensions; TypeError where one is not a tensor
    of floating-point numbers.
    """
    for name, x in tensors.items():
        _check_tensor(name, x)
        if not x.is_floating_point():
            raise TypeError(f"{name} is {x.dtype}; it must be floating point")
        if x.dim() < dims:
            raise ValueError(f"{name} {list(x.shape)} must have {dims} dimensions at least")
    if len({x.shape for x in tensors.values()}) > 1 or not all(x.numel() for x in tensors.values()):
        given = ", ".join(f"{name} {list(x.shape)}" for name, x in tensors.items())
        raise ValueError(f"{given}: the shapes must be equal, and not empty")
    if len({x.device for x in tensors.values()}) > 1:
        given = ", ".join(f"{name} on {x.device}" for name, x in tensors.items())
        raise ValueError(f"{given}: they must be on one device")


def check_width(name: str, x: Tensor, width: int) -> None:
    """Raise ValueError where the last dimension is not ``width``."""
    if x.shape[-1:] != (width,):
        raise ValueError(f"{name} {list(x.shape)}: its last dimension must be {width}")


def check_input(name: str, x: Tensor, weight: Tensor, width: int | None = None) -> None:
    """Raise where a layer with that weight cannot take ``x``, ``[..., width]``.

    TypeError for another dtype (under autocast any floating-point one is taken), ValueError for
    another width or device. ``width`` None is any.
    """
    _check_tensor(name, x)
    casts = not weight.is_meta and torch.is_autocast_enabled(weight.device.type)
    if x.dtype != weight.dtype and not (casts and x.is_floating_point()):
        raise TypeError(f"{name} is {_dtype(x)}; it must be {_dtype(weight)}, as the weights")
    if width is not None:
        check_width(name, x, width)
    check_device(name, x, weight)


def check_entry(
    key: NestedKey,
    value: Tensor,
    dtype: Literal["bool", "float", "uint8"],
    shape: Sequence[int | str],
    like: Tensor | None = None,
    beside: NestedKey | None = None,
) -> None:
    """Raise where an entry of a batch is not of that type and shape, on the device of ``like``.

    A letter in the shape stands for any size, three dots for any further dimensions at its end;
    ``beside`` is the entry that the shape is taken from, for the message. TypeError is for the
    type, ValueError for the rest, also where it is empty.
    """
    _check_tensor(key, value)
    given = f"{key} is {_dtype(value)} {list(value.shape)}"
    if not value.is_floating_point() if dtype == "float" else _dtype(value) != dtype:
        asked = "uint8 in [0, 255]" if dtype == "uint8" else dtype
        raise TypeError(f"{given}; it must be {asked}")
    fixed = [size for size in shape if size != "..."]
    fits = value.dim() == len(fixed) or (value.dim() > len(fixed) and len(fixed) < len(shape))
    pairs = zip(fixed, value.shape, strict=False)
    if not (fits and value.numel() and all(isinstance(a, str) or a == b for a, b in pairs)):
        asked = ", ".join(map(str, shape))
        known = "" if beside is None else f" beside {beside}"
        raise ValueError(f"{given}; its shape must be [{asked}]{known}, and not empty")
    if like is not None:
        check_device(key, value, like, beside)


def check_output(name: str, x: Tensor, shape: Sequence[int | str], weight: Tensor) -> None:
    """Raise where a network's output is not of that shape, or no layer with ``weight`` takes it.

    As `check_entry` and `check_input`.
    """
    check_entry(name, x, "float", shape)
    check_input(name, x, weight)


def embed_width(name: str, encoder: nn.Module) -> int:
    """The width of an encoder's output, its attribute ``embed_dim``.

    Raises:
        TypeError: it is no module, has no such attribute, or one that is no whole number.
        ValueError: the number is below 1, or above :data:`LARGEST_WIDTH`.
    """
    kind = f"{name} {type(encoder).__name__}"
    if not isinstance(encoder, nn.Module):
        raise TypeError(f"{kind} is no torch.nn.Module: give an instance of one")
    width = getattr(encoder, "embed_dim", None)
    if width is None:
        raise TypeError(f"{kind} has no embed_dim, the width E of its output [N, E]")
    named: dict[str, Any] = {f"{kind}: embed_dim": width}
    check_integers(1, LARGEST_WIDTH, **named)
    return int(width)


def _check_tensor(name: NestedKey, value: Any) -> None:
    if not isinstance(value, Tensor):
        kind = "None" if value is None else type(value).__name__
        raise TypeError(f"{name} is {kind}; it must be a tensor")


def check_device(
    name: NestedKey, value: Tensor, like: Tensor, beside: NestedKey | None = None
) -> None:
    """Raise ValueError where a tensor is on another device than ``like``, which is ``beside``."""
    if value.device != like.device:
        known = "" if beside is None else f" beside {beside}"
        raise ValueError(f"{name} is on {value.device}; it must be on {like.device}{known}")


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


@contextmanager
def trial(network: nn.Module) -> Iterator[None]:
    """In evaluation mode, without gradients; all its parts are left as they were."""
    modes = {part: part.training for part in network.modules()}
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in modes.items():
            part.training = training
