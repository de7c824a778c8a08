"""The mathematics of the losses: hand computations, identities, gradients in float64."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch
from torch import Tensor
from torch.autograd import gradcheck

from prelar_trl.objectives import functional as F
from prelar_trl.objectives.functional import action_state_consistency

MODES = ["soft", "sign", "soft_rank"]


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


# ---------------------------------------------------------------------- likelihood and KL


def test_gaussian_nll_is_half_the_squared_error_summed_over_the_event() -> None:
    mean, target = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    error = (mean - target).square() / 2
    for dims, expected in ((0, error), (1, error.sum(-1)), (2, error.sum((-2, -1)))):
        torch.testing.assert_close(F.gaussian_nll(mean, target, dims), expected)
    torch.testing.assert_close(F.gaussian_nll(mean, target), error.sum(-1))


@pytest.mark.parametrize("balance", [0.0, 0.3, 0.8, 1.0])
def test_balanced_kl_is_the_kl_and_balance_the_priors_share_of_the_gradient(balance) -> None:
    q, p = torch.randn(2, 3, 4, 5, requires_grad=True), torch.randn(2, 3, 4, 5, requires_grad=True)
    kl, loss = F.categorical_kl(q, p).mean(), F.balanced_kl(q, p, balance=balance)
    torch.testing.assert_close(loss, kl)
    whole, ours = (torch.autograd.grad(x, (q, p)) for x in (kl, loss))
    torch.testing.assert_close(ours[0], (1 - balance) * whole[0])
    torch.testing.assert_close(ours[1], balance * whole[1])
    assert F.balanced_kl(q, q, balance=balance) == 0


def test_free_nats_stop_the_gradient_of_a_smaller_mean_or_of_the_smaller_elements() -> None:
    q, p = torch.randn(6, 4, 5, requires_grad=True), torch.randn(6, 4, 5, requires_grad=True)
    kl = F.categorical_kl(q, p)
    low, high = kl.mean().item() - 0.1, kl.mean().item() + 0.1
    torch.testing.assert_close(F.balanced_kl(q, p, free_nats=low), kl.mean())
    loss = F.balanced_kl(q, p, free_nats=high)
    assert loss.item() == pytest.approx(high)
    assert not any(x.any() for x in torch.autograd.grad(loss, (q, p)))
    free = kl.median().item() + 1e-4
    loss = F.balanced_kl(q, p, free_nats=free, free_avg=False)
    torch.testing.assert_close(loss, kl.clamp_min(free).mean())
    for gradient in torch.autograd.grad(loss, (q, p)):
        assert torch.equal(gradient.flatten(1).any(1), kl > free)


def test_balanced_kl_of_gaussians() -> None:
    q = torch.stack([torch.randn(5, 3), torch.rand(5, 3) + 0.1], -1)
    p = torch.stack([torch.randn(5, 3), torch.rand(5, 3) + 0.1], -1)
    torch.testing.assert_close(F.balanced_kl(q, p, F.gaussian_kl), F.gaussian_kl(q, p).mean())


# ---------------------------------------------------------------------- lambda-return


def test_lambda_return_equals_a_hand_computation() -> None:
    reward = torch.tensor([[1.0, 2.0, 3.0, 100.0]])
    value = torch.tensor([[10.0, 20.0, 30.0, 40.0]])
    discount = torch.tensor([[0.5, 0.5, 0.25, 7.0]])
    # t3 = 40; t2 = 3 + 0.25*(0.5*40 + 0.5*40); t1 = 2 + 0.5*(0.5*30 + 0.5*13); t0 = 1 + 0.5*(...)
    expected = torch.tensor([[1 + 0.5 * (10 + 0.5 * 12.75), 12.75, 13.0, 40.0]])
    torch.testing.assert_close(F.lambda_return(reward, value, discount, 0.5), expected)


def test_lambda_zero_gives_one_step_targets_and_lambda_one_the_discounted_sum() -> None:
    reward, value, discount = torch.randn(3, 6), torch.randn(3, 6), torch.rand(3, 6)
    target = F.lambda_return(reward, value, discount, 0.0)
    torch.testing.assert_close(target[:, :-1], reward[:, :-1] + discount[:, :-1] * value[:, 1:])
    torch.testing.assert_close(target[:, -1], value[:, -1])
    weight = torch.cat([torch.ones(3, 1), discount[:, :-1].cumprod(1)], 1)
    expected = (weight[:, :-1] * reward[:, :-1]).sum(1) + weight[:, -1] * value[:, -1]
    torch.testing.assert_close(F.lambda_return(reward, value, discount, 1.0)[:, 0], expected)


# ---------------------------------------------------------------------- consistency


def test_soft_consistency_falls_as_the_rank_correlation_rises() -> None:
    torch.manual_seed(3)
    p, noise = torch.rand(200), torch.rand(200)
    losses, correlations = [], []
    for share in torch.linspace(-1, 1, 21).tolist():
        q = share * p + (1 - abs(share)) * noise
        losses.append(action_state_consistency(p, q).item())
        correlations.append(scipy.stats.spearmanr(p, q).statistic)
    assert correlations == sorted(correlations)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 1e-5


@pytest.mark.parametrize("mode", MODES)
def test_consistency_ranks_agreement_over_chance_over_disagreement(mode: str) -> None:
    p, order = torch.rand(64), torch.randperm(64)
    agree, chance, oppose = (action_state_consistency(p, q, mode) for q in (3 * p, p[order], -p))
    assert agree.item() == pytest.approx(0, abs=1e-4)
    assert agree < chance < oppose
    shuffled = action_state_consistency(p[order], p[order.flip(0)][order], mode)
    torch.testing.assert_close(shuffled, action_state_consistency(p, p[order.flip(0)], mode))


def test_soft_consistency_has_a_gradient_wherever_the_orderings_disagree() -> None:
    generator = torch.Generator().manual_seed(7)

    def divergences(size: int, spread: float) -> Tensor:
        return (torch.randn(size, generator=generator) * spread).exp()

    disagreements = 0
    for trial in range(300):
        size = int(torch.randint(2, 24, (1,), generator=generator))
        spread = float(torch.randint(1, 4, (1,), generator=generator)) / 2
        p = divergences(size, spread)
        order = torch.randperm(size, generator=generator)
        ties = torch.randint(0, 3, (size,), generator=generator).float()
        q = (divergences(size, spread), p[order], ties, p.max() - p)[trial % 4]
        if torch.equal((p[:, None] - p).sign(), (q[:, None] - q).sign()):
            continue
        disagreements += 1
        q = q.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(action_state_consistency(p, q), q)
        assert gradient.isfinite().all()
        assert gradient.abs().max() > 0
    assert disagreements > 250


@pytest.mark.parametrize("mode", ["soft", "soft_rank"])
def test_descending_the_consistency_repairs_the_ordering(mode: str) -> None:
    p = torch.rand(12)
    q = torch.rand(12, requires_grad=True)
    before = scipy.stats.spearmanr(p, q.detach()).statistic
    optimizer = torch.optim.Adam([q], lr=0.03)
    for _ in range(150):
        optimizer.zero_grad()
        action_state_consistency(p, q, mode).backward()
        optimizer.step()
    after = scipy.stats.spearmanr(p, q.detach()).statistic
    assert before < 0.7 and after > 0.95


def test_sign_consistency_is_the_authors_and_has_exactly_no_gradient() -> None:
    p, q = torch.rand(9), torch.rand(9, requires_grad=True)
    loss = action_state_consistency(p, q, "sign")
    rows = list(zip(p, q, strict=True))
    pairs = [(torch.sign(a - b) - torch.sign(c - d)) ** 2 for a, c in rows for b, d in rows]
    torch.testing.assert_close(loss, torch.stack(pairs).mean())
    assert not torch.autograd.grad(loss, q)[0].any()


def test_soft_consistency_is_the_mean_kl_of_pairwise_comparisons() -> None:
    p, q = torch.rand(6, dtype=torch.float64), torch.rand(6, dtype=torch.float64)
    total = 0.0
    scale_p = sum(abs(a - b) for a in p for b in p) / 36
    scale_q = sum(abs(a - b) for a in q for b in q) / 36
    for i in range(6):
        for j in range(6):
            win = torch.sigmoid((p[i] - p[j]) / (0.5 * scale_p))
            guess = torch.sigmoid((q[i] - q[j]) / (0.5 * scale_q))
            total += win * (win / guess).log() + (1 - win) * ((1 - win) / (1 - guess)).log()
    ours = action_state_consistency(p, q)
    assert ours.item() == pytest.approx(total.item() / 36, rel=0.02)  # the scale has a floor


@pytest.mark.parametrize("mode", MODES)
def test_consistency_gives_no_gradient_to_the_state_divergence(mode: str) -> None:
    p, q = torch.rand(8, requires_grad=True), torch.rand(8, requires_grad=True)
    action_state_consistency(p, q, mode).backward()
    assert p.grad is None
    assert q.grad is not None


@pytest.mark.parametrize("mode", [*MODES, "gated"])
@pytest.mark.parametrize("size", [1, 2, 8])
@pytest.mark.parametrize(("equal_p", "equal_q"), [(0.7, None), (None, 1e4), (0.7, 0.3), (0.0, 0.0)])
def test_consistency_of_equal_or_few_divergences_is_finite(mode, size, equal_p, equal_q) -> None:
    p, q = (torch.rand(size) if x is None else torch.full((size,), x) for x in (equal_p, equal_q))
    loss = action_state_consistency(p, q.requires_grad_(), mode)
    (gradient,) = torch.autograd.grad(loss, q)
    assert loss.isfinite() and gradient.isfinite().all()
    assert size > 1 or mode not in ("soft", "sign") or loss == 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("factor", [1e-3, 50.0, 1e4])
def test_consistency_does_not_depend_on_the_scale_of_either_divergence(mode, factor) -> None:
    p, q = torch.rand(16), torch.rand(16)
    loss = action_state_consistency(p, q, mode)
    for pair in ((factor * p, q), (p, factor * q)):
        scaled = action_state_consistency(*pair, mode)
        torch.testing.assert_close(scaled, loss, rtol=1e-3, atol=0)


# ---------------------------------------------------------------------- contrast


def test_contrast_is_cross_entropy_at_a_temperature() -> None:
    kl, first = torch.rand(7, 5, requires_grad=True), torch.zeros(7, dtype=torch.long)
    expected = torch.nn.functional.cross_entropy(-kl / 0.3, first)
    torch.testing.assert_close(F.action_contrast(kl, 0.3), expected)
    (gradient,) = torch.autograd.grad(F.action_contrast(kl), kl)
    assert (gradient[:, 0] > 0).all() and (gradient[:, 1:] < 0).all()
    equal = F.action_contrast(torch.full((7, 5), 2.5))
    assert equal.item() == pytest.approx(math.log(5))  # chance
    with pytest.raises(ValueError, match=r"\(7, 1\)"):
        F.action_contrast(kl[:, :1])


# ---------------------------------------------------------------------- bonus


def test_sliding_mean_averages_each_window() -> None:
    x = torch.arange(12.0).view(1, 6, 2)
    out = F.sliding_mean(x, 3)
    torch.testing.assert_close(out, torch.stack([x[:, t : t + 3].mean(1) for t in range(4)], 1))
    assert torch.equal(F.sliding_mean(x, 1), x)
    with pytest.raises(ValueError, match="6 steps are shorter than the window of 7"):
        F.sliding_mean(x, 7)


def test_knn_distance_equals_a_search_by_hand() -> None:
    x, memory, valid = torch.randn(5, 3), torch.randn(20, 3), torch.rand(20) < 0.7
    for i, distance in enumerate(F.knn_distance(x, memory, valid, 4)):
        expected = (memory[valid] - x[i]).norm(dim=1).sort().values[:4].mean()
        torch.testing.assert_close(distance, expected)


def test_knn_distance_of_a_point_from_itself_is_nothing() -> None:
    x = 100 * torch.randn(20, 128)
    valid = torch.ones(20, dtype=torch.bool)
    x.requires_grad_()
    distance = F.knn_distance(x, x, valid, 1)
    assert distance.max() < 1e-4  # a float32 product would be off by 1
    assert torch.autograd.grad(distance.sum(), x)[0].isfinite().all()


def test_knn_distance_with_little_memory_counts_what_is_there() -> None:
    x, memory = torch.randn(5, 3), torch.zeros(20, 3)
    memory[:2] = torch.randn(2, 3)
    expected = torch.cdist(x, memory[:2]).mean(1)
    for size, filled, distance in ((20, 2, expected), (2, 2, expected), (20, 0, torch.zeros(5))):
        valid = torch.arange(size) < filled
        torch.testing.assert_close(F.knn_distance(x, memory[:size], valid, 16), distance)


# ---------------------------------------------------------------------- gradients


def test_gradients_are_right_in_float64() -> None:
    assert gradcheck(F.gaussian_nll, (double(2, 3), double(2, 3)))
    positive = (torch.rand(2, 4, dtype=torch.float64) + 0.1).requires_grad_()
    assert gradcheck(F.lambda_return, (double(2, 4), double(2, 4), positive))
    assert gradcheck(F.action_contrast, (double(3, 4), positive.detach()[:1, :1].requires_grad_()))
    assert gradcheck(lambda x: F.sliding_mean(x, 2), (double(2, 4, 3),))
    q, p = double(2, 3, 4), double(2, 3, 4)  # detached on the other side, so one at a time
    assert gradcheck(lambda x: F.balanced_kl(x, p.detach(), balance=0.0), (q,))
    assert gradcheck(lambda x: F.balanced_kl(q.detach(), x, balance=1.0), (p,))


def of(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: F.gaussian_nll(of(4, 3, 1), of(4, 3)), r"mean \[4, 3, 1\], target \[4, 3\]"),
        (lambda: F.gaussian_nll(of(0, 3), of(0, 3)), "not empty"),
        (lambda: F.balanced_kl(of(4, 2, 3), of(2, 3)), r"posterior \[4, 2, 3\], prior \[2, 3\]"),
        (lambda: F.gaussian_kl(of(4, 5, 2), of(4, 1, 2)), r"p \[4, 5, 2\], q \[4, 1, 2\]"),
        (lambda: F.categorical_kl(of(4, 5, 2), of(5, 2)), r"p \[4, 5, 2\], q \[5, 2\]"),
        (lambda: F.lambda_return(of(4, 3), of(4, 3, 1), of(4, 3, 1)), r"reward \[4, 3\], value"),
        (lambda: F.knn_distance(of(4, 2), of(9, 2), of(9).bool(), 0), "k=0 must be at least 1"),
        (lambda: F.sliding_mean(of(4, 5, 2), 0), "window=0 must be at least 1"),
        (lambda: F.action_contrast(of(4, 3), 0.0), "temperature=0.0 must be above 0"),
        (lambda: action_state_consistency(of(3), of(4)), r"p \(3,\) and q \(4,\)"),
        (lambda: action_state_consistency(of(3), of(3), "hard"), "mode='hard' is unknown"),
        (lambda: F.action_state_consistency(of(4), of(4), "soft", -1), "temperature=-1 must be"),
    ],
)
def test_what_would_broadcast_or_divide_by_nothing_is_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
