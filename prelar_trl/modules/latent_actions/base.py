"""The socket of latent actions: what a kind of latent action is, and how one is found by name.

Shape legend: ... any leading shape, U latent action, N transitions.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from prelar_trl.collectives import ProcessGroup
from prelar_trl.modules.checks import LARGEST_WIDTH, check_entry, trial
from prelar_trl.utils import check_integers

__all__ = [
    "LatentActions",
    "Outputs",
    "latent_action_kinds",
    "make_latent_actions",
    "register_latent_actions",
]


class LatentActions(nn.Module):
    """A kind of latent action: how a network's output becomes one, and what that costs.

    A kind of one's own derives from this class, sets ``num_outputs`` and ``dim`` and writes
    :meth:`forward`; the rest has defaults that suit an action without a distribution. With
    :func:`register_latent_actions` it gets a name for the configuration; without one it is found as
    ``package.module:Class``.

    Attributes:
        num_outputs: width of the network output that it reads.
        dim: U, width of the action that the dynamics takes.
        default_weights: weight of each of :meth:`extra_losses` that the loss is given no weight
            for. Default: 1 each.
        process_group: whose processes share the batch, for kinds that learn from all of it; see
            :mod:`prelar_trl.collectives`. Default: None, no other process.

    Args:
        size: number of latent variables, or the width of the action.
        options: further settings of the kind.
    """

    num_outputs: int
    dim: int
    default_weights: ClassVar[Mapping[str, float]] = {}
    process_group: ProcessGroup | None = None

    def __init__(self, *, size: int, **options: Any) -> None:
        super().__init__()

    def forward(self, raw: Tensor, sample: bool = True) -> tuple[Tensor, Tensor | None]:
        """Network output ``[..., num_outputs]`` -> action ``[..., U]`` and parameters, or None.

        The parameters ``[..., *]`` are what :meth:`kl`, :meth:`distance` and
        :meth:`extra_losses` read of an action besides itself; they travel through a TensorDict
        under one key. With ``sample=False`` the action is its distribution's mode.
        """
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def kl(self, params: Tensor) -> Tensor:
        """KL divergence from the kind's prior, ``[...]``, in nats. Default: zeros, no prior."""
        return torch.zeros(params.shape[:-1], device=params.device)

    def distance(
        self, action_a: Tensor, params_a: Tensor | None, action_b: Tensor, params_b: Tensor | None
    ) -> Tensor:
        """How different two actions are, ``[...]``. Default: the squared distance."""
        dtype = torch.promote_types(action_a.dtype, torch.float32)
        return (action_a.to(dtype) - action_b.to(dtype)).square().sum(-1)

    def features(self, action: Tensor, params: Tensor | None) -> Tensor:
        """What a probe reads of an action taken with ``sample=False``, ``[..., X]``, noise-free."""
        return action

    def extra_losses(self, action: Tensor, params: Tensor | None) -> dict[str, Tensor]:
        """Losses of its own, scalars by name; a name is also that of its weight. Default: none."""
        return {}

    def metrics(self, action: Tensor, params: Tensor | None) -> dict[str, Tensor]:
        """What to log besides, detached scalars by name. Default: none."""
        return {}

    @torch.no_grad()
    def outputs(self) -> Outputs:
        """What the kind gives, seen on an input of zeros in evaluation mode.

        Raises:
            TypeError, ValueError: it raises an error, or gives something else than this class
                promises of a kind.
        """
        name = type(self).__name__
        widths: dict[str, Any] = {
            f"{name}.{width}": getattr(self, width, None) for width in ("num_outputs", "dim")
        }
        check_integers(1, LARGEST_WIDTH, **widths)
        tensors = [x for x in (*self.parameters(), *self.buffers()) if x.is_floating_point()]
        like = tensors[0] if tensors else torch.zeros(())
        try:
            with trial(self):
                return self._outputs(like.new_zeros(2, 3, self.num_outputs))
        except Exception as error:
            why = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(f"{name}, given zeros [2, 3, {self.num_outputs}]: {why}") from error

    def _outputs(self, raw: Tensor) -> Outputs:
        """Of an input ``[2, 3, num_outputs]``."""
        found = self(raw, sample=False)
        if not isinstance(found, tuple) or len(found) != 2:
            raise TypeError("forward must give (action, params)")
        action, params = found
        check_entry("action", action, "float", (2, 3, self.dim))
        if params is not None:
            check_entry("params", params, "float", (2, 3, "P", "..."))
        if params is not None and type(self).kl is not LatentActions.kl:
            check_entry("kl(params)", self.kl(params), "float", (2, 3))
        distance = self.distance(action, params, action, params)
        check_entry("distance", distance, "float", (2, 3))
        losses, metrics = self.extra_losses(action, params), self.metrics(action, params)
        for method, scalars in (("extra_losses", losses), ("metrics", metrics)):
            if not isinstance(scalars, dict) or any(not isinstance(x, str) for x in scalars):
                raise TypeError(f"{method} must give a dictionary by names")
        for key, loss in losses.items():
            check_entry(f"extra_losses: {key}", loss, "float", ())
        for key, metric in metrics.items():
            if not isinstance(metric, Tensor) or metric.dim():
                raise TypeError(f"metrics: {key} is {metric!r:.60}; it must be a scalar tensor")
        return Outputs(params is not None, tuple(losses), tuple(metrics))


