"""What the loss modules share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from tensordict import TensorDict
from torch import Tensor

from prelar_trl.utils import check_range

__all__ = [
    "check_range",
    "check_weights",
    "dispatch",
    "loss_keys",
    "total_loss",
    "weighted",
]

Forward = TypeVar("Forward", bound=Callable[..., Any])
if TYPE_CHECKING:

    def dispatch(forward: Forward) -> Forward:
        """TensorDict's decorator, whose own type does not know its use without parentheses."""
        ...
else:
    from tensordict.nn import dispatch


def check_weights(weights: Mapping[str, float], terms: Iterable[str]) -> dict[str, float]:
    """The weights as a dictionary.

    Raises:
        ValueError: a name that is no term of the loss, or a weight that is negative.
    """
    terms = tuple(terms)
    for name in weights:
        if name not in terms:
            raise ValueError(f"unknown loss weight {name!r}; the terms are {', '.join(terms)}")
    check_range(0, **weights)
    return {name: float(weights[name]) for name in terms if name in weights}


def loss_keys(weights: Mapping[str, float]) -> list[str]:
    """``loss_<term>`` for each term that gives a gradient; one of weight 0 is only reported."""
    return [f"loss_{name}" for name, weight in weights.items() if weight]


def weighted(values: Mapping[str, Tensor], weights: Mapping[str, float]) -> TensorDict:
    """``loss_<term>`` (times its weight) of :func:`loss_keys`, and every value detached."""
    losses = {key: values[key[5:]] * weights[key[5:]] for key in loss_keys(weights)}
    return TensorDict({**losses, **{name: value.detach() for name, value in values.items()}})


def total_loss(losses: TensorDict) -> Tensor:
    """The sum of all ``loss_*`` entries, ``[]`` or, as some of TorchRL's, ``[1]``.

    Raises:
        ValueError: there is none, as when every weight is 0.
    """
    terms = [value.sum() for name, value in losses.items() if name.startswith("loss_")]
    if not terms:
        raise ValueError("no loss has a weight: nothing can be trained")
    return torch.stack(terms).sum()
