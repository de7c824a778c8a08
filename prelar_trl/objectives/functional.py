"""The mathematics of the losses, as pure functions of tensors.

Shape legend: B batch, T time, S stochastic variables, K classes, N transitions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from prelar_trl.modules.checks import check_equal_shapes
from prelar_trl.modules.distributions import categorical_kl, gaussian_kl, to_float32
from prelar_trl.types import ConsistencyMode
from prelar_trl.utils import check_choice, check_integers, check_range

__all__ = [
    "action_contrast",
    "action_state_consistency",
    "balanced_kl",
    "categorical_kl",
    "gaussian_kl",
    "gaussian_nll",
    "knn_distance",
    "lambda_return",
    "sliding_mean",
]

LEAST_SCALE = 1.0  # of the differences in mode "gated": nats, or squared distance


def gaussian_nll(mean: Tensor, target: Tensor, event_dims: int = 1) -> Tensor:
    """Negative log-likelihood of a unit-variance Gaussian without its constant.

    ``(target - mean)^2 / 2``, summed over the last ``event_dims`` dimensions, in float32.
    """
    check_integers(0, event_dims=event_dims)
    check_equal_shapes(event_dims, mean=mean, target=target)
    mean, target = to_float32(mean), to_float32(target)
    error = F.mse_loss(mean, target.to(mean.dtype), reduction="none")
    return 0.5 * (error.flatten(-event_dims).sum(-1) if event_dims else error)


def balanced_kl(
    posterior: Tensor,
    prior: Tensor,
    kl: Callable[[Tensor, Tensor], Tensor] = categorical_kl,
    balance: float = 0.8,
    free_nats: float = 0.0,
    free_avg: bool = True,
    mean: Callable[[Tensor], Tensor] = torch.mean,
) -> Tensor:
    """KL between posterior and prior, the prior learning faster than the posterior.

    ``balance * max(mean KL(sg(q) || p), free) + (1 - balance) * max(mean KL(q || sg(p)), free)``
    (DreamerV2, section 2, algorithm 2).

    Args:
        posterior, prior: statistics of q and p, ``[..., S, K]``.
        kl: KL divergence of two such statistics, ``[...]``. Default: of categoricals.
        balance: share of the gradient that moves the prior. Default: 0.8.
        free_nats: below this the KL gives no gradient. Default: 0.
        free_avg: compare the mean with ``free_nats``; otherwise every element. Default: True.
        mean: of all elements. Default: their own; the batch may have others, elsewhere.

    Returns:
        Scalar, in nats.
    """
    check_equal_shapes(posterior=posterior, prior=prior)
    check_range(0, 1, balance=balance)
    check_range(0, free_nats=free_nats)
    to_prior = kl(posterior.detach(), prior)
    to_posterior = kl(posterior, prior.detach())
    if free_avg:
        to_prior, to_posterior = mean(to_prior), mean(to_posterior)
    loss = balance * to_prior.clamp_min(free_nats).mean()
    return loss + (1 - balance) * to_posterior.clamp_min(free_nats).mean()


def lambda_return(reward: Tensor, value: Tensor, discount: Tensor, lmbda: float = 0.95) -> Tensor:
    """Lambda-returns along dimension 1.

    ``t_k = r_k + d_k * ((1 - lmbda) * v_{k+1} + lmbda * t_{k+1})``, ``t_H = v_H``
    (DreamerV2, section 3, equation 4).

    Args:
        reward, value, discount: ``[N, H+1, ...]``; the last reward and discount are not used.
        lmbda: 0 gives one-step targets, 1 the discounted sum with the last value. Default: 0.95.

    Returns:
        ``[N, H+1, ...]``; the last entry is the last value.
    """
    check_equal_shapes(2, reward=reward, value=value, discount=discount)
    check_range(0, 1, lmbda=lmbda)
    one_step = reward[:, :-1] + discount[:, :-1] * (1 - lmbda) * value[:, 1:]
    decay = lmbda * discount[:, :-1]
    targets = [value[:, -1]]
    for k in reversed(range(one_step.shape[1])):
        targets.append(one_step[:, k] + decay[:, k] * targets[-1])
    return torch.stack(targets[::-1], 1)


def action_state_consistency(
    p: Tensor, q: Tensor, mode: ConsistencyMode = "soft", temperature: float = 0.5
) -> Tensor:
    """Do larger changes of the action go with larger changes of the next state?

    Compares two orderings of N transitions (PreLAR, section 3.3). Modes:

    - ``soft``: each pair (i, j) is a comparison with win probability
      ``sigmoid((x_i - x_j) / (temperature * scale(x)))``, ``scale`` the mean absolute difference;
      the loss is the mean Bernoulli KL from p's probabilities to q's (RankNet, Burges et al.,
      2005, with soft targets). It is convex in q for a given scale and stationary only where the
      scaled differences of q equal those of p, hence never where the orderings disagree.
    - ``sign``: ``mean_ij (sign(p_i - p_j) - sign(q_i - q_j))^2``, the authors' code.
      **Its gradient is zero everywhere**; it is kept for fidelity and as a metric.
    - ``soft_rank``: one minus the correlation of p's and q's soft ranks.
    - ``gated``: ``soft`` with scales of at least :data:`LEAST_SCALE`, times the gate
      ``scale(p) / (scale(p) + LEAST_SCALE)``. ``soft`` and ``soft_rank`` know no scale: while the
      dynamics ignores the actions p is rounding noise, which q is then made to order, by a gradient
      that grows as q shrinks; so they keep unused actions unused. Here the gradient in q is
      bounded, and the loss is off until actions change the next state by about a nat.

    Args:
        p: state divergence of each transition, ``[N]``; never differentiated.
        q: action divergence of each transition, ``[N]``.
        temperature: softness of ``soft`` and ``soft_rank``. Default: 0.5.

    Returns:
        Scalar; zero where the orderings agree perfectly (``soft``: the scaled differences too).
    """
    if p.dim() != 1 or p.shape != q.shape or not len(p):
        raise ValueError(
            f"p {tuple(p.shape)} and q {tuple(q.shape)} must both have shape [N], and not be empty"
        )
    check_equal_shapes(p=p, q=q)
    check_temperature(temperature)
    check_choice("mode", mode, get_args(ConsistencyMode))
    p, q = to_float32(p.detach()), to_float32(q)
    p_difference, q_difference = p[:, None] - p, q[:, None] - q  # [N, N]
    match mode:
        case "sign":
            return (p_difference.sign() - q_difference.sign()).square().mean()
        case "soft" | "gated":
            p_scale, q_scale = (
                _difference_scale(x, y) for x, y in ((p, p_difference), (q, q_difference))
            )
            gate = 1.0
            if mode == "gated":
                gate = p_scale / (p_scale + LEAST_SCALE)
                p_scale, q_scale = p_scale.clamp_min(LEAST_SCALE), q_scale.clamp_min(LEAST_SCALE)
            target = p_difference / (temperature * p_scale)
            logits = q_difference / (temperature * q_scale)
            probability = target.sigmoid()
            entropy = F.binary_cross_entropy_with_logits(target, probability)
            return gate * (F.binary_cross_entropy_with_logits(logits, probability) - entropy)
        case "soft_rank":
            sharp = 0.1 * temperature
            p_rank = (p_difference / (sharp * _difference_scale(p, p_difference))).sigmoid().mean(1)
            q_rank = (q_difference / (sharp * _difference_scale(q, q_difference))).sigmoid().mean(1)
            p_rank, q_rank = p_rank - p_rank.mean(), q_rank - q_rank.mean()
            spread = (p_rank.square().mean() * q_rank.square().mean() + 1e-6).sqrt()
            return 1 - (p_rank * q_rank).mean() / spread


def _difference_scale(x: Tensor, difference: Tensor) -> Tensor:
    """Mean absolute difference, detached; at least 0.1% of the mean magnitude, never zero."""
    return (difference.abs().mean() + 1e-3 * x.abs().mean() + 1e-8).detach()


def action_contrast(kl: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """InfoNCE over action candidates: which of them explains the transition?

    ``cross_entropy(-kl / temperature, 0)`` (van den Oord et al., 2018, equation 4).

    Args:
        kl: divergence of the next state from its prediction under each candidate action,
            ``[N, 1+K]``; column 0 is the transition's own action.
        temperature: positive. Default: 1.

    Returns:
        Scalar; chance level is ``log(1 + K)``.
    """
    if kl.dim() != 2 or kl.shape[1] < 2 or not len(kl):
        raise ValueError(
            f"kl has shape {tuple(kl.shape)}; it must be [N, 1+K] with K >= 1, and not empty"
        )
    check_equal_shapes(kl=kl)
    check_temperature(temperature)
    return -(-to_float32(kl) / temperature).log_softmax(-1)[:, 0].mean()


def sliding_mean(x: Tensor, window: int) -> Tensor:
    """Mean of each ``window`` steps along dimension 1: ``[B, T, E]`` -> ``[B, T-w+1, E]``."""
    check_integers(window=window)
    check_equal_shapes(2, x=x)
    if x.shape[1] < window:
        raise ValueError(f"sequences of {x.shape[1]} steps are shorter than the window of {window}")
    return x.unfold(1, window, 1).mean(-1)


def knn_distance(x: Tensor, memory: Tensor, valid: Tensor, k: int) -> Tensor:
    """Mean Euclidean distance of each point to its k nearest valid points of the memory.

    Args:
        x: points ``[N, P]``.
        memory: ``[M, P]``.
        valid: bool ``[M]``; with fewer than k valid points all of them count, with
            none the distance is 0.
        k: number of neighbors.

    Returns:
        ``[N]``.
    """
    check_integers(k=k)
    for name, points in (("x", x), ("memory", memory)):
        if not points.is_floating_point():
            raise TypeError(f"{name} is {points.dtype}; it must be floating point")
    matching = x.shape[1:] == memory.shape[1:] and valid.shape == memory.shape[:1]
    if x.dim() != 2 or not matching or valid.dtype != torch.bool:
        raise ValueError(
            f"x {list(x.shape)}, memory {list(memory.shape)}, valid {valid.dtype} "
            f"{list(valid.shape)} must be [N, P], [M, P], bool [M]"
        )
    # A matrix product instead of differences; in float64, or a point is far from itself. Not zero,
    # where the root has no gradient.
    a, b = x.double(), memory.double()
    square = (a.square().sum(1)[:, None] + b.square().sum(1)).addmm_(a, b.t(), alpha=-2)
    distance = (
        square.clamp_min(torch.finfo(x.dtype).tiny)
        .sqrt()
        .to(x.dtype)
        .masked_fill(~valid, torch.inf)
    )
    nearest = distance.topk(min(k, memory.shape[0]), largest=False).values  # [N, k]
    found = torch.arange(nearest.shape[1], device=x.device) < valid.sum()  # the valid come first
    return nearest.where(found, 0.0).sum(-1) / found.sum().clamp_min(1)


def check_temperature(temperature: float | Tensor) -> None:
    """Raise ValueError for a number that is not positive, or too large; TypeError for none."""
    if not isinstance(temperature, Tensor):
        check_range(-1e12, 1e12, temperature=temperature)
        if temperature <= 0:
            raise ValueError(f"temperature={temperature} must be above 0")
