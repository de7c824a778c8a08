"""Distributions of latent states, latent actions and actions, as functions of plain tensors.

A distribution object holds sizes only. Its *params* are one tensor, so that it travels through
a TensorDict under one key:

- ``Categorical``: logits ``[..., S, K]``;
- ``Gaussian``: mean and standard deviation stacked last, ``[..., S, 2]``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from prelar_trl.modules.checks import check_equal_shapes, check_width
from prelar_trl.utils import check_integers

__all__ = [
    "Categorical",
    "Gaussian",
    "OneHot",
    "TruncatedNormal",
    "to_float32",
    "categorical_kl",
    "gaussian_kl",
]


def to_float32(x: Tensor) -> Tensor:
    """``x`` in float32, or unchanged if it is float64: the precision of all losses."""
    return x if x.dtype == torch.float64 else x.float()


def categorical_kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of independent categoricals, summed over the variables.

    Args:
        p, q: logits ``[..., S, K]``.

    Returns:
        ``[...]``, in nats, computed in float32 (or float64).
    """
    check_equal_shapes(2, p=p, q=q)
    log_p, log_q = to_float32(p).log_softmax(-1), to_float32(q).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum((-2, -1))


def gaussian_kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of independent Gaussians, summed over the variables.

    Args:
        p, q: mean and standard deviation stacked last, ``[..., S, 2]``.

    Returns:
        ``[...]``, in nats, computed in float32 (or float64).
    """
    check_equal_shapes(2, p=p, q=q)
    if p.shape[-1] != 2:
        raise ValueError(f"p, q {list(p.shape)} must be mean and standard deviation, [..., S, 2]")
    (mean_p, std_p), (mean_q, std_q) = (to_float32(x).unbind(-1) for x in (p, q))
    ratio = (std_p / std_q).square()
    distance = ((mean_p - mean_q) / std_q).square()
    return 0.5 * (ratio + distance - 1 - ratio.log()).sum(-1)


def _check_value(value: Tensor, params: Tensor) -> None:
    """Raise where a value is not floating point, of another width, or cannot be broadcast."""
    if not value.is_floating_point():
        raise TypeError(f"value is {value.dtype}; it must be floating point")
    check_width("value", value, params.shape[-1])
    pairs = zip(reversed(value.shape), reversed(params.shape), strict=False)
    if not all(a == b or 1 in (a, b) for a, b in pairs):
        raise ValueError(f"value {list(value.shape)} does not fit {list(params.shape)}")


class Categorical:
    """``size`` one-hot variables of ``classes`` classes with straight-through gradients.

    Source: DreamerV2 (Hafner et al., 2021), section 2, algorithm 1.
    """

    kind: ClassVar[Literal["categorical"]] = "categorical"

    def __init__(self, size: int, classes: int) -> None:
        check_integers(size=size, classes=classes)
        self.size, self.classes = size, classes
        self.num_outputs = self.flat_size = size * classes
        self.shape = (size, classes)

    def params(self, raw: Tensor) -> Tensor:
        """Network output ``[..., S*K]`` -> logits ``[..., S, K]``."""
        check_width("raw", raw, self.num_outputs)
        return raw.unflatten(-1, self.shape)

    def rsample(self, params: Tensor, sample: bool = True) -> Tensor:
        """One-hot sample, or mode, ``[..., S, K]``; the gradient is that of the probabilities."""
        logits = to_float32(params)
        probs = logits.softmax(-1)
        if sample:  # inverse CDF: one random number a variable, no host synchronization
            below = probs.detach().cumsum(-1)
            threshold = torch.rand_like(below[..., :1]) * below[..., -1:]
            index = (below <= threshold).sum(-1, keepdim=True).clamp_max(self.classes - 1)
        else:
            index = logits.argmax(-1, keepdim=True)
        one_hot = torch.zeros_like(probs).scatter_(-1, index, 1.0)
        return one_hot + (probs - probs.detach())

    def flatten(self, value: Tensor) -> Tensor:
        """``[..., S, K]`` -> ``[..., S*K]``."""
        return value.flatten(-2)

    def kl(self, p: Tensor, q: Tensor) -> Tensor:
        return categorical_kl(p, q)

    def entropy(self, params: Tensor) -> Tensor:
        """Entropy summed over the variables, in nats, ``[...]``."""
        log_p = to_float32(params).log_softmax(-1)
        return -(log_p.exp() * log_p).sum((-2, -1))


class Gaussian:
    """``size`` independent Gaussians, std = ``2 * sigmoid(raw / 2) + min_std``, reparameterized."""

    kind: ClassVar[Literal["gaussian"]] = "gaussian"

    def __init__(self, size: int, min_std: float = 0.1) -> None:
        check_integers(size=size)
        self.size, self.min_std = size, min_std
        self.num_outputs, self.flat_size = 2 * size, size
        self.shape = (size,)

    def params(self, raw: Tensor) -> Tensor:
        """Network output ``[..., 2*S]`` (means, then raw stds) -> ``[..., S, 2]``."""
        check_width("raw", raw, self.num_outputs)
        mean, std = to_float32(raw).chunk(2, -1)
        return torch.stack([mean, 2 * torch.sigmoid(std / 2) + self.min_std], -1)

    def rsample(self, params: Tensor, sample: bool = True) -> Tensor:
        """Reparameterized sample, or mean, ``[..., S]``."""
        mean, std = params.unbind(-1)
        return mean + std * torch.randn_like(mean) if sample else mean

    def flatten(self, value: Tensor) -> Tensor:
        return value

    def kl(self, p: Tensor, q: Tensor) -> Tensor:
        return gaussian_kl(p, q)

    def entropy(self, params: Tensor) -> Tensor:
        """Differential entropy summed over the variables, in nats, ``[...]``."""
        std = to_float32(params[..., 1])
        return (std.log() + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)


class TruncatedNormal:
    """Independent normals truncated to [-1, 1], the actor's distribution.

    Args:
        mean: location of the untruncated normal, in [-1, 1], ``[..., A]``.
        std: its scale, positive, ``[..., A]``.
    """

    EDGE = 1 - 1e-6

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        check_equal_shapes(1, mean=mean, std=std)
        self.mean, self.std = to_float32(mean), to_float32(std)
        self._low, self._high = (-1 - self.mean) / self.std, (1 - self.mean) / self.std
        self._cdf_low = torch.special.ndtr(self._low)
        self._mass = (torch.special.ndtr(self._high) - self._cdf_low).clamp_min(1e-7)

    @classmethod
    def from_raw(cls, mean: Tensor, std: Tensor) -> TruncatedNormal:
        """From network outputs: mean ``tanh(.)``, std ``2 * sigmoid(. / 2) + 0.1``, in float32."""
        return cls(torch.tanh(to_float32(mean)), 2 * torch.sigmoid(to_float32(std) / 2) + 0.1)

    @classmethod
    def stack(cls, parts: Sequence[TruncatedNormal], dim: int) -> TruncatedNormal:
        """Distributions of one shape as one, with a new dimension ``dim`` of mean and std."""
        return cls(
            torch.stack([p.mean for p in parts], dim), torch.stack([p.std for p in parts], dim)
        )

    @property
    def mode(self) -> Tensor:
        """The mean, clamped as a sample is."""
        return self._clamp(self.mean)

    def rsample(self, sample: bool = True) -> Tensor:
        """Sample by the inverse CDF (differentiable in mean and std), or the mode, ``[..., A]``."""
        if not sample:
            return self.mode
        uniform = torch.rand_like(self.mean).clamp(1e-6, 1 - 1e-6)
        z = torch.special.ndtri((self._cdf_low + uniform * self._mass).clamp(1e-7, 1 - 1e-7))
        return self._clamp(self.mean + self.std * z)

    def perturb(self, action: Tensor, amount: float) -> Tensor:
        """The action with Gaussian noise of that standard deviation, within [-1, 1]."""
        return (action + amount * torch.randn_like(action)).clamp(-1, 1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of ``value`` in [-1, 1], summed over the action, ``[...]``."""
        _check_value(value, self.mean)
        z = (value - self.mean) / self.std
        log_density = -0.5 * z.square() - 0.5 * math.log(2 * math.pi)
        return (log_density - self.std.log() - self._mass.log()).sum(-1)

    def entropy(self) -> Tensor:
        """Differential entropy summed over the action, in nats, ``[...]``."""

        def moment(z: Tensor) -> Tensor:
            return z * torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)

        tails = (moment(self._high) - moment(self._low)) / self._mass
        log_scale = self.std.log() + self._mass.log()
        return (log_scale + 0.5 * math.log(2 * math.pi * math.e) - 0.5 * tails).sum(-1)

    def _clamp(self, value: Tensor) -> Tensor:
        """Clamp inside the open interval, passing the gradient straight through."""
        return value + (F.hardtanh(value, -self.EDGE, self.EDGE) - value).detach()


