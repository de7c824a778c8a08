"""A world model as a TorchRL environment."""

from __future__ import annotations

import pytest
import torch
from tensordict.nn import (
    NormalParamExtractor,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
)
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import OneHot
from torchrl.envs import StepCounter
from torchrl.envs.utils import check_env_specs, step_mdp
from torchrl.modules import MLP, TanhNormal
from torchrl.objectives import DreamerV3ActorLoss
from torchrl.objectives.utils import hold_out_net

from prelar_trl.imagination import ImaginationEnv, posterior_states
from prelar_trl.modules import RSSMWorldModel, TruncatedNormal
from prelar_trl.types import Inputs
from tests.tiny import ACTION_DIM, batch, has_gradient, tiny_world_model

KINDS = {
    "real": ("dreamerv2", "finetune", {}),
    "encoded": ("prelar", "finetune", {}),
    "window": ("prelar", "finetune", {"action_window": 3}),
    "stacked": ("apv", "finetune", {}),
    "discount": ("dreamerv2", "finetune", {"heads": ("reward", "discount")}),
    "latent": ("prelar", "pretrain", {}),
}


def model_of(kind: str) -> RSSMWorldModel:
    method, phase, options = KINDS[kind]
    return tiny_world_model(method, phase, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size", [(), (3,)])
def test_it_keeps_its_specs(kind: str, batch_size: tuple[int, ...]) -> None:
    model = model_of(kind)
    decode = model.context_encoder is None
    env = ImaginationEnv(model, decode=decode, batch_size=batch_size)
    check_env_specs(env)
    rollout = env.rollout(3)
    assert rollout.shape == (*batch_size, 3)
    assert rollout["pixels"].shape == (*batch_size, 3, 3, 64, 64)


@pytest.mark.parametrize("kind", ["real", "encoded", "window", "stacked"])
def test_a_rollout_imagines_as_the_world_model(kind: str) -> None:
    model = model_of(kind).eval()
    data = batch(2, 4)
    states = posterior_states(model, data)
    env = ImaginationEnv(model, sample=False)
    actions = torch.rand(2, 4, 5, ACTION_DIM) * 2 - 1
    taken = iter(actions.unbind(2))
    td = env.reset(states)
    rollout = env.rollout(
        5, lambda td: td.set("action", next(taken)), auto_reset=False, tensordict=td
    )
    assert rollout.shape == (2, 4, 5)
    chosen = iter(actions.flatten(0, 1).unbind(1))
    actor = _Scripted(chosen)
    start = states.copy().set("action", data["action"])
    expected = model.imagine(actor, start, horizon=5, sample=False)
    torch.testing.assert_close(rollout["next", "feat"].flatten(0, 1), expected["feat"][:, 1:])
    torch.testing.assert_close(rollout["next", "reward"].flatten(0, 1), expected["reward"][:, 1:])
    torch.testing.assert_close(rollout["feat"][:, :, 1:], rollout["next", "feat"][:, :, :-1])


class _Scripted(nn.Module):
    """Stands for an actor: takes given actions."""

    def __init__(self, actions) -> None:
        super().__init__()
        self.actions = actions

    def forward(self, feat: torch.Tensor):
        action = next(self.actions)
        return TruncatedNormal(action, torch.ones_like(action))


def test_one_of_several_actions_is_one_hot() -> None:
    env = ImaginationEnv(model_of("encoded"), action_spec=OneHot(ACTION_DIM))
    check_env_specs(env)
    assert (env.rollout(4)["action"].sum(-1) == 1).all()


def test_a_model_of_several_inputs_is_imagined() -> None:
    model = tiny_world_model("dreamerv2", "finetune", inputs=Inputs(views=2, vector=3), gray=True)
    frames = batch(2, 3, vector=torch.randn(2, 3, 3))
    frames["pixels"] = frames["pixels"].repeat(1, 1, 2, 1, 1)
    states = posterior_states(model, frames)
    env = ImaginationEnv(model, decode=True)
    check_env_specs(env)
    pixels = env.reset(states)["pixels"]
    assert pixels.shape == (2, 3, 6, 64, 64)
    assert torch.equal(pixels[:, :, 0], pixels[:, :, 2])  # gray


def test_the_latent_moves_on() -> None:
    env = ImaginationEnv(model_of("encoded"))
    deter = env.rollout(4)["deter"]
    assert all((a - b).abs().max() > 0 for a, b in zip(deter, deter[1:], strict=False))


def test_a_video_is_played_with_its_own_and_with_other_latent_actions() -> None:
    torch.manual_seed(0)
    model = tiny_world_model("prelar", "pretrain", sample=False).eval()
    frames = batch(2, 6).select("pixels", "is_first")
    states = posterior_states(model, frames)
    env = ImaginationEnv(model, decode=True, sample=False)
    td, shown = env.reset(states[:, 2]), []
    for t in range(3, 6):
        td, following = env.step_and_maybe_reset(td.set("action", states["latent_action"][:, t]))
        shown.append(td["next", "pixels"])
        td = following
    expected = model.open_loop(frames, context=3)[:, 3:]
    difference = torch.stack(shown, 1).float() / 255 - expected
    assert difference.abs().max() < 1 / 255
    other = env.step(env.reset(states[:, 2]).set("action", torch.full((2, 4), 3.0)))
    assert (other["next", "deter"] - states["deter"][:, 3]).abs().max() > 0


def test_a_reset_draws_from_the_starts_and_begins_with_what_is_given() -> None:
    model = model_of("encoded")
    starts = posterior_states(model, batch(2, 4)).reshape(-1)
    env = ImaginationEnv(model, starts=starts, batch_size=(50,))
    drawn = env.reset()["deter"]
    row = (drawn[:, None] == starts["deter"]).all(-1)  # [50, 8]
    assert row.any(1).all() and row.any(0).all()
    given = starts[row.float().argmax(1)]
    torch.testing.assert_close(env.reset(given)["stoch"], given["stoch"])


def test_only_what_has_ended_starts_anew() -> None:
    model = model_of("discount")
    starts = posterior_states(model, batch(2, 4)).reshape(-1)
    env = ImaginationEnv(model, starts=starts, batch_size=(3,))
    td = env.rand_step(env.reset())
    td["next", "done"][1] = True
    following = env.maybe_reset(step_mdp(td))
    mask = torch.tensor([[False], [True], [False]])
    again = env.reset(step_mdp(td).set("_reset", mask).set("done", mask))
    assert (again["deter"] == td["next", "deter"]).all(-1).tolist() == [True, False, True]
    own = (following["deter"] == td["next", "deter"]).all(-1)
    assert own.tolist() == [True, False, True]
    assert (following["deter"][1] == starts["deter"]).all(-1).any()


def test_it_ends_where_the_discount_head_says() -> None:
    model = model_of("discount")
    nn.init.zeros_(model.heads["discount"].out.weight)
    for bias, ends in ((3.0, False), (-3.0, True)):
        nn.init.constant_(model.heads["discount"].out.bias, bias)
        rollout = ImaginationEnv(model).rollout(3)
        assert len(rollout) == (1 if ends else 3)
        assert bool(rollout["next", "terminated"].any()) == ends


def make_policy(env: ImaginationEnv) -> ProbabilisticTensorDictSequential:
    features, action_dim = env.observation_spec["feat"].shape[-1], env.action_spec.shape[-1]
    return ProbabilisticTensorDictSequential(
        TensorDictModule(
            nn.Sequential(MLP(features, 2 * action_dim, num_cells=[16]), NormalParamExtractor()),
            ["feat"],
            ["loc", "scale"],
        ),
        ProbabilisticTensorDictModule(
            in_keys=["loc", "scale"],
            out_keys=["action"],
            distribution_class=TanhNormal,
            return_log_prob=True,
        ),
    )


def test_a_torchrl_loss_learns_in_it() -> None:
    model = model_of("encoded")
    env = ImaginationEnv(model)
    policy = make_policy(env)
    features = env.observation_spec["feat"].shape[-1]
    value = TensorDictModule(MLP(features, 1, num_cells=[16]), ["feat"], ["state_value"])
    loss = DreamerV3ActorLoss(policy, value, env, imagination_horizon=4)
    loss.set_keys(state="stoch", belief="deter")
    losses, imagined = loss(posterior_states(model, batch(2, 4)).reshape(-1))
    assert imagined.shape == (8, 4)
    losses["loss_actor"].backward()
    assert has_gradient(policy) and not has_gradient(model)


def test_a_collector_steps_it() -> None:
    env = ImaginationEnv(model_of("encoded"), batch_size=(4,))
    with hold_out_net(env):
        collector = Collector(
            env.append_transform(StepCounter(5)),
            make_policy(env),
            frames_per_batch=40,
            total_frames=80,
        )
        data = [batch.clone() for batch in collector]
        collector.shutdown()
    assert [x.shape for x in data] == [(4, 10)] * 2
    assert data[1]["step_count"].max() == 4


def test_what_nobody_can_act_in_is_refused() -> None:
    with pytest.raises(ValueError, match="knows no actions"):
        ImaginationEnv(tiny_world_model("apv", "pretrain"))
    with pytest.raises(ValueError, match="needs a frame"):
        ImaginationEnv(tiny_world_model("contextwm", "finetune"), decode=True)
    with pytest.raises(ValueError, match=r"\[2, 4\]"):
        model = model_of("encoded")
        ImaginationEnv(model, starts=posterior_states(model, batch(2, 4)))
