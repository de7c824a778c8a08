"""The loss modules: keys, gradients, dispatch, saving, precision and compilation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.envs.utils import ExplorationType, set_exploration_type

from prelar_trl.models import make_world_model_loss
from prelar_trl.modules import MLP
from prelar_trl.objectives import (
    ActorLoss,
    CriticLoss,
    LambdaTarget,
    LatentActionLoss,
    VideoBonus,
    WorldModelLoss,
    functional,
    total_loss,
)
from tests.tiny import PHASES, batch, has_gradient, tiny, tiny_agent, tiny_world_model

B, T, S, K, D, U = 4, 3, 2, 3, 5, 6
ALL_LATENT = {"latent_kl": 1.0, "action_state_consistency": 1.0, "action_contrast": 1.0}


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


def same(first: TensorDict, second: TensorDict) -> None:
    assert set(first.keys(True, True)) == set(second.keys(True, True))
    for key in first.keys(True, True):
        torch.testing.assert_close(first[key], second[key])


def rename(td: TensorDict, names: dict[str, Any]) -> TensorDict:
    renamed = TensorDict({}, batch_size=td.batch_size)
    for key, value in td.items():
        renamed[names.get(key, key)] = value
    return renamed


def seeded(loss: nn.Module, *args: Any, **kwargs: Any) -> Any:
    torch.manual_seed(9)
    return loss(*args, **kwargs)


# ---------------------------------------------------------------------- what all losses obey

LOSSES = {
    "latent action": (lambda: LatentActionLoss(Dynamics(), weights=ALL_LATENT), prediction),
    "latent kl": (lambda: LatentActionLoss(Dynamics(), weights={"latent_kl": 1.0}), prediction),
    "contrast": (
        lambda: LatentActionLoss(Dynamics(), weights={"action_contrast": 1.0}),
        prediction,
    ),
    "deterministic": (lambda: LatentActionLoss(Dynamics(), action=None), prediction),
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


def test_losses_are_scalars_with_gradient_and_metrics_without(pair) -> None:
    loss, td = pair
    out = loss(td)
    for key, value in out.items():
        assert value.shape == (), key
        assert value.requires_grad == key.startswith("loss_"), key


def test_the_input_is_not_changed(pair) -> None:
    loss, td = pair
    before, keys = td.clone(), set(td.keys(True))
    loss(td)
    assert set(td.keys(True)) == keys
    same(td, before)


def test_keyword_arguments_give_the_same_as_a_tensordict(pair) -> None:
    loss, td = pair
    expected = seeded(loss, td)
    values = seeded(loss, **{key: td[key] for key in loss.in_keys})
    values = values if isinstance(values, tuple) else (values,)
    assert len(values) == len(loss.out_keys)
    for key, value in zip(loss.out_keys, values, strict=True):
        torch.testing.assert_close(value, expected[key])


def test_keys_can_be_renamed_and_nested(pair) -> None:
    loss, td = pair
    expected = seeded(loss, td)
    names = {key: ("my", "agent", key) for key in loss.in_keys}
    loss.set_keys(**names)
    assert loss.in_keys == list(names.values())
    same(seeded(loss, rename(td, names)), expected)


def test_unknown_keys_are_an_error(pair) -> None:
    loss, _ = pair
    with pytest.raises(ValueError, match="colour"):
        loss.set_keys(colour="red")


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


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_equals_eager(pair, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loss, td = pair
    orders = torch.stack([torch.randperm(B) for _ in range(8)])
    if isinstance(loss, LatentActionLoss):  # the permutations are drawn elsewhere in the program
        monkeypatch.setattr(loss, "draw_permutation", lambda batch, device: orders[0])
    expected = loss(td)
    compiled = torch.compile(loss, backend=backend)
    out = compiled(td)
    same(out, expected)
    ours = torch.autograd.grad(total_loss(out), _inputs(td), allow_unused=True)
    theirs = torch.autograd.grad(total_loss(expected), _inputs(td), allow_unused=True)
    for first, second in zip(ours, theirs, strict=True):
        assert (first is None) == (second is None)
        if first is not None:
            torch.testing.assert_close(first, second)


def _inputs(td: TensorDict) -> list[Tensor]:
    return [x for _, x in sorted(td.items())]


def test_nothing_depends_on_the_exploration_type(pair) -> None:
    loss, td = pair
    expected = seeded(loss, td)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        same(seeded(loss, td), expected)


# ---------------------------------------------------------------------- latent actions


def test_latent_kl_is_that_of_the_transitions_from_the_prior() -> None:
    td = prediction()
    for std in (1.0, 1.5):
        loss = LatentActionLoss(Dynamics(), weights={"latent_kl": 1.0}, prior_std=std)
        mean, scale = td["latent_action_statistics"][:, 1:].unbind(-1)
        expected = torch.distributions.kl_divergence(
            torch.distributions.Normal(mean, scale), torch.distributions.Normal(0.0, std)
        )
        torch.testing.assert_close(loss(td)["latent_kl"], expected.sum(-1).mean().detach())


def test_latent_kl_of_categorical_actions_is_that_from_the_uniform() -> None:
    td = prediction(False)
    td["latent_action_statistics"] = torch.randn(B, T, 4, 5)
    loss = LatentActionLoss(Dynamics(), weights={"latent_kl": 1.0}, action="categorical")
    entropy = torch.distributions.Categorical(logits=td["latent_action_statistics"][:, 1:])
    expected = (math.log(5) - entropy.entropy()).sum(-1).mean()
    torch.testing.assert_close(loss(td)["latent_kl"], expected)


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


def test_deterministic_actions_are_compared_by_squared_distance() -> None:
    td = prediction()
    loss = LatentActionLoss(Dynamics(), action=None)
    assert "latent_kl" not in loss.weights
    loss(td)["loss_action_state_consistency"].backward()
    assert td["latent_action"].grad[:, 1:].abs().max() > 0
    assert td["latent_action"].grad[:, 0].abs().max() == 0


@pytest.mark.parametrize("train_dynamics", [True, False])
def test_contrast_trains_actions_and_by_option_the_dynamics(train_dynamics: bool) -> None:
    td, dynamics = prediction(), Dynamics()
    loss = LatentActionLoss(
        dynamics, weights={"action_contrast": 1.0}, contrast_dynamics=train_dynamics
    )
    out = loss(td)
    out["loss_action_contrast"].backward()
    assert td["latent_action"].grad.abs().max() > 0
    assert td["posterior"].grad is None
    assert has_gradient(dynamics) == train_dynamics
    assert (td["deter"].grad is not None) == train_dynamics
    assert out["contrast_chance"].item() == pytest.approx(math.log(5))
    assert 0 <= out["contrast_accuracy"] <= 1


def test_contrast_without_the_dynamics_gives_the_rssm_no_gradient_at_all() -> None:
    for train_dynamics in (True, False):
        model = tiny_world_model()
        loss = make_world_model_loss(
            "prelar",
            "pretrain",
            model,
            weights={"action_contrast": 1.0},
            contrast_dynamics=train_dynamics,
        )
        loss(batch())["loss_action_contrast"].backward()
        assert has_gradient(model.rssm) == train_dynamics
        assert has_gradient(model.latent_action_encoder)


def test_contrast_finds_the_action_that_explains_the_transition() -> None:
    td, dynamics = prediction(False), Dynamics()
    stoch, deter = td["stoch"][:, :-1].flatten(0, 1), td["deter"][:, :-1].flatten(0, 1)
    explained = dynamics(stoch, deter, td["latent_action"][:, 1:].flatten(0, 1))
    td["posterior"][:, 1:] = explained.detach().unflatten(0, (B, T - 1))
    loss = LatentActionLoss(dynamics, weights={"action_contrast": 1.0}, temperature=1e-3)
    orders = iter([torch.tensor([1, 2, 3, 0]), torch.tensor([2, 3, 0, 1])] * 2)
    loss.draw_permutation = lambda batch, device: next(orders)
    out = loss(td)
    assert out["contrast_accuracy"] == 1
    assert out["action_contrast"] < 0.1


def test_a_learnable_temperature_is_a_parameter_with_a_gradient() -> None:
    loss = LatentActionLoss(Dynamics(), weights={"action_contrast": 1.0}, temperature=None)
    fixed = LatentActionLoss(loss.dynamics, weights={"action_contrast": 1.0})
    td = prediction()
    torch.testing.assert_close(
        seeded(loss, td)["action_contrast"], seeded(fixed, td)["action_contrast"]
    )
    total_loss(loss(td)).backward()
    assert loss.log_temperature.grad.abs() > 0
    assert not any("temperature" in name for name, _ in fixed.named_parameters())


def test_bad_settings_are_errors() -> None:
    with pytest.raises(ValueError, match="unknown loss weight 'rank'.*latent_kl"):
        LatentActionLoss(Dynamics(), weights={"rank": 1.0})
    with pytest.raises(ValueError, match="unknown loss weight 'picture'.*image"):
        WorldModelLoss(tiny_world_model(), weights={"picture": 1.0})
    with pytest.raises(ValueError, match="prior_std=0"):
        LatentActionLoss(Dynamics(), prior_std=0)
    with pytest.raises(ValueError, match="negatives=0"):
        LatentActionLoss(Dynamics(), negatives=0)
    with pytest.raises(ValueError, match="kl_balance=2"):
        WorldModelLoss(tiny_world_model(), kl_balance=2)
    with pytest.raises(ValueError, match="gradient='straight'"):
        ActorLoss(gradient="straight")
    with pytest.raises(ValueError, match="lmbda=1.5"):
        LambdaTarget(MLP(D, 1), 1.5)


# ---------------------------------------------------------------------- world model


@pytest.mark.parametrize(("method", "phase"), PHASES)
def test_world_model_loss_reads_and_writes_its_keys_and_changes_no_input(
    method: str, phase: str
) -> None:
    _, loss = tiny(method, phase)
    data = batch().select(*loss.in_keys)
    before = data.clone()
    out = loss(data)
    assert set(out.keys()) == set(loss.out_keys)
    same(data, before)
    terms = [name for name, weight in loss.weights.items() if weight]
    assert {f"loss_{name}" for name in terms} <= set(out.keys())
    assert total_loss(out).isfinite() and total_loss(out).requires_grad
    assert out["state"].batch_size == (2, 4)
    assert not any(x.requires_grad for x in out["state"].values())


def test_world_model_loss_takes_keyword_arguments() -> None:
    _, loss = tiny("prelar", "finetune", sample=False)
    loss.eval()
    data = batch()
    expected = loss(data)
    values = loss(**{key: data[key] for key in loss.in_keys})
    for key, value in zip(loss.out_keys, values, strict=True):
        if key == "state":
            same(value, expected[key])
        else:
            torch.testing.assert_close(value, expected[key])


def test_world_model_loss_is_its_formula() -> None:
    agent, loss = tiny(
        "dreamerv2",
        "finetune",
        weights={"discount": 3.0, "kl": 0.5},
        heads=("reward", "discount"),
        sample=False,
    )
    data = batch()
    data["terminated"][0, 3] = True
    out, predicted = loss(data), agent.world_model(data.copy())
    image = (
        (predicted["prediction", "pixels"] - (data["pixels"] / 255 - 0.5)).square().sum((2, 3, 4))
    )
    reward = (predicted["prediction", "reward"] - data["reward"]).square()
    bernoulli = torch.distributions.Bernoulli(logits=predicted["prediction", "discount"])
    alive = 1 - data["terminated"].float()
    discount = -(
        0.99 * alive * bernoulli.probs.log() + (1 - 0.99 * alive) * (1 - bernoulli.probs).log()
    )
    kl = functional.categorical_kl(predicted["posterior"], predicted["prior"])
    expected = {
        "image": image.mean() / 2,
        "reward": reward.mean() / 2,
        "discount": discount.mean(),
        "kl": kl.mean(),
    }
    for name, value in expected.items():
        torch.testing.assert_close(out[name], value.detach(), rtol=1e-4, atol=1e-6)
    weights = {"image": 1.0, "reward": 1.0, "discount": 3.0, "kl": 0.5}
    total = sum(weights[name] * value for name, value in expected.items())
    torch.testing.assert_close(total_loss(out), total, rtol=1e-4, atol=1e-5)


def test_a_weight_of_zero_is_reported_without_a_loss() -> None:
    _, loss = tiny("apv", "finetune")
    out = loss(batch())
    assert "af_kl" in out.keys() and "loss_af_kl" not in out.keys()


def test_the_bonus_is_added_to_the_reward_and_never_to_aux_reward() -> None:
    agent, loss = tiny("prelar", "finetune", sample=False)
    loss.eval()
    agent.video_bonus.train()(torch.randn(2, 4, agent.world_model.encoder.embed_dim))
    agent.video_bonus.eval()
    data = batch()
    predicted = agent.world_model(data.copy())
    bonus = agent.video_bonus(predicted["embed"])[..., None]  # [2, 2, 1]: windows of 3 in 4 steps
    assert bonus.shape == (2, 2, 1) and bonus.min() > 0
    for scale in (1.0, 0.5):
        loss.bonus_scale = scale
        out = loss(data)
        target = data["reward"][:, :2] + scale * bonus
        reward = (predicted["prediction", "reward"][:, :2] - target).square().mean() / 2
        aux = (predicted["prediction", "aux_reward"] - data["reward"]).square().mean() / 2
        torch.testing.assert_close(out["reward"], reward.detach())
        torch.testing.assert_close(out["aux_reward"], aux.detach())
        torch.testing.assert_close(out["bonus"], bonus.mean())


def test_the_bonus_reads_the_embedding_of_its_method() -> None:
    for method, options, key in (
        ("prelar", {}, "embed"),
        ("apv", {}, ("lower", "feat")),
        ("naive", {"bonus_embed": "feat"}, "feat"),
        ("apv", {"bonus_embed": "embed"}, "embed"),
    ):
        _, loss = tiny(method, "finetune", **options)
        assert loss.tensor_keys.bonus_embed == key
        assert loss(batch())["bonus"].isfinite()


def test_world_model_loss_works_on_any_module_with_matching_keys() -> None:
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4))

        def forward(self, frames: Tensor) -> tuple[Tensor, ...]:
            statistics = torch.randn(*frames.shape[:2], S, K)
            mean = self.weight[0] * (frames.float() / 255 - 0.5)
            return (
                mean,
                self.weight[1] * statistics,
                self.weight[2] * statistics,
                statistics,
                frames,
            )

    keys = [("out", "image", "pixels"), ("out", "q"), ("out", "p"), ("out", "z"), ("out", "h")]
    module = TensorDictModule(Linear(), [("in", "frames")], keys)
    loss = WorldModelLoss(module)
    loss.set_keys(
        pixels=("in", "frames"),
        prediction=("out", "image"),
        posterior=("out", "q"),
        prior=("out", "p"),
        stoch=("out", "z"),
        deter=("out", "h"),
    )
    assert loss.in_keys == [("in", "frames")]
    frames = torch.randint(0, 256, (2, 3, 3, 8, 8), dtype=torch.uint8)
    total_loss(loss(TensorDict({"in": {"frames": frames}}, [2, 3]))).backward()
    assert module.module.weight.grad[:3].abs().min() > 0


def test_world_model_loss_saves_every_tensor_once_loaded_as_saved() -> None:
    _, loss = tiny("prelar", "finetune")
    loss(batch())
    _, other = tiny("prelar", "finetune")
    other.load_state_dict(loss.state_dict())
    for key, value in loss.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key
    data = batch()
    same(seeded(loss, data), seeded(other, data))


@pytest.mark.parametrize(
    ("method", "phase"), [("prelar", "pretrain"), ("contextwm", "pretrain"), ("prelar", "finetune")]
)
def test_world_model_loss_works_in_float64(method: str, phase: str) -> None:
    _, loss = tiny(method, phase)
    loss.to(torch.float64)
    data = batch().apply(lambda x: x.double() if x.is_floating_point() else x)
    total = total_loss(loss(data))
    total.backward()
    assert total.dtype == torch.float64 and total.isfinite()


@pytest.mark.parametrize("method", ["prelar", "dreamerv2"])
def test_compiled_world_model_loss_equals_eager(method: str) -> None:
    phase = "finetune"
    _, loss = tiny(method, phase, sample=False)
    loss.eval()  # the bonus memory stays as it is
    data = batch(2, 3)
    expected = loss(data)
    compiled = torch.compile(loss, backend="aot_eager")
    same(compiled(data), expected)


# ---------------------------------------------------------------------- behaviour


def test_lambda_target_reads_the_slow_critic_and_keeps_the_trajectory() -> None:
    critic = MLP(D, 1, 1, 8)
    td = trajectory(False).select("feat").update({"reward": torch.rand(B, 6, 1)})
    td["discount"] = torch.full((B, 6, 1), 0.9)
    out = LambdaTarget(critic, 0.7)(td)
    assert "value" not in td.keys()
    torch.testing.assert_close(out["value"], critic(td["feat"]))
    expected = functional.lambda_return(td["reward"], out["value"], td["discount"], 0.7)
    torch.testing.assert_close(out["value_target"], expected)


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
    losses = {
        gradient: ActorLoss(gradient=gradient, entropy_scale=0.0)(td)["loss_actor"]
        for gradient in ("dynamics", "reinforce", "both")
    }
    mixed = 0.1 * losses["dynamics"] + 0.9 * losses["reinforce"]
    torch.testing.assert_close(losses["both"], mixed)


def test_critic_loss_uses_the_documented_indices_and_stops_targets_and_features() -> None:
    td, critic = trajectory(), MLP(D, 1, 1, 8)
    out = CriticLoss(critic)(td)
    error = (critic(td["feat"][:, :5]) - td["value_target"][:, :5]).square() / 2
    torch.testing.assert_close(out["loss_critic"], (td["weight"][:, :5] * error).mean())
    out["loss_critic"].backward()
    assert has_gradient(critic)
    for key in ("feat", "value_target", "weight"):
        assert td[key].grad is None


# ---------------------------------------------------------------------- bonus


def make_bonus(**options: Any) -> VideoBonus:
    sizes = {"k": 2, "window": 2, "projection_dim": 3, "memory_size": 6}
    return VideoBonus(4, **{**sizes, **options})


def test_bonus_memory_keeps_the_newest_points_first() -> None:
    bonus = make_bonus().train()
    first, second = torch.randn(1, 5, 4), torch.randn(1, 4, 4)  # 4 and 3 clips
    project = lambda x: (functional.sliding_mean(x, 2) @ bonus.projection)[0]  # noqa: E731
    bonus(first)
    assert bonus.filled == 4
    torch.testing.assert_close(bonus.memory[:4], project(first))
    bonus(second)
    assert bonus.filled == 6
    torch.testing.assert_close(bonus.memory[:3], project(second))
    torch.testing.assert_close(bonus.memory[3:], project(first)[:3])


def test_bonus_is_the_neighbour_distance_over_the_running_magnitude() -> None:
    bonus, embed = make_bonus(momentum=0.9).train(), torch.randn(1, 4, 4)
    out = bonus(embed)
    points = (functional.sliding_mean(embed, 2) @ bonus.projection)[0]
    raw = torch.cdist(points, points).sort(1).values[:, :2].mean(1)  # itself and the nearest
    magnitude = 0.9 * 1 + 0.1 * raw.mean()
    assert bonus.magnitude.item() == pytest.approx(magnitude.item(), rel=1e-5)
    torch.testing.assert_close(out, (raw / magnitude)[None])


def test_bonus_in_evaluation_mode_moves_nothing() -> None:
    bonus = make_bonus().train()
    bonus(torch.randn(1, 4, 4))
    before = {key: x.clone() for key, x in bonus.state_dict().items()}
    out = bonus.eval()(torch.randn(1, 4, 4))
    assert out.isfinite().all()
    for key, value in bonus.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_bonus_of_an_empty_memory_is_zero() -> None:
    assert make_bonus().eval()(torch.randn(1, 4, 4)).tolist() == [[0.0] * 3]


def test_bonus_of_something_new_is_larger() -> None:
    bonus = make_bonus(memory_size=64).train()
    for _ in range(4):
        bonus(0.1 * torch.randn(2, 8, 4))
    bonus.eval()
    assert bonus(torch.full((1, 3, 4), 9.0)).mean() > 5 * bonus(0.1 * torch.randn(2, 8, 4)).mean()


def test_bonus_is_frozen_float32_under_autocast_and_follows_the_module_to_float64() -> None:
    bonus, embed = make_bonus().train(), torch.randn(1, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert bonus(embed.bfloat16()).dtype == torch.float32
    assert bonus.double()(embed.double()).dtype == torch.float64
    assert not any(p.requires_grad for p in bonus.parameters())


def test_agents_have_a_bonus_only_where_the_paper_has_one() -> None:
    with_bonus = {m for m, p in PHASES if p == "finetune" and tiny_agent(m).video_bonus is not None}
    assert with_bonus == {"apv", "contextwm", "prelar", "prelar_no_cl", "prelar_no_al_cl"}
