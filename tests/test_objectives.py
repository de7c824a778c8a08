"""The loss modules: keys, gradients, dispatch, saving, precision and compilation."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torchrl.envs.utils import ExplorationType, set_exploration_type

from prelar_trl.models import make_world_model_loss
from prelar_trl.modules import MLP
from prelar_trl.modules.latent_actions import (
    CategoricalActions,
    DeterministicActions,
    GaussianActions,
)
from prelar_trl.objectives import (
    ActorLoss,
    CriticLoss,
    LambdaTarget,
    LatentActionLoss,
    RSSMWorldModelLoss,
    functional,
    total_loss,
)
from tests.tiny import batch, has_gradient, same, seeded, tiny_world_model

B, T, S, K, D, U = 4, 3, 2, 3, 5, 6
CONTRAST = {"action_contrast": 1.0}
ALL_LATENT = {"latent_kl": 1.0, "action_state_consistency": 1.0, **CONTRAST}
DETERMINISTIC = DeterministicActions(size=4)


class Dynamics(nn.Module):
    """A user's own dynamics, no RSSM: ``dynamics(stoch, deter, action) -> statistics``."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(S * K + D + U, S * K)

    def forward(self, stoch: Tensor, deter: Tensor, action: Tensor) -> Tensor:
        return self.linear(torch.cat([stoch.flatten(1), deter, action], 1)).unflatten(1, (S, K))


def prediction(requires_grad: bool = True) -> TensorDict:
    """What a world model with Gaussian latent actions writes."""
    mean, std = torch.randn(B, T, U), torch.rand(B, T, U) + 0.2
    td = TensorDict(
        {
            "stoch": torch.rand(B, T, S, K),
            "deter": torch.randn(B, T, D),
            "posterior": torch.randn(B, T, S, K),
            "prior": torch.randn(B, T, S, K),
            "latent_action": torch.randn(B, T, U),
            "latent_action_statistics": torch.stack([mean, std], -1),
        },
        batch_size=[B, T],
    )
    return td.apply(lambda x: x.requires_grad_()) if requires_grad else td


def trajectory(requires_grad: bool = True) -> TensorDict:
    names = ("value_target", "value", "entropy", "log_prob", "weight")
    td = TensorDict({name: torch.rand(B, 6, 1) for name in names}, batch_size=[B, 6])
    td["feat"] = torch.randn(B, 6, D)
    return td.apply(lambda x: x.requires_grad_()) if requires_grad else td


def rename(td: TensorDict, names: dict[str, Any]) -> TensorDict:
    renamed = TensorDict({}, batch_size=td.batch_size)
    for key, value in td.items():
        renamed[names.get(key, key)] = value
    return renamed


# ---------------------------------------------------------------------- what all losses obey

LOSSES = {
    "latent action": (lambda: LatentActionLoss(Dynamics(), weights=ALL_LATENT), prediction),
    "latent kl": (lambda: LatentActionLoss(Dynamics(), weights={"latent_kl": 1.0}), prediction),
    "contrast": (lambda: LatentActionLoss(Dynamics(), weights=CONTRAST), prediction),
    "deterministic": (lambda: LatentActionLoss(Dynamics(), DETERMINISTIC), prediction),
    "actor": (ActorLoss, trajectory),
    "reinforce": (lambda: ActorLoss(gradient="reinforce"), trajectory),
    "critic": (lambda: CriticLoss(MLP(D, 1, 1, 8)), trajectory),
}


@pytest.fixture(params=LOSSES)
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, TensorDict]:
    make_loss, make_input = LOSSES[request.param]
    return make_loss(), make_input()


def test_in_keys_are_all_that_is_read_and_out_keys_all_that_is_written(pair) -> None:
    loss, td = pair
    out = seeded(loss, td.select(*loss.in_keys))
    assert set(out.keys()) == set(loss.out_keys)
    for key in loss.in_keys:  # nothing in vain
        with pytest.raises((KeyError, TypeError, AttributeError)):
            loss(td.select(*loss.in_keys).exclude(key))
    with pytest.raises(KeyError, match=loss.in_keys[-1]):
        loss(td.exclude(loss.in_keys[-1]))


def test_losses_are_scalars_with_gradient_metrics_without_and_the_input_stays(pair) -> None:
    loss, td = pair
    before = td.clone()
    for key, value in loss(td).items():
        assert value.shape == (), key
        assert value.requires_grad == key.startswith("loss_"), key
    same(td, before)


