"""The world model: keys, where gradients go, imagination and open-loop prediction."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from prelar_trl.fast import accelerate
from prelar_trl.models import Agent
from prelar_trl.modules import RSSMWorldModel, State
from prelar_trl.objectives import functional
from tests.tiny import ACTION_DIM, PHASES, batch, has_gradient, tiny, tiny_agent, tiny_world_model


def world_model(method: str, phase: str, **options) -> RSSMWorldModel:
    model, _ = tiny(method, phase, **options)
    return getattr(model, "world_model", model)


@pytest.mark.parametrize(("method", "phase"), PHASES)
def test_reads_its_in_keys_and_writes_its_out_keys(method: str, phase: str) -> None:
    model = world_model(method, phase)
    assert ("action" in model.in_keys) == (phase == "finetune")
    given = batch().select(*model.in_keys)
    out = model(given.copy())
    keys = {key if isinstance(key, str) else tuple(key) for key in model.out_keys}
    assert set(out.keys(True, True)) - set(given.keys()) == keys
    assert out["prediction", "pixels"].shape == (2, 4, 3, 64, 64)
    for head in model.heads:
        assert out["prediction", head].shape == (2, 4, 1)


@pytest.mark.parametrize("method", ["dreamerv2", "prelar", "naive", "apv"])
def test_real_actions_move_the_prediction(method: str) -> None:
    model, data = world_model(method, "finetune", sample=False).eval(), batch()
    before = model(data.copy())["deter"]
    data["action"] = -data["action"]
    changed = (model(data.copy())["deter"] != before).any(-1)
    assert changed.tolist() == [[False, True, True, True]] * 2


def test_float_pixels_are_an_error() -> None:
    data = batch()
    data["pixels"] = data["pixels"].float() / 255
    with pytest.raises(TypeError, match=r"pixels is float32 \[2, 4, 3, 64, 64\]; it must be uint8"):
        tiny_world_model()(data)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize(
    ("method", "options"), [("dreamerv2", {}), ("prelar", {"action_window": 3})]
)
def test_a_reset_inside_a_window_equals_two_windows(method: str, options: dict, fast: bool) -> None:
    model, data = world_model(method, "finetune", sample=False, **options).eval(), batch(2, 5)
    if options:
        nn.init.normal_(model.action_encoder.hidden.weight)  # all actions of the window count
    model = accelerate(model) if fast else model
    data["is_first"][:, 2] = True
    whole = model(data.copy())
    starts = model.flatten_start_states(whole).reshape(2, 5)
    for part in (slice(0, 2), slice(2, 5)):
        alone = model(data[:, part].copy())
        for key in ("feat", "posterior", "prior", ("prediction", "reward")):
            torch.testing.assert_close(whole[key][:, part], alone[key], atol=1e-5, rtol=1e-4)
        if options:
            alone = model.flatten_start_states(alone).reshape(alone.shape)
            assert torch.equal(starts["action_history"][:, part], alone["action_history"])


def test_the_stack_feeds_the_lower_feature_to_the_upper_rssm() -> None:
    model, data = world_model("apv", "finetune", sample=False).eval(), batch()
    out = model(data.copy())
    upper, posterior, _ = model.rssm.observe(
        out["lower", "feat"], data["action"], data["is_first"].squeeze(-1), sample=False
    )
    torch.testing.assert_close(upper.deter, out["deter"])
    torch.testing.assert_close(posterior, out["posterior"])
    lower, _, _ = model.lower_rssm.observe(
        out["embed"], None, data["is_first"].squeeze(-1), sample=False
    )
    torch.testing.assert_close(model.lower_rssm.feat(lower), out["lower", "feat"])


def test_the_stack_can_also_read_the_embedding() -> None:
    model = world_model("apv", "finetune", concat_embed=True)
    assert model.rssm.embed_dim == model.lower_rssm.feat_dim + model.encoder.embed_dim
    assert model(batch())["feat"].isfinite().all()


# ---------------------------------------------------------------------- gradients


def gradients_of(
    model: RSSMWorldModel, term: Callable[[TensorDict], torch.Tensor]
) -> dict[str, bool]:
    model.zero_grad()
    term(model(batch())).backward()
    return {name: has_gradient(module) for name, module in model.named_children()}


def test_heads_send_gradients_into_the_representation_only_if_told_to() -> None:
    sends = {"reward": True, "aux_reward": True, "discount": False}
    grad_heads = ("reward", "aux_reward")
    model = tiny_world_model("prelar", "finetune", heads=tuple(sends), grad_heads=grad_heads)
    for head, told in sends.items():
        reached = gradients_of(model, lambda out, head=head: out["prediction", head].sum())
        assert reached["heads"]
        assert reached["encoder"] == reached["rssm"] == reached["action_encoder"] == told, head


def test_what_the_reconstruction_and_the_kl_train() -> None:
    model = tiny_world_model()
    reached = gradients_of(model, lambda out: out["prediction", "pixels"].sum())
    assert all(reached[name] for name in ("encoder", "decoder", "rssm", "latent_action_encoder"))
    reached = gradients_of(
        model, lambda out: functional.balanced_kl(out["posterior"], out["prior"])
    )
    assert reached["encoder"] and reached["rssm"] and not reached["decoder"]
    assert has_gradient(model.rssm.prior_heads)


def test_the_context_encoder_learns_from_the_reconstruction_alone() -> None:
    model = world_model("contextwm", "pretrain")
    reached = gradients_of(model, lambda out: out["prediction", "pixels"].square().sum())
    assert reached["context_encoder"]
    reached = gradients_of(model, lambda out: out["feat"].sum())
    assert not reached["context_encoder"] and reached["encoder"]


# ---------------------------------------------------------------------- imagination


def starts(model: RSSMWorldModel, data: TensorDict) -> TensorDict:
    return model(data.copy()).select("stoch", "deter").update(data.select("action", "terminated"))


def dream(data: TensorDict, horizon: int = 3, **options) -> tuple[Agent, TensorDict]:
    agent = tiny_agent("dreamerv2", **options).eval()
    start = starts(agent.world_model, data)
    return agent, agent.world_model.imagine(agent.actor, start, horizon)


def test_imagination_has_the_documented_layout() -> None:
    agent, imagined = dream(batch(2, 4), horizon=5)
    assert imagined.batch_size == (8, 6)
    assert imagined["action"].shape == (8, 6, ACTION_DIM)
    assert not imagined["action"][:, 0].any() and not imagined["log_prob"][:, 0].any()
    assert not imagined["entropy"][:, -1].any()
    for key in ("log_prob", "entropy", "reward", "discount", "weight"):
        assert imagined[key].shape == (8, 6, 1)
    policy, action = agent.actor(imagined["feat"][:, :-1]), imagined["action"][:, 1:]
    torch.testing.assert_close(imagined["log_prob"][:, 1:, 0], policy.log_prob(action))
    torch.testing.assert_close(imagined["entropy"][:, :-1, 0], policy.entropy())
    assert (imagined["discount"] == 0.99).all()  # without a head
    # Log-probabilities take features and actions as given.
    parameters = list(agent.actor.parameters())
    ours = torch.autograd.grad(imagined["log_prob"].sum(), parameters, retain_graph=True)
    given = agent.actor(imagined["feat"][:, :-1].detach()).log_prob(action.detach()).sum()
    theirs = torch.autograd.grad(given, parameters)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ["dreamerv2", "prelar", "apv"])
def test_imagination_steps_the_dynamics_with_the_actors_actions(method: str) -> None:
    agent, data = tiny_agent(method).eval(), batch(2, 3)
    model = agent.world_model
    start = starts(model, data)
    imagined = model.imagine(agent.actor, start, horizon=3, sample=False)
    state = State(start["stoch"].flatten(0, 1), start["deter"].flatten(0, 1))
    for k in range(4):
        torch.testing.assert_close(imagined["feat"][:, k], model.rssm.feat(state))
        if k < 3:
            action = agent.actor(model.rssm.feat(state)).mode
            torch.testing.assert_close(imagined["action"][:, k + 1], action)
            code = action if model.action_encoder is None else model.action_encoder(action)[0]
            state, _ = model.rssm.step(state, code, sample=False)
    torch.testing.assert_close(imagined["reward"], model.heads["reward"](imagined["feat"]))


def test_imagination_with_an_action_window_remembers_the_actions_before() -> None:
    agent, data = tiny_agent("prelar", action_window=3).eval(), batch(2, 4)
    model = agent.world_model
    start = starts(model, data)
    imagined = model.imagine(agent.actor, start, horizon=2, sample=False)
    padded = torch.cat([torch.zeros(2, 1, ACTION_DIM), data["action"]], 1)
    recent = torch.stack([padded[:, :-1], padded[:, 1:]], 2).flatten(0, 1)  # a_{t-1}, a_t
    state = State(start["stoch"].flatten(0, 1), start["deter"].flatten(0, 1))
    for k in (1, 2):
        recent = torch.cat([recent, imagined["action"][:, k : k + 1]], 1)[:, -3:]
        state, _ = model.rssm.step(state, model.action_encoder(recent)[0][:, -1], sample=False)
        torch.testing.assert_close(imagined["feat"][:, k], model.rssm.feat(state))
    chosen = model.imagine(agent.actor, model.flatten_start_states(start)[[5, 1]], 2, sample=False)
    torch.testing.assert_close(chosen["feat"], imagined["feat"][[5, 1]])


def test_imagination_with_an_action_window_encodes_each_action_once() -> None:
    agent, data = tiny_agent("prelar", action_window=3).eval(), batch(2, 4)
    rows = []
    agent.world_model.action_encoder.out.register_forward_hook(
        lambda layer, inputs, output: rows.append(output.shape[:-1].numel())
    )
    agent.world_model.imagine(agent.actor, starts(agent.world_model, data), horizon=2)
    assert rows[-2:] == [2 * 4] * 2


def test_starts_of_imagination_get_no_gradient_and_the_actor_gets_it_through_the_dynamics() -> None:
    agent = tiny_agent("dreamerv2").eval()
    start = starts(agent.world_model, batch())
    start["deter"].requires_grad_() if start["deter"].is_leaf else start["deter"].retain_grad()
    imagined = agent.world_model.imagine(agent.actor, start, horizon=3)
    imagined["reward"].sum().backward()
    assert start["deter"].grad is None
    assert not has_gradient(agent.world_model.encoder)
    assert has_gradient(agent.actor) and has_gradient(agent.world_model.rssm)


def test_the_actor_reads_detached_features() -> None:
    agent, imagined = dream(batch())
    (imagined["entropy"].sum() + imagined["log_prob"].sum()).backward()
    assert has_gradient(agent.actor) and not has_gradient(agent.world_model)


def test_weights_are_the_products_of_the_discounts_before() -> None:
    data = batch(1, 3)
    data["terminated"][0, 2] = True
    agent, imagined = dream(data, heads=("reward", "discount"), discount=0.9)
    discount, weight = imagined["discount"][..., 0], imagined["weight"][..., 0]
    torch.testing.assert_close(discount[:, 0], torch.tensor([0.9, 0.9, 0.0]))  # the true ones
    head = agent.world_model.heads["discount"](imagined["feat"])[..., 0].sigmoid()
    torch.testing.assert_close(discount[:, 1:], head[:, 1:])
    assert (weight[:, 0] == 1).all()
    torch.testing.assert_close(weight[:, 2], discount[:, 0] * discount[:, 1])
    assert not weight.requires_grad


# ---------------------------------------------------------------------- prediction


@pytest.mark.parametrize(("method", "phase"), PHASES)
def test_open_loop_predicts_frames_without_seeing_them(method: str, phase: str) -> None:
    model = world_model(method, phase, sample=False, classes=0).eval()
    data = batch(2, 5)

    def predict() -> torch.Tensor:
        torch.manual_seed(0)  # the context frame and the hidden positions are drawn
        return model.open_loop(data, context=2)

    predicted = predict()
    assert predicted.shape == (2, 5, 3, 64, 64)
    assert predicted.min() >= 0 and predicted.max() <= 1
    if model.latent_action_encoder is None:  # latent actions are inferred from the frames
        data["pixels"][:, 2:] = 0
        torch.testing.assert_close(predict(), predicted)
    data["pixels"][:, 0] = 0
    assert not torch.allclose(predict()[:, 3:], predicted[:, 3:], atol=1e-6)


def test_open_loop_reconstructs_the_context_frames() -> None:
    model, data = tiny_world_model(sample=False).eval(), batch(2, 5)
    out = model(data.copy())
    expected = (out["prediction", "pixels"][:, :2] + 0.5).clamp(0, 1)
    torch.testing.assert_close(model.open_loop(data, context=2)[:, :2], expected)


def test_a_users_own_encoder_takes_the_place_of_ours() -> None:
    class Mean(nn.Module):
        embed_dim = 3

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.mean((2, 3))

    model = tiny_world_model(encoder=Mean())
    out = model(batch())
    assert out["embed"].shape == (2, 4, 3)
    assert out["feat"].isfinite().all()
