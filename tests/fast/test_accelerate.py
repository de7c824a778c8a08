"""An accelerated model computes what the plain one does, for every method and phase."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from prelar_trl.fast import accelerate, linear
from prelar_trl.fast.linear import OneDNNLinear
from prelar_trl.models import Agent
from prelar_trl.objectives import total_loss
from prelar_trl.updates import BehaviorUpdate, Update, WorldModelUpdate, frozen
from tests.tiny import PHASES, batch, tiny, tiny_agent, tiny_world_model, train_in_float64

OPTIONS: list[tuple[str, str, dict[str, Any]]] = [
    ("prelar_no_cl", "pretrain", {"ensemble": 3, "norm": "none", "layers": 2}),
    ("prelar", "pretrain", {"weights": {"action_contrast": 1.0}}),
    ("prelar", "finetune", {"action_window": 3, "classes": 0}),
    ("prelar", "finetune", {"images": "cnn", "patches": True}),
    ("contextwm", "pretrain", {"norm": "group", "layers": 2, "augmentation": "scale"}),
]
CASES = [(method, phase, {}) for method, phase in PHASES] + OPTIONS
BOTH = [False, True]


def build(method: str, phase: str, fast: bool, **options: Any) -> tuple[nn.Module, nn.Module]:
    """A model and its loss, the same weights each time."""
    torch.manual_seed(3)
    model, loss = tiny(method, phase, **options)
    return (accelerate(model) if fast else model), loss


def test_the_fast_rssm_refuses_what_the_plain_one_does() -> None:
    model = accelerate(tiny_world_model("dreamerv2", "finetune"))
    embed, action = torch.randn(2, 4, model.rssm.embed_dim), torch.randn(2, 4, 2)
    first = torch.zeros(2, 4, dtype=torch.bool)
    for wrong in (action[:1], action[:, :1]):  # they would broadcast
        with pytest.raises(ValueError, match=r"must be \[B, T, A\] of batch"):
            model.rssm.observe(embed, wrong, first)
    with pytest.raises(TypeError, match="it must be bool"):
        model.rssm.observe(embed, action, first.float())


def updates(model: nn.Module, loss: nn.Module, **options: Any) -> list[Update]:
    made: list[Update] = [WorldModelUpdate(loss, **options)]
    if isinstance(model, Agent):
        made.append(BehaviorUpdate(model, horizon=3, imag_batch=5, **options))
    return made


def outputs_and_gradients(model: nn.Module, loss: nn.Module, data: TensorDict) -> dict[str, Any]:
    """All that the world model writes, the losses and their gradients, and the imagination's."""
    seen: dict[str, Any] = {}
    world_model = loss.world_model
    hook = world_model.register_forward_hook(lambda module, args, out: seen.update(out=out))
    torch.manual_seed(4)
    losses = loss.train()(data)
    hook.remove()
    total_loss(losses).backward()
    result = {"out": seen["out"].detach().to_dict(), "losses": losses.detach().to_dict()}
    if isinstance(model, Agent):
        start = losses["state"].update(data.select("terminated", "action"))
        with frozen(world_model):
            imagined = world_model.imagine(model.actor, start, 3)
            (imagined["reward"].sum() + imagined["log_prob"].sum()).backward()
        result["imagined"] = imagined.detach().to_dict()
    result["gradients"] = {name: p.grad for name, p in model.named_parameters()}
    return result


@pytest.mark.parametrize(("method", "phase", "options"), CASES)
def test_outputs_and_gradients_equal_the_plain_ones(method, phase, options) -> None:
    data = batch().apply(lambda x: x.double() if x.is_floating_point() else x)
    data["is_first"][1, 2] = True
    results = []
    for fast in BOTH:
        model, loss = build(method, phase, fast, **options)
        model.double()
        results.append(outputs_and_gradients(model, loss.double(), data.clone()))
    # The bonus, a point's distance from itself among it, is a root of rounding noise: 1e-8.
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("method", "phase", "options"), CASES)
def test_an_update_equals_the_plain_one(method, phase, options) -> None:
    data, results = batch(), []
    for fast in BOTH:
        model, loss = build(method, phase, fast, **options)
        model.double()
        torch.manual_seed(4)
        made = updates(model, loss.double())
        losses = train_in_float64(made, data.clone()).to_dict()
        results.append((losses, dict(model.state_dict()), torch.get_rng_state()))
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", ["prelar", "dreamerv2"])
def test_in_float32_onednn_multiplies_and_the_result_is_the_same(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    product = linear._product
    monkeypatch.setattr(linear, "_product", lambda *args: calls.append(1) or product(*args))
    data, results = batch(), []
    for fast in BOTH:
        # Behind batch norm gradients are chaotic in the last bits.
        model, loss = build(method, "finetune", fast, norm="none")
        results.append(outputs_and_gradients(model, loss, data.clone()))
        assert bool(calls) == (fast and linear.onednn_linear() is not None)
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["prelar", "dreamerv2", "contextwm"])
def test_in_bf16_the_losses_are_the_plain_ones(method: str) -> None:
    data, results = batch(), []
    for fast in BOTH:
        model, loss = build(method, "finetune", fast, sample=False)
        losses = updates(model, loss, precision="bf16")[0](data.clone())
        results.append({name: losses[name] for name in ("image", "kl", "reward")})
    torch.testing.assert_close(results[1], results[0], rtol=3e-2, atol=1e-2)


