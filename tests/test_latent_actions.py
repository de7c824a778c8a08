"""Kinds of latent actions behind their socket."""

from __future__ import annotations

import pytest
import torch

from prelar_trl.modules.latent_actions import (
    DeterministicActions,
    FSQActions,
    GaussianActions,
    VQActions,
    make_latent_actions,
    register_latent_actions,
)


def test_gaussian_actions_have_no_least_std() -> None:
    _, params = GaussianActions(size=2)(torch.tensor([1.0, 2.0, 0.0, -40.0]))
    expected = torch.tensor([[1.0, 1.0], [2.0, 0.0]])
    torch.testing.assert_close(params, expected, atol=1e-6, rtol=0)


def test_only_the_stochastic_part_of_mixed_actions_is_drawn() -> None:
    kind, raw = make_latent_actions("mixed", size=3, deter_size=2), torch.randn(8)
    first, second = kind(raw)[0], kind(raw)[0]
    assert torch.equal(first[:2], raw[:2]) and torch.equal(second[:2], raw[:2])
    assert (first[2:] != second[2:]).all()
    assert torch.equal(kind(raw, sample=False)[0], raw[:5])


def test_fsq_actions_are_the_products_of_the_levels() -> None:
    kind = FSQActions(levels=(4, 3))
    raw = torch.cartesian_prod(torch.linspace(-4, 4, 101), torch.linspace(-4, 4, 101))
    action, params = kind(raw)
    assert params is None
    assert len(action.unique(dim=0)) == 12
    assert action[:, 0].unique().tolist() == [-1.0, -0.5, 0.0, 0.5]
    assert action[:, 1].unique().tolist() == [-1.0, 0.0, 1.0]
    corners = torch.tensor([[-9.0, -9.0], [9.0, 9.0], [9.0, -9.0], [-9.0, 9.0]]).repeat(5, 1)
    metrics = kind.metrics(*kind(corners))  # the actions in use
    torch.testing.assert_close(metrics["code_perplexity"], torch.tensor(4.0))


def test_fsq_passes_the_gradient_of_the_bounded_output() -> None:
    raw = torch.zeros(5, 3, requires_grad=True)
    FSQActions(levels=(5, 5, 5))(raw)[0].sum().backward()
    torch.testing.assert_close(raw.grad, torch.full_like(raw, 2 * (1 - 1e-3) / 2))


def test_vq_gives_the_nearest_code_and_passes_the_gradient_straight_through() -> None:
    codebook = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    kind = VQActions(size=2, codes=3).eval()
    kind.codebook.copy_(codebook)
    raw = torch.tensor([[0.9, 0.3], [0.2, 1.7]], requires_grad=True)
    action, params = kind(raw)
    torch.testing.assert_close(action, codebook[[1, 2]])
    action.sum().backward()
    torch.testing.assert_close(raw.grad, torch.ones_like(raw))
    commitment = kind.extra_losses(action, params)["commitment"]
    torch.testing.assert_close(commitment, torch.tensor((0.01 + 0.09 + 0.04 + 0.09) / 2))
    assert torch.equal(kind.codebook, codebook)  # stands still in evaluation


def test_vq_codebook_finds_the_clusters_and_dead_codes_restart() -> None:
    torch.manual_seed(0)
    centers = torch.tensor([[5.0, 0.0], [-5.0, 0.0], [0.0, 5.0], [0.0, -5.0]])
    kind = VQActions(size=2, codes=12)
    kind.codebook.add_(90.0)[0].sub_(86.0)  # all but one are far from every input
    kind.sums.copy_(kind.codebook)
    for _ in range(600):
        action, params = kind(centers.repeat(8, 1) + 0.1 * torch.randn(32, 2))
    distance = torch.cdist(centers, kind.codebook).amin(1)
    assert distance.max() < 0.2
    assert kind.metrics(action, params)["code_perplexity"] > 3.5


def test_a_kind_is_found_by_its_path_and_takes_the_shared_options_that_it_names() -> None:
    path = "prelar_trl.modules.latent_actions:DeterministicActions"
    assert isinstance(make_latent_actions(path, size=3), DeterministicActions)
    shared = {"classes": 4, "deter_size": 2}
    assert make_latent_actions("gaussian", size=3, shared=shared).dim == 3
    assert make_latent_actions("categorical", size=3, shared=shared).dim == 12
    with pytest.raises(ValueError, match="'gaussian' is GaussianActions"):
        register_latent_actions("gaussian")(FSQActions)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("normal", {}, "'normal' is unknown; choose categorical, .*package.module:Class"),
        ("no_such_module:Kind", {}, "cannot be imported: No module"),
        ("torch.nn:Kind", {}, "cannot be imported"),
        ("torch.nn:Linear", {}, "no class derived from LatentActions"),
        ("gaussian", {"codes": 3}, "unexpected keyword argument 'codes'"),
        ("gaussian", {"prior_std": 0}, "prior_std=0 must be positive"),
        ("categorical", {}, "classes=0"),
        ("fsq", {"levels": (8, 2)}, r"levels=\[8, 2\]"),  # not within reach of tanh
        ("vq", {"codes": 1}, "codes=1"),
        ("vq", {"decay": 1.0}, "decay=1.0"),
    ],
)
def test_bad_kinds_and_options_are_errors(kind: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_latent_actions(kind, size=4, **options)


@pytest.mark.parametrize("kind", ["gaussian", "deterministic", "categorical", "mixed", "fsq", "vq"])
def test_every_kind_learns_under_autocast(kind: str) -> None:
    options = {"categorical": {"classes": 3}, "mixed": {"deter_size": 2}}.get(kind, {})
    actions = make_latent_actions(kind, size=4, **options).train()
    raw = torch.randn(3, 2, actions.num_outputs, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        action, params = actions(raw @ torch.eye(actions.num_outputs))
        own = actions.extra_losses(action, params)
    (action.float().sum() + sum(own.values())).backward()
    assert raw.grad.isfinite().all()