class Outputs(NamedTuple):
    """Whether a kind's actions have parameters, and the names of its own losses and metrics."""

    has_params: bool
    losses: tuple[str, ...]
    metrics: tuple[str, ...]


_KINDS: dict[str, type[LatentActions]] = {}
Kind = TypeVar("Kind", bound=type[LatentActions])


def register_latent_actions(name: str) -> Callable[[Kind], Kind]:
    """Class decorator: makes a kind of latent action known by ``name``.

    Raises:
        ValueError: another class has that name.
    """

    def decorate(kind: Kind) -> Kind:
        known = _KINDS.setdefault(name, kind)
        if (known.__module__, known.__qualname__) != (kind.__module__, kind.__qualname__):
            raise ValueError(
                f"the latent action {name!r} is {known.__qualname__}: take another name"
            )
        _KINDS[name] = kind
        return kind

    return decorate


def latent_action_kinds() -> tuple[str, ...]:
    """The registered names."""
    return tuple(sorted(_KINDS))


def make_latent_actions(
    kind: str, *, size: int, shared: Mapping[str, Any] | None = None, **options: Any
) -> LatentActions:
    """A kind of latent action by its registered name, or by ``package.module:Class``.

    Args:
        kind: the name. A module that is named is imported.
        size: see :class:`LatentActions`.
        shared: options that go to those kinds only whose constructor names them.
        options: options of the kind.

    Raises:
        ValueError: an unknown name, a class that is none, or options that the kind does not take.
    """
    cls = _find(kind)
    known = inspect.signature(cls).parameters
    chosen = {name: value for name, value in (shared or {}).items() if name in known}
    try:
        made = cls(size=size, **{**chosen, **options})
    except TypeError as error:
        raise ValueError(f"latent action {kind!r}, options {options}: {error}") from error
    for name in ("num_outputs", "dim"):
        if not isinstance(getattr(made, name, None), int):
            raise ValueError(f"latent action {kind!r}: {cls.__name__} does not set {name}")
    return made


def _find(kind: str) -> type[LatentActions]:
    if kind in _KINDS:
        return _KINDS[kind]
    if ":" not in str(kind):
        raise ValueError(
            f"latent action {kind!r} is unknown; choose {', '.join(latent_action_kinds())}, or "
            "package.module:Class"
        )
    try:
        found = pkgutil.resolve_name(kind)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"latent action {kind!r} cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, LatentActions)):
        raise ValueError(f"latent action {kind!r} is no class derived from LatentActions")
    return found