@pytest.mark.parametrize(("method", "phase"), PHASES)
def test_names_and_counts_of_parameters_and_buffers_stay(method: str, phase: str) -> None:
    plain, _ = build(method, phase, False)
    fast, _ = build(method, phase, True)
    ours, theirs = fast.state_dict(), plain.state_dict()
    assert list(ours) == list(theirs)
    assert [name for name, _ in fast.named_parameters()] == [
        name for name, _ in plain.named_parameters()
    ]
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
    fast.load_state_dict(theirs)


def test_the_same_object_comes_back_accelerated_once() -> None:
    model = tiny_world_model()
    assert accelerate(model) is model
    kinds = [type(part) for part in model.modules()]
    assert kinds == [type(part) for part in accelerate(model).modules()]
    assert OneDNNLinear in kinds and nn.Linear not in kinds
    assert isinstance(copy.deepcopy(model.rssm), type(model.rssm))


def test_a_users_own_network_keeps_its_activations() -> None:
    class Own(nn.Module):
        embed_dim = 12

        def __init__(self) -> None:
            super().__init__()
            self.layer, self.act = nn.Linear(3 * 64 * 64, 12), nn.ELU()

        def forward(self, images: Tensor) -> Tensor:
            x = self.layer(images.flatten(1))
            return x * self.act(x)  # would be wrong if the activation changed x

    model = accelerate(tiny_world_model(encoder=Own()))
    assert not model.encoder.act.inplace
    assert model.rssm.act.inplace and model.rssm.prior_heads[0][1].inplace
    model(batch())["embed"].sum().backward()
    assert model.encoder.layer.weight.grad.isfinite().all()


def test_acting_takes_the_plain_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model = accelerate(tiny_world_model("dreamerv2", "finetune", sample=False))
    data, steps = batch(2, 3), []
    step = type(model.rssm).observe_step
    monkeypatch.setattr(
        type(model.rssm), "observe_step", lambda *args: steps.append(1) or step(*args)
    )
    whole = model(data.clone())
    assert not steps
    first = model(data[:, :1].clone())
    assert steps
    torch.testing.assert_close(first["feat"], whole["feat"][:, :1])


@pytest.mark.parametrize(("method", "phase"), PHASES)
def test_an_accelerated_update_never_asks_for_a_value(method: str, phase: str) -> None:
    with torch.device("meta"):
        model, loss = build(method, phase, True)
        data = batch()
    made = updates(model.to("meta"), loss.to("meta"))
    losses = made[0](data)
    start = losses.pop("state").update(data.select("terminated", "action"))
    for update in made[1:]:
        losses.update(update(start))
    assert all(x.is_meta for x in losses.values())


def test_imagination_in_bf16_casts_the_frozen_weights_once() -> None:
    agent = accelerate(tiny_agent())
    weights = {x.data_ptr() for x in agent.world_model.rssm.parameters() if x.dim() == 2}
    casts: list[int] = []

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
            if operation is torch.ops.aten._to_copy.default and args[0].data_ptr() in weights:
                casts.append(args[0].data_ptr())
            return operation(*args, **(kwargs or {}))

    update = BehaviorUpdate(agent, horizon=4, precision="bf16")
    stoch = torch.eye(4)[torch.randint(0, 4, (6, 4))]
    start = TensorDict({"stoch": stoch, "deter": torch.randn(6, 16)}, batch_size=[6])
    with Casts():
        update(start)
    assert casts and len(casts) == len(set(casts))
    assert all(x.cast is None for x in agent.modules() if isinstance(x, OneDNNLinear))


class Viewing(nn.Module):
    """A user's own encoder, which knows its maps as contiguous."""

    embed_dim = 4 * 16 * 16

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 4, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images).view(len(images), -1)


def test_a_users_network_keeps_its_layout() -> None:
    model = tiny_world_model("dreamerv2", "finetune", encoder=Viewing(), sample=False).eval()
    data = batch()
    before = model(data.copy())["feat"]
    torch.testing.assert_close(accelerate(model)(data.copy())["feat"], before)
    accelerate(nn.Sequential(nn.Conv3d(1, 1, 3)))


def test_what_lies_beyond_a_reset_may_be_anything() -> None:
    model = tiny_world_model("dreamerv2", "finetune", sample=False).eval()
    data = batch()
    data["action"][:, 0] = torch.nan  # led to the first frame from nowhere
    for each in (model, accelerate(model)):
        assert each(data.copy())["feat"].isfinite().all()