def test_keywords_other_keys_and_exploration_types_give_the_same(pair) -> None:
    loss, td = pair
    expected = seeded(loss, td)
    values = seeded(loss, **{key: td[key] for key in loss.in_keys})
    values = values if isinstance(values, tuple) else (values,)
    same(TensorDict(dict(zip(loss.out_keys, values, strict=True))), expected)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        same(seeded(loss, td), expected)
    names = {key: ("my", "agent", key) for key in loss.in_keys}
    loss.set_keys(**names)
    assert loss.in_keys == list(names.values())
    same(seeded(loss, rename(td, names)), expected)
    with pytest.raises(ValueError, match="color"):
        loss.set_keys(color="red")


def test_state_dict_round_trip(pair) -> None:
    loss, td = pair
    expected = seeded(loss, td)
    state = {key: x.clone() for key, x in loss.state_dict().items()}
    for parameter in loss.parameters():
        nn.init.normal_(parameter)
    loss.load_state_dict(state)
    same(seeded(loss, td), expected)


def test_float64_is_kept(pair) -> None:
    loss, td = pair
    single = seeded(loss, td)
    out = seeded(loss.to(torch.float64), td.apply(lambda x: x.double()))
    for key, value in out.items():
        if key.startswith("loss_"):
            assert value.dtype == torch.float64
            torch.testing.assert_close(value.float(), single[key], rtol=1e-3, atol=1e-4)


def test_compiled_equals_eager(pair, monkeypatch: pytest.MonkeyPatch) -> None:
    loss, td = pair
    order = torch.randperm(B)
    if isinstance(loss, LatentActionLoss):  # the permutations are drawn elsewhere in the program
        monkeypatch.setattr(loss, "draw_permutation", lambda batch, device: order)
    results = []
    for function in (loss, torch.compile(loss, backend="aot_eager")):
        out = function(td)
        inputs = [x for _, x in sorted(td.items())]
        results.append((out, torch.autograd.grad(total_loss(out), inputs, allow_unused=True)))
    same(results[1][0], results[0][0])
    torch.testing.assert_close(results[1][1], results[0][1])


# ---------------------------------------------------------------------- latent actions


@pytest.mark.parametrize("std", [1.0, 1.5])
def test_latent_kl_is_that_of_the_transitions_from_the_prior(std: float) -> None:
    td, kind = prediction(), GaussianActions(size=1, prior_std=std)
    mean, scale = td["latent_action_statistics"][:, 1:].unbind(-1)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, scale), torch.distributions.Normal(0.0, std)
    )
    out = LatentActionLoss(Dynamics(), kind, weights={"latent_kl": 1.0})(td)
    torch.testing.assert_close(out["latent_kl"], expected.sum(-1).mean().detach())


def test_latent_kl_of_categorical_actions_is_that_from_the_uniform() -> None:
    td, kind = prediction(False), CategoricalActions(size=4, classes=5)
    td["latent_action_statistics"] = torch.randn(B, T, 4, 5)
    entropy = torch.distributions.Categorical(logits=td["latent_action_statistics"][:, 1:])
    expected = (math.log(5) - entropy.entropy()).sum(-1).mean()
    out = LatentActionLoss(Dynamics(), kind, weights={"latent_kl": 1.0})(td)
    torch.testing.assert_close(out["latent_kl"], expected)


def test_consistency_compares_own_and_exchanged_actions(monkeypatch: pytest.MonkeyPatch) -> None:
    td, dynamics = prediction(False), Dynamics()
    loss = LatentActionLoss(dynamics, weights={"action_state_consistency": 2.0})
    order = torch.tensor([2, 0, 3, 1])
    monkeypatch.setattr(loss, "draw_permutation", lambda batch, device: order)
    p, q = [], []
    for b in range(B):
        for t in range(1, T):
            other = td["latent_action"][order[b], t][None]
            shuffled = dynamics(td["stoch"][b, t - 1][None], td["deter"][b, t - 1][None], other)
            p.append(functional.categorical_kl(td["prior"][b, t][None], shuffled))
            own = td["latent_action_statistics"][b, t]
            q.append(functional.gaussian_kl(own, td["latent_action_statistics"][order[b], t])[None])
    p, q = torch.cat(p).detach(), torch.cat(q)
    out = loss(td)
    expected = functional.action_state_consistency(p, q)
    torch.testing.assert_close(out["action_state_consistency"], expected)
    torch.testing.assert_close(out["loss_action_state_consistency"], 2 * expected)
    sign = functional.action_state_consistency(p, q, "sign")
    torch.testing.assert_close(out["consistency_sign"], sign)