class OneHot:
    """One of A choices as a one-hot vector with straight-through gradients: discrete actions.

    Args:
        logits: ``[..., A]``.
    """

    def __init__(self, logits: Tensor) -> None:
        check_equal_shapes(1, logits=logits)
        self.logits = to_float32(logits)
        self._choice = Categorical(1, logits.shape[-1])

    @classmethod
    def stack(cls, parts: Sequence[OneHot], dim: int) -> OneHot:
        """Distributions of one shape as one, with a new dimension ``dim`` of the logits."""
        return cls(torch.stack([p.logits for p in parts], dim))

    @property
    def mode(self) -> Tensor:
        return self.rsample(sample=False)

    def rsample(self, sample: bool = True) -> Tensor:
        """Sample, or the mode, ``[..., A]``; the gradient is that of the probabilities."""
        return self._choice.rsample(self.logits.unsqueeze(-2), sample).squeeze(-2)

    def perturb(self, action: Tensor, amount: float) -> Tensor:
        """The action, or with that probability one that is drawn evenly."""
        even = OneHot(torch.zeros_like(action)).rsample()
        return torch.where(torch.rand_like(action[..., :1]) < amount, even, action)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of a one-hot ``value`` ``[..., A]``, in nats, ``[...]``."""
        _check_value(value, self.logits)
        return (value * self.logits.log_softmax(-1)).sum(-1)

    def entropy(self) -> Tensor:
        """In nats, ``[...]``."""
        return self._choice.entropy(self.logits.unsqueeze(-2))
