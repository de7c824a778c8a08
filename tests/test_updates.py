"""Training steps: who moves, who stays, learning, and continuing exactly."""

from __future__ import annotations

import copy

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from prelar_trl.models import make_world_model_loss
from prelar_trl.objectives import total_loss
from prelar_trl.updates import BehaviorUpdate, WorldModelUpdate, frozen
from tests.tiny import batch, has_gradient, tiny, tiny_agent, tiny_world_model


def snapshot(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: x.detach().clone() for name, x in module.state_dict().items()}


def moved(module: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, x in module.state_dict().items() if not torch.equal(x, before[name])}


def start() -> TensorDict:
    stoch = torch.eye(4)[torch.randint(0, 4, (2, 3, 4))]
    return TensorDict({"stoch": stoch, "deter": torch.randn(2, 3, 16)}, batch_size=[2, 3])


def test_one_update_is_one_step_of_clipped_adam() -> None:
    torch.manual_seed(1)
    _, loss = tiny("dreamerv2", "finetune", sample=False)
    reference, data = copy.deepcopy(loss), batch()
    out = WorldModelUpdate(loss, lr=1e-3, clip=0.5)(data)
    total_loss(reference.train()(data)).backward()
    parameters = [p for p in reference.parameters() if p.requires_grad]
    norm = nn.utils.clip_grad_norm_(parameters, 0.5)
    torch.optim.Adam(parameters, lr=1e-3, eps=1e-5, weight_decay=1e-6).step()
    assert norm > 0.5
    torch.testing.assert_close(out["grad_norm_model"], norm)
    for ours, theirs in zip(loss.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not any(p.grad is not None for p in loss.parameters())


@pytest.mark.parametrize("method", ["prelar", "apv"])
def test_pretrained_parts_stay_during_the_first_updates_and_move_after(method: str) -> None:
    agent, loss = tiny(method, "finetune")
    update, model = WorldModelUpdate(loss, frozen_updates=2), agent.world_model
    pretrained = {"encoder.", "lower_rssm." if model.lower_rssm else "rssm."}
    others = {"decoder.", "heads.", "rssm." if model.lower_rssm else "action_encoder."}
    weights = {name for name, _ in model.named_parameters()}
    bonus = snapshot(agent.video_bonus)
    for step in range(4):
        before = snapshot(model)
        update(batch())
        changed = moved(model, before) & weights
        for part in pretrained | others:
            expected = step >= 2 or part in others
            assert any(name.startswith(part) for name in changed) == expected, (part, step)
    assert moved(agent.video_bonus, bonus) == {"memory", "filled", "magnitude"}


def test_a_learnable_temperature_is_trained() -> None:
    options = {"weights": {"action_contrast": 1.0}, "temperature": "learned"}
    loss = make_world_model_loss("prelar", "pretrain", tiny_world_model(), **options)
    WorldModelUpdate(loss)(batch())
    assert loss.latent_action.log_temperature.item() != 0


@pytest.mark.parametrize(("method", "phase"), [("prelar", "pretrain"), ("dreamerv2", "finetune")])
def test_one_batch_is_learnt_by_heart(method: str, phase: str) -> None:
    _, loss = tiny(method, phase, depth=8, deter=32, hidden=32)
    update = WorldModelUpdate(loss, lr=3e-3)
    data = batch(2, 4)
    pictures = torch.rand(2, 4, 3, 4, 4).repeat_interleave(16, 3).repeat_interleave(16, 4)
    data["pixels"] = (pictures * 255).to(torch.uint8)
    losses = [update(data) for _ in range(60)]
    first, last = losses[0], losses[-1]
    assert last["image"] < 0.35 * first["image"]
    if "reward" in first.keys():
        assert last["reward"] < 0.1 * first["reward"]


def test_behavior_trains_actor_and_critic_only() -> None:
    agent = tiny_agent("dreamerv2")
    agent.world_model.encoder.requires_grad_(False)
    before, wanted = snapshot(agent), [p.requires_grad for p in agent.world_model.parameters()]
    BehaviorUpdate(agent, horizon=4)(start())
    parts = {name.split(".")[0] for name in moved(agent, before)}
    assert parts == {"actor", "critic", "slow_critic"}
    assert not any(p.grad is not None for p in agent.world_model.parameters())
    assert [p.requires_grad for p in agent.world_model.parameters()] == wanted
    assert not agent.training


def test_actor_learns_through_the_dynamics_and_the_critic_from_its_targets_alone() -> None:
    agent = tiny_agent("dreamerv2").eval()
    update = BehaviorUpdate(agent, horizon=4)
    with frozen(agent.world_model):
        imagined = update.target(agent.world_model.imagine(agent.actor, start(), 4))
    update.actor_loss(imagined)["loss_actor"].backward(retain_graph=True)
    assert has_gradient(agent.actor)
    assert not has_gradient(agent.critic) and not has_gradient(agent.world_model)
    agent.zero_grad()
    update.critic_loss(imagined)["loss_critic"].backward()
    assert has_gradient(agent.critic)
    assert not has_gradient(agent.actor) and not has_gradient(agent.slow_critic)


def test_actor_learns_what_the_reward_asks_for() -> None:
    """A world whose reward is the first coordinate of the action taken."""
    agent = tiny_agent("dreamerv2").eval()
    model, real = agent.world_model, agent.world_model.rssm.transition

    class RewardIsAction(nn.Module):
        def forward(self, feat: torch.Tensor) -> torch.Tensor:
            return feat[..., -1:]

    model.heads["reward"] = RewardIsAction()
    model.rssm.transition = lambda state, action: torch.cat(
        [real(state, action)[..., :-1], action[..., :1]], -1
    )
    update, data = BehaviorUpdate(agent, horizon=5, actor_lr=1e-2, critic_lr=1e-2), start()
    feat = model.rssm.feat(model.rssm.initial_state(1)._replace(deter=data["deter"][0, :1]))
    before = agent.actor(feat).mode[0, 0].item()
    returns = [update(data)["imagined_return"].item() for _ in range(40)]
    assert agent.actor(feat).mode[0, 0].item() > max(before, 0) + 0.3
    assert returns[-1] > returns[0]


def test_slow_critic_is_copied_after_the_first_update_and_every_so_many() -> None:
    agent = tiny_agent("dreamerv2")
    update = BehaviorUpdate(agent, horizon=3, slow_every=3)
    for step in range(7):
        update(start())
        pairs = zip(agent.critic.parameters(), agent.slow_critic.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs) == (step % 3 == 0)


def test_bf16_trains_float32_weights() -> None:
    agent, loss = tiny("prelar", "finetune")
    out = WorldModelUpdate(loss, precision="bf16")(batch())
    assert total_loss(out).isfinite() and total_loss(out).dtype == torch.float32
    state = out["state"].update(batch().select("terminated", "action"))
    behaved = BehaviorUpdate(agent, horizon=3, precision="bf16")(state)
    assert behaved["loss_actor"].isfinite()
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in agent.parameters())
    with pytest.raises(ValueError, match="precision='16' is unknown; choose 32 or bf16"):
        WorldModelUpdate(loss, precision="16")


def train(agent, world, behavior, steps: int) -> None:
    for _ in range(steps):
        out = world(batch())
        behavior(out["state"].update(batch().select("terminated", "action")))


def make_run():
    torch.manual_seed(4)
    agent, loss = tiny("prelar", "finetune")
    return agent, WorldModelUpdate(loss, frozen_updates=3), BehaviorUpdate(agent, horizon=3)


def test_continuing_equals_never_having_stopped() -> None:
    agent, *updates = make_run()
    train(agent, *updates, 2)
    states = [x.state_dict() for x in (agent, *updates)]
    saved = copy.deepcopy((*states, torch.get_rng_state()))
    train(agent, *updates, 3)  # across the end of the frozen phase
    expected = snapshot(agent)

    agent, *updates = make_run()
    for x, state in zip((agent, *updates), saved[:-1], strict=True):
        x.load_state_dict(state)
    torch.set_rng_state(saved[-1])
    train(agent, *updates, 3)
    assert not moved(agent, expected)
    assert [update.count for update in updates] == [5, 5]