def test_consistency_trains_the_latent_actions_only() -> None:
    td, dynamics = prediction(), Dynamics()
    loss = LatentActionLoss(dynamics, weights={"action_state_consistency": 1.0})
    loss(td)["loss_action_state_consistency"].backward()
    assert td["latent_action_statistics"].grad.abs().max() > 0
    for key in ("stoch", "deter", "prior", "posterior", "latent_action"):
        assert td[key].grad is None, key
    assert not has_gradient(dynamics)


def test_deterministic_actions_have_a_consistency_and_no_kl() -> None:
    td, loss = prediction(), LatentActionLoss(Dynamics(), DETERMINISTIC)
    assert "latent_kl" not in loss.weights
    loss(td)["loss_action_state_consistency"].backward()
    assert td["latent_action"].grad[:, 1:].abs().max() > 0
    assert td["latent_action"].grad[:, 0].abs().max() == 0


@pytest.mark.parametrize("train_dynamics", [True, False])
def test_contrast_trains_actions_and_by_option_the_dynamics(train_dynamics: bool) -> None:
    td, dynamics = prediction(), Dynamics()
    out = LatentActionLoss(dynamics, weights=CONTRAST, contrast_dynamics=train_dynamics)(td)
    out["loss_action_contrast"].backward()
    assert td["latent_action"].grad.abs().max() > 0
    assert td["posterior"].grad is None
    assert has_gradient(dynamics) == (td["deter"].grad is not None) == train_dynamics
    assert out["contrast_chance"].item() == pytest.approx(math.log(5))
    assert 0 <= out["contrast_accuracy"] <= 1


@pytest.mark.parametrize("train_dynamics", [True, False])
def test_contrast_trains_the_rssm_by_option_only(train_dynamics: bool) -> None:
    model, options = tiny_world_model(), {"contrast_dynamics": train_dynamics}
    loss = make_world_model_loss("prelar", "pretrain", model, weights=CONTRAST, **options)
    loss(batch())["loss_action_contrast"].backward()
    assert has_gradient(model.rssm) == train_dynamics
    assert has_gradient(model.latent_action_encoder)


def test_contrast_finds_the_action_that_explains_the_transition() -> None:
    td, dynamics = prediction(False), Dynamics()
    stoch, deter = td["stoch"][:, :-1].flatten(0, 1), td["deter"][:, :-1].flatten(0, 1)
    explained = dynamics(stoch, deter, td["latent_action"][:, 1:].flatten(0, 1))
    td["posterior"][:, 1:] = explained.detach().unflatten(0, (B, T - 1))
    loss = LatentActionLoss(dynamics, weights=CONTRAST, temperature=1e-3)
    orders = iter([torch.tensor([1, 2, 3, 0]), torch.tensor([2, 3, 0, 1])] * 2)
    loss.draw_permutation = lambda batch, device: next(orders)
    out = loss(td)
    assert out["contrast_accuracy"] == 1
    assert out["action_contrast"] < 0.1


def test_contrast_takes_other_sequences_and_each_of_them_once() -> None:
    loss = LatentActionLoss(Dynamics(), weights=CONTRAST, negatives=3)
    for _ in range(5):
        others = loss.draw_others(4, torch.device("cpu"))  # [3, 4]
        everyone = torch.cat([torch.arange(4)[None], others])
        assert (everyone.sort(0).values == torch.arange(4)[:, None]).all()
    assert loss.draw_others(2, torch.device("cpu")).tolist() == [[1, 0]] * 3
    with pytest.raises(ValueError, match="only one"):
        loss(prediction()[:1])


def test_dynamics_that_ignores_the_action_explains_nothing() -> None:
    class Deaf(Dynamics):
        def forward(self, stoch, deter, action):
            return super().forward(stoch, deter, torch.zeros_like(action))

    out = LatentActionLoss(Deaf(), weights=CONTRAST)(prediction())
    assert out["contrast_accuracy"] == 0
    torch.testing.assert_close(out["action_contrast"], out["contrast_chance"])


def test_a_learnable_temperature_is_a_parameter_with_a_gradient() -> None:
    td, loss = prediction(), LatentActionLoss(Dynamics(), weights=CONTRAST, temperature=None)
    fixed = LatentActionLoss(loss.dynamics, weights=CONTRAST)
    ours, theirs = (seeded(x, td)["action_contrast"] for x in (loss, fixed))
    torch.testing.assert_close(ours, theirs)
    total_loss(loss(td)).backward()
    assert loss.log_temperature.grad.abs() > 0
    assert not any("temperature" in name for name, _ in fixed.named_parameters())


# ---------------------------------------------------------------------- behavior


