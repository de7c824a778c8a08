"""Recurrent state-space model (RSSM): GRU with layer norm, prior and posterior.

Plain tensors inside the time loop; everything that does not depend on the recurrence is computed
once for all steps, before or after it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prelar_trl.modules.distributions import Categorical, Gaussian
from prelar_trl.modules.linear import Linear, UnrolledLinear, as_operand, linear
from prelar_trl.modules.recompute import keep_inputs

__all__ = ["RSSM", "State"]


class State(NamedTuple):
    """A latent state: ``stoch`` ``[..., S, K]`` (Gaussian: ``[..., S]``), deter ``[..., D]``."""

    stoch: Tensor
    deter: Tensor


class GRUCell(nn.Module):
    """GRU cell with one layer norm over all gates and update bias -1 (DreamerV2)."""

    def __init__(self, input_size: int, size: int) -> None:
        super().__init__()
        self.linear = Linear(input_size + size, 3 * size)
        self.norm = nn.LayerNorm(3 * size, eps=1e-3)

    def forward(self, x: Tensor, deter: Tensor) -> Tensor:
        return keep_inputs(self.gate, self.linear(torch.cat([x, deter], -1)), deter)

    def gate(self, raw: Tensor, deter: Tensor) -> Tensor:
        """The new state from the linear layer's output ``[..., 3 D]`` and the old state."""
        reset, candidate, update = self.norm(raw).to(deter.dtype).chunk(3, -1)
        candidate = torch.tanh(torch.sigmoid(reset) * candidate)
        return torch.lerp(deter, candidate, torch.sigmoid(update - 1))


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
        self.latent = Categorical(stoch, classes) if classes else Gaussian(stoch)
        self.action_dim, self.embed_dim, self.deter = action_dim, embed_dim, deter
        self.feat_dim = self.latent.flat_size + deter
        self.input_layer = Linear(self.latent.flat_size + action_dim, hidden)
        self.cell = GRUCell(hidden, deter)
        self.prior_heads = nn.ModuleList(
            nn.Sequential(
                Linear(deter, hidden), nn.ELU(inplace=True), Linear(hidden, self.latent.num_outputs)
            )
            for _ in range(ensemble)
        )
        self.posterior_hidden = Linear(deter + embed_dim, hidden)
        self.posterior_out = Linear(hidden, self.latent.num_outputs)

    def initial_state(self, *batch: int) -> State:
        """The all-zero state of batch shape ``batch``, where the weights are."""
        weight = self.input_layer.weight
        return State(
            weight.new_zeros(*batch, *self.latent.shape), weight.new_zeros(*batch, self.deter)
        )

    def feat(self, state: State) -> Tensor:
        """``concat(flat stoch, deter)``, ``[..., F]``, in the type of autocast where that is on."""
        stoch = self.latent.flatten(state.stoch)
        return torch.cat([as_operand(stoch), as_operand(state.deter)], -1)

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
            Posterior states ``[B, T, ...]``, posterior statistics and prior statistics, each
            ``[B, T, S, K]`` (Gaussian: ``[B, T, S, 2]``).
        """
        batch, steps = embed.shape[:2]
        state = state or self.initial_state(batch)
        keep = (~is_first).to(embed.dtype).unsqueeze(-1)  # [B, T, 1]
        stoch_weight, action_bias = self._input_terms(action, keep)
        deter_weight, embed_weight = self.posterior_hidden.weight.split(
            [self.deter, self.embed_dim], 1
        )
        embed_bias = linear(embed, embed_weight, self.posterior_hidden.bias)  # [B, T, hidden]
        input_layer = UnrolledLinear(stoch_weight, _each_step(action_bias, batch, steps))
        cell, out = self.cell.linear, self.posterior_out
        gates = UnrolledLinear(cell.weight, _each_step(cell.bias, batch, steps))
        posterior_hidden = UnrolledLinear(deter_weight, embed_bias.transpose(0, 1))
        posterior_out = UnrolledLinear(out.weight, _each_step(out.bias, batch, steps))

        stoch, deter = state
        stochs, deters, posteriors = [], [], []
        for mask in keep.unbind(1):
            stoch, deter = self.latent.flatten(stoch) * mask, deter * mask
            x = F.elu(input_layer(stoch), inplace=True)
            deter = self.cell.gate(gates(torch.cat([x, deter], -1)), deter)
            hidden = F.elu(posterior_hidden(deter), inplace=True)
            posterior = self.latent.params(posterior_out(hidden))
            stoch = self.latent.rsample(posterior, sample)
            stochs.append(stoch)
            deters.append(deter)
            posteriors.append(posterior)
        states = State(torch.stack(stochs, 1), torch.stack(deters, 1))
        return states, torch.stack(posteriors, 1), self.prior(states.deter)

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
            Prior states ``[B, T, ...]`` and prior statistics ``[B, T, S, K]``.
        """
        states, priors = [], []
        for t in range(steps if action is None else action.shape[1]):
            state, prior = self.step(state, None if action is None else action[:, t], sample)
            states.append(state)
            priors.append(prior)
        stochs, deters = zip(*states, strict=True)
        return State(torch.stack(stochs, 1), torch.stack(deters, 1)), torch.stack(priors, 1)

    def forward(self, stoch: Tensor, deter: Tensor, action: Tensor | None) -> Tensor:
        """Prior statistics ``[..., S, K]`` one step after the state under ``action``."""
        return self.prior(self.transition(State(stoch, deter), action))

    def step(
        self, state: State, action: Tensor | None, sample: bool = True
    ) -> tuple[State, Tensor]:
        """One step of the prior: next state and its statistics; any batch shape."""
        deter = self.transition(state, action)
        prior = self.prior(deter)
        return State(self.latent.rsample(prior, sample), deter), prior

    def transition(self, state: State, action: Tensor | None) -> Tensor:
        """The deterministic half of a step: ``[..., D]``."""
        x = self.latent.flatten(state.stoch)
        if action is not None:
            x = torch.cat([x, self._checked(action).expand(*x.shape[:-1], -1)], -1)
        missing = self.input_layer.in_features - x.shape[-1]
        hidden = self.input_layer(F.pad(x, (0, missing)) if missing else x)
        return self.cell(F.elu(hidden, inplace=True), state.deter)

    def prior(self, deter: Tensor) -> Tensor:
        """Prior statistics of ``deter`` ``[..., D]``: one random head of the ensemble per step.

        A step is an index of the second axis of a sequence ``[B, T, D]``, or the whole call.
        """
        raw = [head(deter) for head in self.prior_heads]
        if len(raw) == 1:
            return self.latent.params(raw[0])
        steps = deter.shape[1] if deter.dim() == 3 else 1
        index = torch.randint(len(raw), (steps, 1), device=deter.device)
        stacked = torch.stack(raw)  # [ensemble, ..., num_outputs]
        index = index.expand(stacked.shape[1:])[None]
        return self.latent.params(stacked.gather(0, index)[0])

    def _input_terms(self, action: Tensor | None, keep: Tensor) -> tuple[Tensor, Tensor]:
        """Weight of the stochastic state, and the actions' share of the input layer plus bias."""
        flat, weight, bias = self.latent.flat_size, self.input_layer.weight, self.input_layer.bias
        if action is None:
            return weight[:, :flat], bias
        columns = slice(flat, flat + self._checked(action).shape[-1])
        return weight[:, :flat], linear(action * keep, weight[:, columns], bias)

    def _checked(self, action: Tensor) -> Tensor:
        if action.shape[-1] > self.action_dim:
            raise ValueError(
                f"the action has {action.shape[-1]} dimensions but this RSSM takes at most "
                f"{self.action_dim}"
            )
        return action


def _each_step(bias: Tensor, batch: int, steps: int) -> Tensor:
    """A bias ``[out]``, or ``[B, T, out]``, for each step of a loop: ``[T, B, out]``."""
    return bias.transpose(0, 1) if bias.dim() == 3 else bias.expand(steps, batch, -1)
