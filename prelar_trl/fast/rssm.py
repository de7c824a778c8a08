"""The recurrence with everything that does not depend on it taken out of its loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from prelar_trl.fast.linear import TimeBatchedLinear, cast_to_autocast, linear
from prelar_trl.fast.private import functorch_is_active, layer_norm_ops
from prelar_trl.modules.rssm import RSSM, GRUCell, State

__all__ = ["FastGRUCell", "TimeBatchedRSSM"]

_Ops = tuple[Callable[..., Any], Callable[..., Any]]


class _Gates(torch.autograd.Function):
    """Layer norm and gates of the GRU; of them only the inputs are kept for the gradient."""

    @staticmethod
    def forward(
        ctx: Any, raw: Tensor, deter: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> Tensor:
        layer_norm, _ = cast(_Ops, layer_norm_ops())
        ctx.save_for_backward(raw, deter, weight, bias)
        ctx.eps = eps
        gates, _, _ = layer_norm(raw.to(deter.dtype), weight.shape, weight, bias, eps)
        reset, candidate, update = gates.chunk(3, -1)
        candidate = candidate.mul_(reset.sigmoid_()).tanh_()
        return torch.lerp(deter, candidate, update.sub_(1).sigmoid_())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        raw, deter, weight, bias = ctx.saved_tensors
        layer_norm, layer_norm_backward = cast(_Ops, layer_norm_ops())
        x, shape = raw.to(deter.dtype), weight.shape
        gates, mean, rstd = layer_norm(x, shape, weight, bias, ctx.eps)
        reset, candidate, update = gates.chunk(3, -1)
        reset, update = reset.sigmoid(), update.sub_(1).sigmoid_()
        new = torch.tanh(reset * candidate)
        to_new = grad * update
        to_update = to_new * (new - deter) * (1 - update)  # through the sigmoid: u' = u (1 - u)
        to_product = to_new * (1 - new * new)
        to_reset = to_product * candidate * reset * (1 - reset)
        to_gates = torch.cat([to_reset, to_product * reset, to_update], -1)
        to_raw, to_weight, to_bias = layer_norm_backward(
            to_gates, x, shape, mean, rstd, weight, bias, [True, *ctx.needs_input_grad[2:4]]
        )
        return to_raw.to(raw.dtype), grad - to_new, to_weight, to_bias, None


class FastGRUCell(GRUCell):
    """:class:`GRUCell` that computes norm and gates again in the backward pass."""

    def forward(self, x: Tensor, deter: Tensor) -> Tensor:
        return self.gate(self.linear(torch.cat([x, deter], -1)), deter)

    def gate(self, raw: Tensor, deter: Tensor) -> Tensor:
        """The new state from the linear layer's output ``[..., 3 D]`` and the old state."""
        norm = self.norm
        if not (torch.compiler.is_compiling() or functorch_is_active() or layer_norm_ops() is None):
            return _Gates.apply(raw, deter, norm.weight, norm.bias, norm.eps)
        reset, candidate, update = norm(raw).to(deter.dtype).chunk(3, -1)
        candidate = torch.tanh(torch.sigmoid(reset) * candidate)
        return torch.lerp(deter, candidate, torch.sigmoid(update - 1))


class TimeBatchedRSSM(RSSM):
    """:class:`RSSM` that observes a sequence with one product for all steps where it can.

    The embedding's and the action's share of the first layers are computed before the loop, weight
    gradients after it.
    """

    cell: FastGRUCell

    def feat(self, state: State) -> Tensor:
        stoch = self.latent.flatten(state.stoch)
        return torch.cat([cast_to_autocast(stoch), cast_to_autocast(state.deter)], -1)

    def observe(
        self,
        embed: Tensor,
        action: Tensor | None,
        is_first: Tensor,
        state: State | None = None,
        sample: bool = True,
    ) -> tuple[State, Tensor, Tensor]:
        batch, steps = embed.shape[:2]
        if steps == 1:  # acting
            return super().observe(embed, action, is_first, state, sample)
        self._check_observed(embed, action, is_first)
        state = state or self.initial_state(batch)
        first = is_first.unsqueeze(-1)  # [B, T, 1]
        stoch_weight, action_bias = self._input_terms(action, first)
        deter_weight, embed_weight = self.posterior_hidden.weight.split(
            [self.deter, self.embed_dim], 1
        )
        embed_bias = linear(embed, embed_weight, self.posterior_hidden.bias)  # [B, T, hidden]
        input_layer = TimeBatchedLinear(stoch_weight, _each_step(action_bias, batch, steps))
        cell, out = self.cell.linear, self.posterior_out
        gates = TimeBatchedLinear(cell.weight, _each_step(cell.bias, batch, steps))
        posterior_hidden = TimeBatchedLinear(deter_weight, embed_bias.transpose(0, 1))
        posterior_out = TimeBatchedLinear(out.weight, _each_step(out.bias, batch, steps))

        stoch, deter = state
        stochs, deters, posteriors = [], [], []
        for now in first.unbind(1):
            stoch = self.latent.flatten(stoch).masked_fill(now, 0.0)
            deter = deter.masked_fill(now, 0.0)
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

    def _input_terms(self, action: Tensor | None, first: Tensor) -> tuple[Tensor, Tensor]:
        """Weight of the stochastic state, and the actions' share of the input layer plus bias."""
        flat, weight, bias = self.latent.flat_size, self.input_layer.weight, self.input_layer.bias
        if action is None:
            return weight[:, :flat], bias
        action = self.pad_action(action).masked_fill(first, 0.0)
        return weight[:, :flat], linear(action, weight[:, flat:], bias)


def _each_step(bias: Tensor, batch: int, steps: int) -> Tensor:
    """A bias ``[out]``, or ``[B, T, out]``, for each step of a loop: ``[T, B, out]``."""
    return bias.transpose(0, 1) if bias.dim() == 3 else bias.expand(steps, batch, -1)