def test_lambda_target_reads_the_slow_critic_and_keeps_the_trajectory() -> None:
    target = LambdaTarget(MLP(D, 1, 1, 8), 0.7)
    td = trajectory(False).select("feat").update({"reward": torch.rand(B, 6, 1)})
    td["discount"] = torch.full((B, 6, 1), 0.9)
    out = target(td)
    assert "value" not in td.keys()
    torch.testing.assert_close(out["value"], target.critic(td["feat"]))
    expected = functional.lambda_return(td["reward"], out["value"], td["discount"], 0.7)
    torch.testing.assert_close(out["value_target"], expected)
    target.set_keys(reward=("model", "reward"), value_target="target")
    out = target(td.copy().rename_key_("reward", ("model", "reward")))
    torch.testing.assert_close(out["target"], expected)
    with pytest.raises(TypeError, match="returns"):
        target.set_keys(returns="x")


def test_actor_loss_uses_the_documented_indices() -> None:
    td = trajectory()
    out = ActorLoss(entropy_scale=0.1)(td)
    expected = 0.0
    for k in range(4):  # H = 5: k = 0..H-2
        objective = td["value_target"][:, k + 1] + 0.1 * td["entropy"][:, k]
        expected -= (td["weight"][:, k] * objective).mean() / 4
    torch.testing.assert_close(out["loss_actor"], expected)
    out["loss_actor"].backward()
    assert (td["value_target"].grad[:, 1:5] < 0).all()
    assert td["value_target"].grad[:, [0, 5]].abs().max() == 0
    assert td["weight"].grad is None


def test_reinforce_scales_the_log_probability_by_the_advantage() -> None:
    td = trajectory()
    out = ActorLoss(gradient="reinforce", entropy_scale=0.0)(td)
    expected = 0.0
    for k in range(4):
        advantage = (td["value_target"][:, k + 1] - td["value"][:, k]).detach()
        expected -= (td["weight"][:, k] * td["log_prob"][:, k + 1] * advantage).mean() / 4
    torch.testing.assert_close(out["loss_actor"], expected)
    out["loss_actor"].backward()
    assert td["value_target"].grad is None and td["log_prob"].grad.abs().max() > 0


def test_both_mixes_dynamics_and_reinforce() -> None:
    td = trajectory()
    dynamics, reinforce, both = (
        ActorLoss(gradient=gradient, entropy_scale=0.0)(td)["loss_actor"]
        for gradient in ("dynamics", "reinforce", "both")
    )
    torch.testing.assert_close(both, 0.1 * dynamics + 0.9 * reinforce)


def test_critic_loss_uses_the_documented_indices_and_stops_targets_and_features() -> None:
    td, critic = trajectory(), MLP(D, 1, 1, 8)
    out = CriticLoss(critic)(td)
    error = (critic(td["feat"][:, :5]) - td["value_target"][:, :5]).square() / 2
    torch.testing.assert_close(out["loss_critic"], (td["weight"][:, :5] * error).mean())
    out["loss_critic"].backward()
    assert has_gradient(critic)
    for key in ("feat", "value_target", "weight"):
        assert td[key].grad is None


def test_a_networks_weights_get_no_gradient_from_its_targets() -> None:
    critic = MLP(D, 1, 1, 8)
    feat = torch.randn(2, 4, D, requires_grad=True)
    imagined = {"feat": feat, "reward": torch.randn(2, 4, 1), "discount": torch.ones(2, 4, 1)}
    out = LambdaTarget(critic)(TensorDict(imagined, [2, 4]))
    torch.testing.assert_close(out["value"], critic(feat))
    out["value_target"].sum().backward()
    assert not has_gradient(critic) and feat.grad.abs().sum() > 0


def test_losses_can_be_sent_to_another_process() -> None:
    model = tiny_world_model("prelar", "pretrain", sample=False)
    loss = make_world_model_loss("prelar", "pretrain", model).eval()
    torch.manual_seed(0)
    expected = loss(batch())
    again = pickle.loads(pickle.dumps(loss))
    torch.manual_seed(0)
    same(again(batch()), expected)


def test_the_kind_of_the_states_is_the_models_own() -> None:
    model = tiny_world_model("prelar", "pretrain", classes=0, sample=False)
    expected = make_world_model_loss("prelar", "pretrain", model).eval()
    plain = RSSMWorldModelLoss(model, latent_action=LatentActionLoss(model.rssm)).eval()
    data = batch()
    torch.testing.assert_close(plain(data)["kl"], expected(data)["kl"])
    assert plain.discount == model.discount
    for make in (RSSMWorldModelLoss, lambda model, **x: LatentActionLoss(model.rssm, **x)):
        with pytest.raises(ValueError, match="latent='categorical', but .* are gaussian"):
            make(model, latent="categorical")
