"""Recurrent state-space model (RSSM): GRU with layer norm, prior and posterior."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prelar_trl.modules.checks import check_input
from prelar_trl.modules.distributions import Categorical, Gaussian
from prelar_trl.utils import check_integers

__all__ = ["RSSM", "State"]


class State(NamedTuple):
    """A latent state: ``stoch`` ``[..., S, K]`` (Gaussian: ``[..., S]``), deter ``[..., D]``."""

    stoch: Tensor
    deter: Tensor


class GRUCell(nn.Module):
    """GRU cell with one layer norm over all gates and update bias -1 (DreamerV2)."""

    def __init__(self, input_size: int, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(input_size + size, 3 * size)
        self.norm = nn.LayerNorm(3 * size, eps=1e-3)

    def forward(self, x: Tensor, deter: Tensor) -> Tensor:
        """Input ``[..., input_size]`` and old state ``[..., size]`` -> new state."""
        gates = self.norm(self.linear(torch.cat([x, deter], -1)))
        reset, candidate, update = gates.chunk(3, -1)
        candidate = torch.tanh(torch.sigmoid(reset) * candidate)
        update = torch.sigmoid(update - 1)
        return update * candidate + (1 - update) * deter


class RSSM(nn.Module):
    """RSSM of DreamerV2 (Hafner et al., 2021, section 2).

    Time alignment: the action at index t led to the frame at index t::

        index     t-1                t
        action                       a_t
        state     (h, z)_{t-1} ----> h_t = GRU(h_{t-1}, z_{t-1}, a_t)
        prior                        p(z_t | h_t)
        posterior                    q(z_t | h_t, e_t)

    Args:
        action_dim: width of the action input; a narrower action is padded with zeros on the right.
        embed_dim: width of the embedding e_t.
        stoch: number S of stochastic variables. Default: 32.
        classes: classes K of each; 0 makes the latent Gaussian. Default: 32.
        deter: size D of the GRU. Default: 1024.
        hidden: size of the hidden layers. Default: 1024.
        ensemble: number of prior heads, one drawn at random per step. Default: 1.
    """

    def __init__(
        self,
        action_dim: int,
        embed_dim: int,
        *,
        stoch: int = 32,
        classes: int = 32,
        deter: int = 1024,
        hidden: int = 1024,
        ensemble: int = 1,
    ) -> None:
        super().__init__()
        check_integers(0, action_dim=action_dim, classes=classes)
        check_integers(
            embed_dim=embed_dim, stoch=stoch, deter=deter, hidden=hidden, ensemble=ensemble
        )
        self.latent = Categorical(stoch, classes) if classes else Gaussian(stoch)
        self.action_dim, self.embed_dim, self.deter = action_dim, embed_dim, deter
        self.feat_dim = self.latent.flat_size + deter
        self.act = nn.ELU()
        self.input_layer = nn.Linear(self.latent.flat_size + action_dim, hidden)
        self.cell = GRUCell(hidden, deter)
        self.prior_heads = nn.ModuleList(
            nn.Sequential(
                nn.Linear(deter, hidden), nn.ELU(), nn.Linear(hidden, self.latent.num_outputs)
            )
            for _ in range(ensemble)
        )
        self.posterior_hidden = nn.Linear(deter + embed_dim, hidden)
        self.posterior_out = nn.Linear(hidden, self.latent.num_outputs)

    def initial_state(self, *batch: int) -> State:
        """The all-zero state of batch shape ``batch``, where the weights are."""
        weight = self.input_layer.weight
        return State(
            weight.new_zeros(*batch, *self.latent.shape), weight.new_zeros(*batch, self.deter)
        )

    def feat(self, state: State) -> Tensor:
        """``concat(flat stoch, deter)``, ``[..., F]``."""
        return torch.cat([self.latent.flatten(state.stoch), state.deter], -1)

    # ------------------------------------------------------------------ one step

    def transition(self, state: State, action: Tensor | None) -> Tensor:
        """``h_t`` ``[..., D]`` from the state before and ``a_t`` ``[..., A]``; None: no action."""
        stoch = self.latent.flatten(state.stoch)
        action = self.pad_action(stoch[..., :0] if action is None else action)
        x = torch.cat([stoch, action.expand(*stoch.shape[:-1], -1)], -1)
        return self.cell(self.act(self.input_layer(x)), state.deter)

    def pad_action(self, action: Tensor) -> Tensor:
        """The action with zeros on the right, ``action_dim`` wide.

        Raises:
            ValueError: it is wider.
        """
        missing = self.action_dim - action.shape[-1]
        if missing < 0:
            raise ValueError(
                f"the action has {action.shape[-1]} dimensions but this RSSM takes at most "
                f"{self.action_dim}"
            )
        return F.pad(action, (0, missing))

    def prior(self, deter: Tensor, head: int | None = None) -> Tensor:
        """Parameters of ``p(z_t | h_t)``, ``[..., S, K]``: by that head of the ensemble.

        Without ``head`` one is drawn for each step, which is an index of the second axis of a
        sequence ``[B, T, D]``, or the whole call.
        """
        if head is not None or len(self.prior_heads) == 1:
            return self.latent.params(self.prior_heads[head or 0](deter))
        raw = [head(deter) for head in self.prior_heads]
        steps = deter.shape[1] if deter.dim() == 3 else 1
        index = torch.randint(len(raw), (steps, 1), device=deter.device)
        stacked = torch.stack(raw)  # [ensemble, ..., num_outputs]
        index = index.expand(stacked.shape[1:])[None]
        return self.latent.params(stacked.gather(0, index)[0])

    def posterior(self, deter: Tensor, embed: Tensor) -> Tensor:
        """Parameters of ``q(z_t | h_t, e_t)``, ``[..., S, K]``."""
        hidden = self.act(self.posterior_hidden(torch.cat([deter, embed], -1)))
        return self.latent.params(self.posterior_out(hidden))

    def step(
        self, state: State, action: Tensor | None, sample: bool = True
    ) -> tuple[State, Tensor]:
        """One step without a frame: the next state, from the prior, and the prior's parameters."""
        deter = self.transition(state, action)
        prior = self.prior(deter)
        return State(self.latent.rsample(prior, sample), deter), prior

    def observe_step(
        self,
        state: State,
        action: Tensor | None,
        embed: Tensor,
        is_first: Tensor,
        sample: bool = True,
    ) -> tuple[State, Tensor]:
        """One step with a frame: the next state, from the posterior, and its parameters.

        Where ``is_first`` ``[B]`` holds, the state before and the action ``[B, A]`` are zeroed.
        """
        state = State(*(_zero_where(is_first, x) for x in state))
        if action is not None:
            action = _zero_where(is_first, action)
        deter = self.transition(state, action)
        posterior = self.posterior(deter, embed)
        return State(self.latent.rsample(posterior, sample), deter), posterior

    # ------------------------------------------------------------------ sequences

    def observe(
        self,
        embed: Tensor,
        action: Tensor | None,
        is_first: Tensor,
        state: State | None = None,
        sample: bool = True,
    ) -> tuple[State, Tensor, Tensor]:
        """Filter a sequence.

        Args:
            embed: ``[B, T, E]``.
            action: ``[B, T, A]``, or None for the action-free RSSM (a zero action).
            is_first: bool ``[B, T]``; there the previous state and the action are zeroed.
            state: the state before the first step. Default: the initial one.
            sample: draw the stochastic state; otherwise take its mode. Default: True.

        Returns:
            Posterior states ``[B, T, ...]``, parameters of the posterior and of the prior, each
            ``[B, T, S, K]`` (Gaussian: ``[B, T, S, 2]``).
        """
        self._check_observed(embed, action, is_first)
        batch, steps = embed.shape[:2]
        state = state or self.initial_state(batch)
        states, posteriors = [], []
        for t, a in enumerate(_steps(action, steps)):
            state, posterior = self.observe_step(state, a, embed[:, t], is_first[:, t], sample)
            states.append(state)
            posteriors.append(posterior)
        stacked = _stack(states)
        return stacked, torch.stack(posteriors, 1), self.prior(stacked.deter)

    def imagine(
        self, action: Tensor | None, state: State, sample: bool = True, steps: int = 0
    ) -> tuple[State, Tensor]:
        """Roll the prior forward under given actions.

        Args:
            action: ``[B, T, A]``, or None for the action-free RSSM.
            state: the state before the first step, ``[B, ...]``.
            sample: draw the stochastic state; otherwise take its mode. Default: True.
            steps: how many without actions; with them their number T counts.

        Returns:
            Prior states ``[B, T, ...]`` and the prior's parameters ``[B, T, S, K]``.
        """
        if action is None:
            check_integers(steps=steps)
        self._check_state(state)
        self._check_actions(action, (len(state.deter),))
        states, priors = [], []
        for a in _steps(action, steps):
            state, prior = self.step(state, a, sample)
            states.append(state)
            priors.append(prior)
        return _stack(states), torch.stack(priors, 1)

    def _check_observed(self, embed: Tensor, action: Tensor | None, is_first: Tensor) -> None:
        """Raise where they are not what :meth:`observe` takes."""
        if embed.dim() != 3 or is_first.shape != embed.shape[:2] or not is_first.numel():
            raise ValueError(
                f"embed {list(embed.shape)} and is_first {list(is_first.shape)} must be [B, T, E] "
                "and [B, T], and not empty"
            )
        check_input("embed", embed, self.input_layer.weight, self.embed_dim)
        if is_first.dtype != torch.bool:
            raise TypeError(f"is_first is {is_first.dtype}; it must be bool")
        self._check_actions(action, tuple(embed.shape[:2]))

    def _check_actions(self, action: Tensor | None, batch: tuple[int, ...]) -> None:
        """Raise where they are not ``[B, T, A]`` of the batch; they would broadcast."""
        if action is None:
            return
        check_input("action", action, self.input_layer.weight)
        if action.dim() != 3 or action.shape[: len(batch)] != batch or not action.shape[1]:
            raise ValueError(f"action {list(action.shape)} must be [B, T, A] of batch {batch}")

    def _check_state(self, state: State) -> None:
        """Raise where it is not of this RSSM, or its two parts are of unlike batches."""
        stoch, deter = state
        check_input("deter", deter, self.input_layer.weight, self.deter)
        check_input("stoch", stoch, self.input_layer.weight)
        if stoch.shape != (*deter.shape[:-1], *self.latent.shape):
            asked = [*deter.shape[:-1], *self.latent.shape]
            raise ValueError(f"stoch {list(stoch.shape)} must be {asked}")

    def forward(
        self, stoch: Tensor, deter: Tensor, action: Tensor | None, head: int | None = None
    ) -> Tensor:
        """The prior's parameters ``[..., S, K]`` one step after the state under ``action``.

        ``head``: see :meth:`prior`.
        """
        self._check_state(State(stoch, deter))
        if action is not None:
            check_input("action", action, self.input_layer.weight)
            if action.shape[:-1] != deter.shape[:-1]:
                batch = [*deter.shape[:-1], "A"]
                raise ValueError(f"action {list(action.shape)} must be {batch}")
        return self.prior(self.transition(State(stoch, deter), action), head)


def _zero_where(mask: Tensor, x: Tensor) -> Tensor:
    """``x`` ``[B, ...]``, zero where ``mask`` ``[B]`` holds."""
    return x.masked_fill(mask.reshape(-1, *[1] * (x.dim() - 1)), 0.0)


def _steps(action: Tensor | None, steps: int) -> Iterable[Tensor | None]:
    """The actions ``[B, T, A]`` step by step; ``steps`` times None without."""
    return [None] * steps if action is None else action.unbind(1)


def _stack(states: Sequence[State]) -> State:
    """States ``[B, ...]`` of T steps -> ``[B, T, ...]``."""
    return State(*(torch.stack(x, 1) for x in zip(*states, strict=True)))
