"""The world-model loss and the video bonus."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from prelar_trl.models import make_world_model_loss
from prelar_trl.objectives import RSSMWorldModelLoss, VideoBonus, functional, total_loss
from tests.tiny import ACTION_DIM, PHASES, batch, same, seeded, tiny, tiny_agent, tiny_world_model

S, K = 2, 3


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


def test_true_actions_of_a_few_clips_are_keys_of_the_whole_loss() -> None:
    model = tiny_world_model("prelar", "pretrain")
    loss = make_world_model_loss(
        "prelar", "pretrain", model, weights={"action_label": 1.0}, action_dim=ACTION_DIM
    )
    data = batch(labeled=torch.ones(2, 4, 1, dtype=torch.bool))
    assert "loss_action_label" in loss(data.select(*loss.in_keys)).keys()


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


def test_float_frames_are_refused_whoever_predicts() -> None:
    _, loss = tiny("dreamerv2", "finetune", weights={"image": 1.0})
    data = loss.world_model(batch())
    loss.world_model = TensorDictModule(nn.Identity(), ["pixels"], ["pixels"])
    assert loss(data)["image"].isfinite()
    with pytest.raises(TypeError, match="pixels have dtype torch.float32; store frames as uint8"):
        loss(data.update({"pixels": data["pixels"].float()}))


@pytest.mark.parametrize("key", ["is_first", "terminated", "reward"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32, torch.bool])
def test_flags_must_be_bool_and_the_reward_a_float(key: str, dtype: torch.dtype) -> None:
    weights = {"image": 1.0, "reward": 1.0, "discount": 1.0}
    _, loss = tiny("dreamerv2", "finetune", weights=weights, heads=("reward", "discount"))
    data = batch()
    data[key] = data[key].to(dtype)
    if dtype == (torch.float32 if key == "reward" else torch.bool):
        assert total_loss(loss(data)).isfinite()
        return
    with pytest.raises(TypeError, match=rf"{key} is {str(dtype)[6:]} \[2, 4, 1\]; it must be"):
        loss(data)


def test_rewards_of_another_shape_and_empty_batches_are_refused() -> None:
    _, loss = tiny("dreamerv2", "finetune", weights={"image": 1.0, "reward": 1.0})
    data = batch()
    for shape in ((2, 4), (2, 4, 2)):
        data["reward"] = torch.zeros(shape)
        with pytest.raises(ValueError, match=r"reward is float32 \[2, 4.*must be \[2, 4, 1\]"):
            loss(data)
    with pytest.raises(ValueError, match="pixels is .* not empty"):
        loss(batch()[:0])


def test_world_model_loss_is_its_formula() -> None:
    weights = {"discount": 3.0, "kl": 0.5}
    options = {"heads": ("reward", "discount"), "sample": False}
    agent, loss = tiny("dreamerv2", "finetune", weights, **options)
    data = batch()
    data["terminated"][0, 3] = True
    out, predicted = loss(data), agent.world_model(data.copy())
    prediction, images = predicted["prediction"], data["pixels"] / 255 - 0.5
    alive = 0.99 * (1 - data["terminated"].float())
    expected = {
        "image": (prediction["pixels"] - images).square().sum((2, 3, 4)).mean() / 2,
        "reward": (prediction["reward"] - data["reward"]).square().mean() / 2,
        "discount": nn.functional.binary_cross_entropy_with_logits(prediction["discount"], alive),
        "kl": functional.categorical_kl(predicted["posterior"], predicted["prior"]).mean(),
    }
    for name, value in expected.items():
        torch.testing.assert_close(out[name], value.detach(), rtol=1e-4, atol=1e-6)
    total = sum(weights.get(name, 1.0) * value for name, value in expected.items())
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


@pytest.mark.parametrize(
    ("method", "options", "key"),
    [
        ("prelar", {}, "embed"),
        ("apv", {}, ("lower", "feat")),
        ("naive", {"bonus_embed": "feat"}, "feat"),
        ("apv", {"bonus_embed": "embed"}, "embed"),
    ],
)
def test_the_bonus_reads_the_embedding_of_its_method(method: str, options: dict, key) -> None:
    _, loss = tiny(method, "finetune", **options)
    assert loss.tensor_keys.bonus_embed == key
    assert loss(batch())["bonus"].isfinite()


def test_world_model_loss_works_on_any_module_with_matching_keys() -> None:
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3))

        def forward(self, frames: Tensor) -> tuple[Tensor, ...]:
            statistics = torch.randn(*frames.shape[:2], S, K)
            image, q, p = self.weight
            return image * (frames / 255), q * statistics, p * statistics, statistics, frames

    names = ("prediction", "posterior", "prior", "stoch", "deter")
    keys = {name: ("out", "my", name) for name in names}
    written = [(*keys["prediction"], "pixels"), *list(keys.values())[1:]]
    module = TensorDictModule(Linear(), [("in", "frames")], written)
    loss = RSSMWorldModelLoss(module)
    loss.set_keys(pixels=("in", "frames"), **keys)
    assert loss.in_keys == [("in", "frames")]
    frames = torch.randint(0, 256, (2, 3, 3, 8, 8), dtype=torch.uint8)
    total_loss(loss(TensorDict({"in": {"frames": frames}}, [2, 3]))).backward()
    assert module.module.weight.grad.abs().min() > 0


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


def test_bonus_is_the_neighbor_distance_over_the_running_magnitude() -> None:
    bonus, embed = make_bonus(momentum=0.9).train(), torch.randn(1, 4, 4)
    out = bonus(embed)
    points = (functional.sliding_mean(embed, 2) @ bonus.projection)[0]
    raw = torch.cdist(points, points).sort(1).values[:, :2].mean(1)  # itself and the nearest
    magnitude = 0.9 * 1 + 0.1 * raw.mean()
    assert bonus.magnitude.item() == pytest.approx(magnitude.item(), rel=1e-5)
    torch.testing.assert_close(out, (raw / magnitude)[None])


def test_bonus_in_evaluation_mode_moves_nothing() -> None:
    bonus, embed = make_bonus().eval(), torch.randn(1, 4, 4)
    assert bonus(embed).tolist() == [[0.0] * 3]  # the memory is empty
    bonus.train()(embed)
    before = {key: x.clone() for key, x in bonus.state_dict().items()}
    assert bonus.eval()(torch.randn(1, 4, 4)).isfinite().all()
    for key, value in bonus.state_dict().items():
        assert torch.equal(value, before[key]), key


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


def test_agents_have_a_bonus_where_the_paper_has_one_and_in_prelar_plus() -> None:
    with_bonus = {m for m, p in PHASES if p == "finetune" and tiny_agent(m).video_bonus is not None}
    published = {"apv", "contextwm", "prelar", "prelar_no_cl", "prelar_no_al_cl"}
    assert with_bonus == {*published, "prelar_plus"}


def test_a_clip_over_the_border_of_episodes_counts_for_nothing() -> None:
    """Rows of two episodes teach what the same episodes do in rows of their own."""
    joined, apart = make_bonus(k=3, memory_size=32).train(), make_bonus(k=3, memory_size=32).train()
    apart.load_state_dict(joined.state_dict())
    embed = torch.randn(2, 8, 4)
    is_first = torch.zeros(2, 8, 1, dtype=torch.bool)
    is_first[:, [0, 4]] = True
    for _ in range(2):
        seen = joined(embed, is_first)  # clips of two steps
        expected = apart(embed.reshape(4, 4, 4)).reshape(2, 6)
    assert (seen[:, 3] == 0).all()
    torch.testing.assert_close(seen[:, [0, 1, 2, 4, 5, 6]], expected)
    for name, value in joined.state_dict().items():
        torch.testing.assert_close(value, apart.state_dict()[name], msg=name)
    assert joined.filled == 24


def test_a_bonus_beside_a_model_of_ones_own_needs_no_is_first() -> None:
    _, reference = tiny("apv", "finetune")
    bonus, known = reference.video_bonus, reference.tensor_keys
    whole = reference.world_model(batch(2, 6))
    out = whole.select(known.stoch, known.deter, known.posterior, known.prior, "prediction")
    out["embed"] = torch.randn(2, 6, len(bonus.projection))

    class Recorded(nn.Module):
        in_keys = ("pixels",)
        latent = "categorical"

        def forward(self, data: TensorDict) -> TensorDict:
            return data.update(out.clone())

    loss = RSSMWorldModelLoss(Recorded(), weights={"reward": 1.0}, video_bonus=bonus).eval()
    loss.set_keys(bonus_embed="embed")
    data = batch(2, 6).exclude("is_first")
    once = torch.arange(6).expand(2, 6).unsqueeze(-1) == 0
    torch.testing.assert_close(loss(data), loss(data.copy().set("is_first", once)))


def test_the_reward_beside_a_bonus_is_learned_where_there_is_one() -> None:
    _, loss = tiny("apv", "finetune")
    window = loss.video_bonus.window
    data = batch(2, 2 * window)
    data["is_first"][:, window] = True
    losses = []
    for wrong in (slice(1, window), slice(0, 1), slice(window, window + 1)):
        given = data.copy()
        given["reward"] = data["reward"].clone()
        given["reward"][:, wrong] += 1000
        torch.manual_seed(0)
        losses.append(float(loss.eval()(given)["reward"]))
    assert losses[0] < 1000 < min(losses[1:])
