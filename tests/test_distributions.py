"""Distributions against SciPy and torch.distributions, their gradients in float64."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor
from torch.autograd import gradcheck

from prelar_trl.modules.distributions import (
    Categorical,
    Gaussian,
    TruncatedNormal,
    categorical_kl,
    gaussian_kl,
)


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def positive(*shape: int) -> Tensor:
    return (torch.rand(*shape, dtype=torch.float64) + 0.2).requires_grad_()


def gaussian_statistics(*shape: int) -> Tensor:
    return torch.stack([torch.randn(*shape), torch.rand(*shape) + 0.2], -1).double()


def scipy_truncated(mean: Tensor, std: Tensor):
    low, high = (-1 - mean) / std, (1 - mean) / std
    return scipy.stats.truncnorm(low.numpy(), high.numpy(), mean.numpy(), std.numpy())


def test_categorical_kl_and_entropy_equal_torch_distributions() -> None:
    p, q = torch.randn(5, 3, 7), torch.randn(5, 3, 7)
    ours, theirs = (torch.distributions.Categorical(logits=x) for x in (p, q))
    expected = torch.distributions.kl_divergence(ours, theirs).sum(-1)
    torch.testing.assert_close(categorical_kl(p, q), expected)
    torch.testing.assert_close(categorical_kl(p, p), torch.zeros(5))
    torch.testing.assert_close(Categorical(3, 7).entropy(p), ours.entropy().sum(-1))
    half = p.bfloat16(), q.bfloat16()  # computed in float32
    torch.testing.assert_close(categorical_kl(*half), categorical_kl(*(x.float() for x in half)))


def test_gaussian_kl_and_entropy_equal_torch_distributions() -> None:
    p, q = gaussian_statistics(5, 3), gaussian_statistics(5, 3)
    ours, theirs = (torch.distributions.Normal(*x.unbind(-1)) for x in (p, q))
    expected = torch.distributions.kl_divergence(ours, theirs).sum(-1)
    torch.testing.assert_close(gaussian_kl(p, q), expected)
    torch.testing.assert_close(gaussian_kl(p, p), torch.zeros(5, dtype=torch.float64))
    torch.testing.assert_close(Gaussian(3).entropy(p), ours.entropy().sum(-1))


def test_kl_gradients_are_right_in_float64() -> None:
    assert gradcheck(categorical_kl, (double(2, 3, 4), double(2, 3, 4)))
    p, q = (gaussian_statistics(2, 3).requires_grad_() for _ in range(2))
    assert gradcheck(gaussian_kl, (p, q))


def test_categorical_sample_is_one_hot_and_follows_the_probabilities() -> None:
    latent = Categorical(2, 3)
    logits = torch.tensor([[0.0, 1.0, 2.0], [1.0, -1.0, 0.0]])
    drawn = latent.rsample(logits.expand(20_000, 2, 3))
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(drawn.sum(-1), torch.ones(20_000, 2))
    torch.testing.assert_close(drawn.mean(0), logits.softmax(-1), atol=0.015, rtol=0)


@pytest.mark.parametrize("sample", [True, False])
def test_gradient_of_a_categorical_draw_is_that_of_the_probabilities(sample: bool) -> None:
    logits, weight = torch.randn(6, 4, 5, requires_grad=True), torch.randn(6, 4, 5)
    drawn, probabilities = Categorical(4, 5).rsample(logits, sample), logits.softmax(-1)
    assert sample or torch.equal(drawn.argmax(-1), logits.argmax(-1))
    ours, theirs = (
        torch.autograd.grad((x * weight).sum(), logits)[0] for x in (drawn, probabilities)
    )
    torch.testing.assert_close(ours, theirs)
    assert ours.abs().max() > 0


def test_gaussian_statistics_have_the_published_std() -> None:
    raw = torch.randn(4, 6)
    statistics = Gaussian(3).params(raw)
    torch.testing.assert_close(statistics[..., 0], raw[:, :3])
    torch.testing.assert_close(statistics[..., 1], 2 * torch.sigmoid(raw[:, 3:] / 2) + 0.1)
    assert Gaussian(3, min_std=0.0).params(torch.zeros(6))[..., 1].tolist() == [1, 1, 1]


def test_gaussian_sample_is_reparameterised() -> None:
    statistics = gaussian_statistics(4, 3).requires_grad_()

    def draw(statistics: Tensor) -> Tensor:
        torch.manual_seed(3)
        return Gaussian(3).rsample(statistics)

    assert gradcheck(draw, (statistics,))
    many = Gaussian(3).rsample(statistics.detach().expand(20_000, 4, 3, 2))
    mean, std = statistics.detach().unbind(-1)
    torch.testing.assert_close(many.mean(0), mean, atol=0.04, rtol=0)
    torch.testing.assert_close(many.std(0), std, atol=0.03, rtol=0)
    assert torch.equal(Gaussian(3).rsample(statistics, sample=False), statistics[..., 0])


# ---------------------------------------------------------------------- truncated normal

MEAN = torch.tensor([-1.0, -0.7, 0.0, 0.3, 0.999], dtype=torch.float64)
STD = torch.tensor([0.1, 0.5, 2.1, 0.3, 0.1], dtype=torch.float64)


def test_truncated_normal_log_prob_and_entropy_equal_scipy() -> None:
    ours, theirs = TruncatedNormal(MEAN[:, None], STD[:, None]), scipy_truncated(MEAN, STD)
    joint = TruncatedNormal(MEAN, STD)  # sums over the action
    for number in (-0.99, -0.4, 0.0, 0.6, 0.99):
        value = torch.full((5,), number, dtype=torch.float64)
        expected = torch.from_numpy(theirs.logpdf(number))
        torch.testing.assert_close(ours.log_prob(value[:, None]), expected)
        torch.testing.assert_close(joint.log_prob(value), expected.sum())
    torch.testing.assert_close(ours.entropy(), torch.from_numpy(theirs.entropy()))
    torch.testing.assert_close(joint.entropy(), ours.entropy().sum())


def test_stacked_truncated_normals_are_those_of_each() -> None:
    mean, std = (torch.stack([x, x.flip(0)]) for x in (MEAN, STD))  # [2, 5]
    parts = [TruncatedNormal(mean.roll(i, 1), std.roll(i, 1)) for i in range(3)]
    stacked = TruncatedNormal.stack(parts, 1)  # [2, 3, 5]
    for index, part in enumerate(parts):
        ours, theirs = stacked.log_prob(mean[:, None])[:, index], part.log_prob(mean)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(stacked.entropy()[:, index], part.entropy())


def test_truncated_normal_samples_follow_the_distribution_of_scipy() -> None:
    drawn = TruncatedNormal(MEAN.expand(4_000, 5), STD.expand(4_000, 5)).rsample().numpy()
    for i, (mean, std) in enumerate(zip(MEAN, STD, strict=True)):
        assert scipy.stats.kstest(drawn[:, i], scipy_truncated(mean, std).cdf).pvalue > 1e-3
    assert np.abs(drawn).max() <= 1 - 1e-6


def test_gradient_of_a_truncated_normal_sample_is_that_of_its_quantile() -> None:
    mean = torch.tensor([-0.6, 0.0, 0.5], dtype=torch.float64, requires_grad=True)
    std = torch.tensor([0.4, 1.5, 0.6], dtype=torch.float64, requires_grad=True)
    torch.manual_seed(1)
    drawn = TruncatedNormal(mean, std).rsample()
    torch.manual_seed(1)
    uniform = torch.rand_like(mean).numpy()
    gradients = torch.autograd.grad(drawn.sum(), (mean, std))

    def quantile(mean: Tensor, std: Tensor) -> np.ndarray:
        return scipy_truncated(mean.detach(), std.detach()).ppf(uniform)

    step = 1e-5
    by_mean = (quantile(mean + step, std) - quantile(mean - step, std)) / (2 * step)
    by_std = (quantile(mean, std + step) - quantile(mean, std - step)) / (2 * step)
    np.testing.assert_allclose(drawn.detach().numpy(), quantile(mean, std), rtol=1e-6)
    np.testing.assert_allclose(gradients[0].numpy(), by_mean, rtol=1e-4)
    np.testing.assert_allclose(gradients[1].numpy(), by_std, rtol=1e-4)


def test_truncated_normal_gradients_are_right_in_float64() -> None:
    mean, std = torch.tanh(double(4, 2)).detach().requires_grad_(), positive(4, 2)
    value = torch.rand(4, 2, dtype=torch.float64) * 1.8 - 0.9

    def draw(mean: Tensor, std: Tensor) -> Tensor:
        torch.manual_seed(5)
        return TruncatedNormal(mean, std).rsample()

    assert gradcheck(draw, (mean, std))
    assert gradcheck(lambda m, s: TruncatedNormal(m, s).log_prob(value), (mean, std))
    assert gradcheck(lambda m, s: TruncatedNormal(m, s).entropy(), (mean, std))


def test_truncated_normal_mode_is_inside_and_passes_its_gradient_through() -> None:
    mean = torch.tensor([-1.0, 0.2, 1.0], requires_grad=True)
    mode = TruncatedNormal(mean, torch.full((3,), 0.3)).mode
    assert mode.abs().max() < 1 and mode[1].item() == pytest.approx(0.2)
    mode.sum().backward()
    assert mean.grad.tolist() == [1, 1, 1]


def test_truncated_normal_stays_finite_in_float32_at_its_extremes() -> None:
    mean = torch.tensor([[-1.0, 1.0, 0.0, 1.0]]).repeat(2000, 1).requires_grad_()
    std = torch.tensor([[0.1, 0.1, 0.1, 2.1]]).repeat(2000, 1).requires_grad_()
    policy = TruncatedNormal(mean, std)
    drawn = policy.rsample()
    total = drawn.sum() + policy.log_prob(drawn.detach()).sum() + policy.entropy().sum()
    total.backward()
    assert all(x.isfinite().all() for x in (total, drawn, mean.grad, std.grad))
