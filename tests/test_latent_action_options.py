"""Options of the latent-action losses: free nats, warm-up, gate, labels, a kind's own losses."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict

from prelar_trl.models import copy_pretrained, make_world_model_loss
from prelar_trl.modules.latent_actions import DeterministicActions, GaussianActions
from prelar_trl.objectives import LatentActionLoss, RSSMWorldModelLoss
from prelar_trl.objectives.functional import action_state_consistency
from tests.tiny import batch, has_gradient, tiny_world_model

LABELED = {"action_label": 1.0}


def gaussian_batch(mean: float) -> TensorDict:
    """Latent actions N(mean, 1) of two variables: a KL of ``mean^2`` nats."""
    params = torch.stack([torch.full((2, 3, 2), mean), torch.ones(2, 3, 2)], -1)
    td = {"latent_action_statistics": params, "latent_action": params[..., 0]}
    return TensorDict(td, batch_size=[2, 3])


def latent_kl_loss(**options) -> LatentActionLoss:
    return LatentActionLoss(torch.nn.Identity(), weights={"latent_kl": 0.5}, **options)


def test_free_nats_hold_the_loss_and_stop_its_gradient_but_not_the_metric() -> None:
    loss = latent_kl_loss(free_nats=1.0)
    for mean, expected in ((0.5, 0.5 * 1.0), (2.0, 0.5 * 4.0)):
        data = gaussian_batch(mean)
        params = data["latent_action_statistics"].requires_grad_()
        out = loss(data)
        torch.testing.assert_close(out["loss_latent_kl"], torch.tensor(expected))
        torch.testing.assert_close(out["latent_kl"], torch.tensor(mean**2))
        out["loss_latent_kl"].backward()
        assert (params.grad.abs().max() > 0) == (mean**2 > 1)


def test_warm_up_raises_the_weight_geometrically_over_training_calls() -> None:
    loss, data = latent_kl_loss(warmup=4, warmup_start=0.01), gaussian_batch(2.0)
    loss.eval()
    factors = [0.01, 0.01 ** (3 / 4), 0.1, 0.01 ** (1 / 4), 1.0, 1.0]
    for factor in factors:
        for training in (False, True):  # looking does not count
            out = loss.train(training)(data)
            torch.testing.assert_close(out["loss_latent_kl"], torch.tensor(0.5 * 4 * factor))
            torch.testing.assert_close(out["latent_kl"], torch.tensor(4.0))


def labeled_batch(rows: int = 1) -> TensorDict:
    labeled = torch.zeros(2, 4, 1, dtype=torch.bool)
    labeled[:rows] = True
    return batch(labeled=labeled)


# ---------------------------------------------------------------- labels


def label_loss() -> LatentActionLoss:
    options = {"weights": {"action_label": 2.0}, "action_dim": 2}
    loss = LatentActionLoss(torch.nn.Identity(), DeterministicActions(size=3), **options)
    torch.nn.init.normal_(loss.label_head.weight)
    return loss


def test_action_label_is_the_mean_squared_error_where_the_action_is_known() -> None:
    loss, latent = label_loss(), torch.randn(2, 4, 3)
    known = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 1]], dtype=torch.bool).unsqueeze(-1)
    true = torch.randn(2, 4, 2)
    td = {"latent_action": latent, "action": true, "labeled": known}
    out = loss(TensorDict(td, batch_size=[2, 4]))
    read = latent @ loss.label_head.weight.T + loss.label_head.bias
    error = (read - true).square().mean(-1)
    expected = (error[0, 1:].sum() + error[1, 3]) / 4  # never the action of the first frame
    torch.testing.assert_close(out["action_label"], expected)
    torch.testing.assert_close(out["loss_action_label"], 2 * expected)
    td["action"] = true.masked_fill(~known, 1e6)
    again = loss(TensorDict(td, batch_size=[2, 4]))
    torch.testing.assert_close(again["action_label"], expected)


def test_a_batch_without_a_label_costs_nothing() -> None:
    td = {"latent_action": torch.randn(2, 4, 3, requires_grad=True), "action": torch.ones(2, 4, 2)}
    td["labeled"] = torch.zeros(2, 4, 1, dtype=torch.bool)
    out = label_loss()(TensorDict(td, batch_size=[2, 4]))
    assert out["action_label"] == 0
    out["loss_action_label"].backward()
    assert td["latent_action"].grad.abs().max() == 0


def test_labels_train_the_inverse_model_and_need_the_size_of_the_actions() -> None:
    model = tiny_world_model()
    off = dict.fromkeys(("image", "kl", "latent_kl", "action_state_consistency"))
    options = {"weights": {**off, **LABELED}, "action_dim": 2}
    loss = make_world_model_loss("prelar", "pretrain", model, **options)
    loss(labeled_batch())["loss_action_label"].backward()
    assert has_gradient(model.latent_action_encoder)
    assert not has_gradient(model.rssm) and not has_gradient(model.decoder)
    with pytest.raises(ValueError, match="action_label needs action_dim"):
        LatentActionLoss(torch.nn.Identity(), weights=LABELED)


# ---------------------------------------------------------------- the gate


def gated(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return action_state_consistency(p, q, "gated")


def test_gated_falls_as_the_orderings_agree_more() -> None:
    p = torch.linspace(0, 8, 12)
    torch.manual_seed(0)
    noise = [gated(p, p + s * torch.randn(12)) for s in (0.1, 1.0, 4.0)]
    losses = [gated(p, p), *noise, gated(p, p.flip(0))]
    assert losses == sorted(losses) and losses[0].abs() < 1e-6
    q = p.flip(0).requires_grad_()
    gated(p, q).backward()
    assert q.grad[0] > 0.01 and q.grad[-1] < -0.01  # downhill: the first falls, the last rises


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 1e3])
def test_the_gradient_of_gated_is_bounded_however_small_q_is(scale: float) -> None:
    torch.manual_seed(0)
    p, q = 5 * torch.rand(16), (scale * torch.rand(16)).requires_grad_()
    gated(p, q).backward()
    # Each of the 2 N pairs of a transition gives at most 1 / (temperature N^2).
    assert 0 < q.grad.abs().max() <= 2 * 16 / (0.5 * 16**2)


def test_gated_is_off_while_the_state_divergence_is_noise() -> None:
    torch.manual_seed(0)
    noise = torch.rand(16)
    gradients = []
    for scale in (1e-6, 1.0, 1e3):
        q = torch.randn(16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        gated(scale * noise, q).backward()
        gradients.append(float(q.grad.abs().max()))
    assert gradients[0] < 1e-6 and gradients[1] > 1e-3 and gradients[2] > gradients[1]


# ---------------------------------------------------------------- a kind's own losses


class Named(GaussianActions):
    """Gaussian actions with a loss of a given name."""

    name = "size"

    def extra_losses(self, action, params):
        return {self.name: action.square().mean()}


def test_a_loss_of_the_kinds_own_takes_its_weight_or_goes() -> None:
    for weights, expected in (({}, 1.0), ({"size": 3.0}, 3.0), ({"size": None}, None)):
        loss = LatentActionLoss(torch.nn.Identity(), Named(size=2), weights=weights)
        out = loss(gaussian_batch(2.0))
        if expected is None:
            assert "size" not in out.keys() and "size" not in loss.out_keys
        else:
            torch.testing.assert_close(out["loss_size"], torch.tensor(4.0 * expected))


@pytest.mark.parametrize("name", ["latent_kl", "kl"])
def test_a_kind_cannot_take_the_name_of_another_loss(name: str, monkeypatch) -> None:
    monkeypatch.setattr(Named, "name", name)
    with pytest.raises(ValueError, match=f"cannot name a loss of its own '{name}'"):
        own = LatentActionLoss(torch.nn.Identity(), Named(size=2), weights={})
        RSSMWorldModelLoss(tiny_world_model(), latent_action=own)


# ---------------------------------------------------------------- what the kind has learned

VQ = {"latent_action": "vq", "latent_action_options": {"codes": 5}}


def test_the_action_encoder_gets_the_codebook_of_the_inverse_model() -> None:
    pretrained = tiny_world_model(**VQ)
    fine = tiny_world_model("prelar", "finetune", **VQ, action_code="vq")
    before = fine.action_encoder.latent_actions.codebook.clone()
    copy_pretrained(fine, pretrained.state_dict())
    codebook = pretrained.latent_action_encoder.latent_actions.codebook
    assert torch.equal(fine.action_encoder.latent_actions.codebook, codebook)
    assert not torch.equal(codebook, before)
    fine.train()
    latent, _ = fine.action_encoder(torch.randn(2, 3, 2))
    assert torch.cdist(latent.flatten(0, 1), codebook).amin(1).max() < 1e-6
    assert torch.equal(fine.action_encoder.latent_actions.codebook, codebook)  # stands still


def test_a_codebook_of_another_size_is_refused() -> None:
    other = {"latent_action": "vq", "latent_action_options": {"codes": 6}}
    fine = tiny_world_model("prelar", "finetune", **other, action_code="vq")
    with pytest.raises(ValueError, match=r"codebook is \(5, 4\) there and \(6, 4\) here"):
        copy_pretrained(fine, tiny_world_model(**VQ).state_dict())


def test_what_stands_in_place_of_an_unknown_action_does_not_matter() -> None:
    known = torch.tensor([[[True], [True], [False]]])
    td = {"latent_action": torch.randn(1, 3, 3), "labeled": known, "action": torch.ones(1, 3, 2)}
    loss = label_loss()
    expected = loss(TensorDict(td, batch_size=[1, 3]))["action_label"]
    td["action"] = td["action"].masked_fill(~known, torch.nan)
    assert loss(TensorDict(td, batch_size=[1, 3]))["action_label"] == expected
    with pytest.raises(ValueError, match="action_label needs latent_actions"):
        LatentActionLoss(torch.nn.Identity(), weights=LABELED, action_dim=2)


@pytest.mark.parametrize("options", [{"negatives": 2.5}, {"warmup": "9"}])
def test_a_count_that_is_no_whole_number_is_named(options: dict) -> None:
    with pytest.raises(TypeError, match="must be a whole number"):
        LatentActionLoss(torch.nn.Identity(), **options)
