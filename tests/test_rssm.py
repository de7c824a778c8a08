"""The RSSM: resets, carried states, and equality with a computation step by step."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from prelar_trl.modules.rssm import RSSM, State

B, T, A, E = 3, 5, 4, 6


def make(classes: int = 4, ensemble: int = 1, action_dim: int = A) -> RSSM:
    torch.manual_seed(1)
    return RSSM(
        action_dim, E, stoch=3, classes=classes, deter=8, hidden=7, ensemble=ensemble
    )  # hidden differs from deter on purpose


def inputs(steps: int = T) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(2)
    is_first = torch.zeros(B, steps, dtype=torch.bool)
    is_first[:, 0] = True
    return torch.randn(B, steps, E), torch.randn(B, steps, A), is_first


def assert_same(first: tuple, second: tuple) -> None:
    for ours, theirs in zip(first, second, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("classes", [4, 0], ids=["categorical", "gaussian"])
def test_observing_equals_a_naive_computation_step_by_step(classes: int) -> None:
    """From the same weights, one step at a time, every input concatenated anew."""
    rssm, (embed, action, is_first) = make(classes), inputs()
    is_first[1, 3] = True  # of one sequence alone
    states, posterior, prior = rssm.observe(embed, action, is_first, sample=False)
    assert states.stoch.shape == (B, T, *((3, 4) if classes else (3,)))
    assert rssm.feat(states).shape == (B, T, rssm.feat_dim)
    stoch, deter = torch.zeros(B, rssm.latent.flat_size), torch.zeros(B, 8)
    for t in range(T):
        keep = 1 - is_first[:, t, None].float()
        stoch, deter = stoch * keep, deter * keep
        x = F.elu(rssm.input_layer(torch.cat([stoch, action[:, t] * keep], -1)))
        parts = rssm.cell.norm(rssm.cell.linear(torch.cat([x, deter], -1)))
        reset, candidate, update = parts[:, :8], parts[:, 8:16], parts[:, 16:]
        update = torch.sigmoid(update - 1)
        candidate = torch.tanh(torch.sigmoid(reset) * candidate)
        deter = update * candidate + (1 - update) * deter
        naive_prior = rssm.latent.params(rssm.prior_heads[0](deter))
        hidden = F.elu(rssm.posterior_hidden(torch.cat([deter, embed[:, t]], -1)))
        naive = rssm.latent.params(rssm.posterior_out(hidden))
        stoch = rssm.latent.flatten(rssm.latent.rsample(naive, sample=False))
        torch.testing.assert_close(states.deter[:, t], deter)
        torch.testing.assert_close(posterior[:, t], naive)
        torch.testing.assert_close(prior[:, t], naive_prior)
        torch.testing.assert_close(rssm.latent.flatten(states.stoch[:, t]), stoch)
    stepped = rssm(states.stoch[:, :-1], states.deter[:, :-1], action[:, 1:])  # no reset
    torch.testing.assert_close(prior[[0, 2], 1:], stepped[[0, 2]])


def test_a_reset_inside_a_window_equals_two_windows() -> None:
    rssm, (embed, action, is_first) = make(), inputs()
    is_first[:, 3] = True
    whole = rssm.observe(embed, action, is_first, sample=False)
    for part in (slice(0, 3), slice(3, T)):
        alone = rssm.observe(embed[:, part], action[:, part], is_first[:, part], sample=False)
        assert_same(
            (whole[0].stoch[:, part], whole[0].deter[:, part], whole[1][:, part]),
            (alone[0].stoch, alone[0].deter, alone[1]),
        )


def test_a_reset_forgets_the_given_state_and_the_action() -> None:
    rssm, (embed, action, is_first) = make(), inputs(1)
    state = State(torch.rand(B, 3, 4), torch.rand(B, 8))
    fresh = rssm.observe(embed, torch.zeros_like(action), is_first, sample=False)
    reset = rssm.observe(embed, action, is_first, state, sample=False)
    kept = rssm.observe(embed, action, torch.zeros_like(is_first), state, sample=False)
    assert_same(fresh[0], reset[0])
    assert not torch.allclose(kept[0].deter, reset[0].deter)


def test_observing_step_by_step_with_a_carried_state_equals_observing_at_once() -> None:
    rssm, (embed, action, is_first) = make(), inputs()
    whole, posterior, _ = rssm.observe(embed, action, is_first, sample=False)
    state = None
    for t in range(T):
        now = slice(t, t + 1)
        states, one, _ = rssm.observe(
            embed[:, now], action[:, now], is_first[:, now], state, sample=False
        )
        state = State(states.stoch[:, 0], states.deter[:, 0])
        assert_same(state, (whole.stoch[:, t], whole.deter[:, t]))
        torch.testing.assert_close(one[:, 0], posterior[:, t])


@pytest.mark.parametrize("sample", [True, False])
def test_imagining_equals_repeated_steps(sample: bool) -> None:
    rssm, (_, action, _) = make(), inputs()
    start = State(torch.rand(B, 3, 4), torch.rand(B, 8))
    torch.manual_seed(4)
    states, priors = rssm.imagine(action, start, sample)
    torch.manual_seed(4)
    state = start
    for t in range(T):
        state, prior = rssm.step(state, action[:, t], sample)
        assert_same((*state, prior), (states.stoch[:, t], states.deter[:, t], priors[:, t]))


def test_a_narrow_action_counts_as_padded_with_zeros_and_too_wide_a_one_is_an_error() -> None:
    rssm, (embed, action, is_first) = make(action_dim=9), inputs()
    padded = F.pad(action, (0, 9 - A))
    observed = (rssm.observe(embed, x, is_first, sample=False)[0] for x in (action, padded))
    assert_same(*observed)
    state = State(torch.rand(B, 3, 4), torch.rand(B, 8))
    everywhere = action[0, 0].expand(B, -1)
    for first, second in ((action[:, 0], padded[:, 0]), (action[0, 0], everywhere)):
        torch.testing.assert_close(rssm.transition(state, first), rssm.transition(state, second))
    with pytest.raises(ValueError, match="4 dimensions .* at most 3"):
        make(action_dim=A - 1).observe(embed, action, is_first)


def test_no_action_equals_a_zero_action() -> None:
    rssm, (embed, action, is_first) = make(), inputs()
    zero, start = torch.zeros_like(action), rssm.initial_state(B)
    observed = (rssm.observe(embed, x, is_first, sample=False)[0] for x in (None, zero))
    assert_same(*observed)
    imagined = rssm.imagine(None, start, sample=False, steps=3)[0]
    assert_same(imagined, rssm.imagine(zero[:, :3], start, sample=False)[0])


def test_every_head_of_the_ensemble_is_drawn_one_per_step() -> None:
    rssm = make(ensemble=3)
    deter = torch.randn(8).expand(2, 200, 8)  # the same everywhere: only the head differs
    raw = rssm.prior(deter)
    heads = torch.stack([rssm.latent.params(head(deter[0, 0])) for head in rssm.prior_heads])
    torch.testing.assert_close(raw[0], raw[1])  # all sequences share the head of a step
    match = (raw[0][:, None] - heads).abs().amax((-2, -1)) < 1e-5  # [200, 3]
    assert (match.sum(1) == 1).all()
    assert (match.sum(0) > 40).all()
    one_step = {int((rssm.prior(deter[:, 0])[0] - heads).abs().amax((-2, -1)).argmin())
                for _ in range(40)}  # fmt: skip
    assert one_step == {0, 1, 2}


def test_gradient_reaches_the_first_step_through_the_straight_through_states() -> None:
    rssm, (embed, action, is_first) = make(), inputs()
    embed.requires_grad_()
    states, _, _ = rssm.observe(embed, action, is_first)
    states.deter[:, -1].sum().backward()
    assert embed.grad[:, 0].abs().max() > 0
    assert embed.grad[:, -1].abs().max() == 0  # the last frame comes after the last deter


def test_a_float64_rssm_has_right_gradients() -> None:
    rssm = make(classes=0).double()
    embed, action, is_first = (x.double() if x.is_floating_point() else x for x in inputs(2))
    is_first = is_first[:2]

    def last(embed: Tensor, action: Tensor) -> Tensor:
        states, _, prior = rssm.observe(embed, action, is_first, sample=False)
        return torch.cat([rssm.feat(states), prior.flatten(2)], -1)

    arguments = (embed[:2].requires_grad_(), action[:2].requires_grad_())
    assert torch.autograd.gradcheck(last, arguments)


def test_a_step_works_under_functorch() -> None:
    rssm, action = make(), torch.randn(B, A)
    state = State(torch.randn(B, 3, 4), torch.randn(B, 8))
    expected = rssm.transition(state, action)
    torch.testing.assert_close(torch.vmap(rssm.transition)(state, action), expected)

    def total(action: Tensor) -> Tensor:
        return rssm.transition(state, action).sum()

    x = action.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(total)(action), *torch.autograd.grad(total(x), x))
