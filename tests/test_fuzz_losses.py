"""Odd batches for every loss: a clear error that names what is wrong, or the right numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import nn

from prelar_trl.modules.heads import MLP
from prelar_trl.modules.latent_actions import GaussianActions
from prelar_trl.modules.rssm import RSSM
from prelar_trl.objectives import (
    ActorLoss,
    CriticLoss,
    LambdaTarget,
    LatentActionLoss,
    VideoBonus,
)
from prelar_trl.objectives.behavior import RewardNorm
from tests.fuzz import answer, fuzz, run
from tests.test_objectives import ALL_LATENT, prediction, trajectory
from tests.tiny import batch, tiny

DTYPES = (torch.float32, torch.float64, torch.float16, torch.int64, torch.uint8, torch.bool)
DTYPES += (torch.complex64,)
Made = tuple[nn.Module, TensorDict, set]  # a loss, a batch, and the keys that it reads
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class OfOneEntry(nn.Module):
    """A module that takes a tensor, as one that takes a TensorDict."""

    def __init__(self, module: nn.Module, key: str) -> None:
        super().__init__()
        self.module, self.key = module, key

    def forward(self, tensordict: TensorDict) -> dict[str, torch.Tensor]:
        return {"loss_value": self.module(tensordict[self.key])}


def world_model(method: str, phase: str, **options: Any) -> Made:
    model, loss = tiny(method, phase, **options)
    data = batch(3, 4)
    return loss.train(), data, set(loss.in_keys)


def latent(**weights: float) -> Made:
    dynamics = RSSM(6, 1, stoch=2, classes=3, deter=5, hidden=4)
    loss = LatentActionLoss(dynamics, GaussianActions(size=6), weights=weights, negatives=2)
    return loss, prediction(False), set(loss.in_keys)


def labeled() -> Made:
    weights = {"action_label": 1.0}
    loss = LatentActionLoss(nn.Identity(), GaussianActions(size=6), weights=weights, action_dim=2)
    data = prediction(False)
    data["action"] = torch.rand(*data.shape, 2)
    data["labeled"] = torch.ones(*data.shape, 1, dtype=torch.bool)
    return loss, data, set(loss.in_keys)


def actor(gradient: Any) -> Made:
    loss = ActorLoss(gradient=gradient)
    return loss, trajectory(False), set(loss.in_keys)


def critic() -> Made:
    loss = CriticLoss(MLP(5, 1, 1, 4))
    return loss, trajectory(False), set(loss.in_keys)


def target() -> Made:
    data = trajectory(False).select("feat", "value", "weight")
    data = data.rename_key_("value", "reward").rename_key_("weight", "discount")
    loss = LambdaTarget(MLP(5, 1, 1, 4).requires_grad_(False))
    return loss, data, set(data.keys())


def bonus() -> Made:
    module = VideoBonus(6, k=2, window=2, projection_dim=4, memory_size=20)
    data = TensorDict({"embed": torch.rand(3, 4, 6)}, [3, 4])
    return OfOneEntry(module, "embed"), data, {"embed"}


def norm() -> Made:
    module = RewardNorm(0.9)
    data = TensorDict({"reward": torch.rand(3, 4, 1)}, [3, 4])
    return OfOneEntry(module, "reward"), data, {"reward"}


LOSSES: dict[str, Callable[[], Made]] = {
    "prelar pretrain": lambda: world_model("prelar", "pretrain"),
    "prelar finetune": lambda: world_model("prelar", "finetune"),
    "apv finetune": lambda: world_model("apv", "finetune"),
    "contextwm pretrain": lambda: world_model("contextwm", "pretrain"),
    "dreamerv2": lambda: world_model(
        "dreamerv2", "finetune", weights={"discount": 1.0}, heads=("reward", "discount")
    ),
    "latent actions": lambda: latent(**ALL_LATENT),
    "labels": labeled,
    "actor": lambda: actor("both"),
    "actor dynamics": lambda: actor("dynamics"),
    "critic": critic,
    "lambda target": target,
    "bonus": bonus,
    "reward norm": norm,
}
ALONE = {"bonus", "reward norm"}  # they read one entry: its batch is the batch


def reshaped(shape: torch.Size, change: tuple[str, int]) -> tuple[int, ...]:
    """Another shape: a dimension of another size, one less or one more."""
    kind, place = change
    sizes = list(shape)
    place %= max(1, len(sizes))
    match kind:
        case "longer":
            sizes[place] += 1
        case "one" | "none":
            sizes[place] = int(kind == "one")
        case "drop":
            del sizes[place]
        case "add":
            sizes.insert(place, 1)
        case "scalar":
            sizes = []
    return tuple(sizes)


KINDS = st.sampled_from(["longer", "one", "none", "drop", "add", "scalar"])
CHANGES = st.one_of(
    st.just(("missing", None)),
    st.tuples(st.just("dtype"), st.sampled_from(DTYPES)),
    st.tuples(st.just("shape"), st.tuples(KINDS, st.integers(0, 4))),
    st.tuples(st.just("value"), st.sampled_from([math.nan, math.inf, -math.inf])),
    st.just(("device", "meta")),
    st.just(("object", "a word")),
)


def changed(data: TensorDict, key: Any, kind: str, what: Any) -> tuple[TensorDict, bool]:
    """The batch with one entry changed; whether the result must still be the right one."""
    td, x = TensorDict(dict(data.items())), data[key]
    match kind:
        case "missing":
            return td.exclude(key), False
        case "dtype":
            both = what in FLOATS and x.dtype in FLOATS
            return td.set(key, x.to(what)), both or what == x.dtype
        case "shape":
            shape = reshaped(x.shape, what)
            if shape == x.shape:
                return td, True
            return td.set(key, torch.ones(shape, dtype=x.dtype)), False
        case "value":
            if x.is_floating_point():
                return td.set(key, torch.full_like(x, what)), False
            return td, True
        case "device":
            return td.set(key, x.to(what)), False
    return td.set(key, what), False


def numbers(out: TensorDict) -> list[torch.Tensor]:
    """What is trained with, and what a target is."""
    keys = [key for key in out.keys() if key.startswith("loss_") or key == "value_target"]
    return [out[key].double() for key in keys]


@pytest.mark.parametrize("name", LOSSES)
@fuzz(24)
def test_odd_batches(name: str, budget: Any) -> None:
    torch.manual_seed(0)
    loss, data, reads = LOSSES[name]()
    state = {key: x.clone() for key, x in loss.state_dict().items()}

    def called(td: TensorDict) -> Any:
        loss.load_state_dict(state)  # statistics, and what is remembered
        torch.manual_seed(1)
        return loss(td)

    expected = numbers(called(data.clone()))
    assert all(x.isfinite().all() for x in expected)

    @given(st.sampled_from(sorted(reads, key=str)), CHANGES)
    def check(key: Any, change: tuple[str, Any]) -> None:
        td, right = changed(data, key, *change)
        got = answer(lambda: called(td), names=(key, "action" if key == "latent_action" else key))
        if got is None:
            assert change[0] != "value", "NaN and infinity are seen in the loss"
            return
        found = numbers(got)
        if right:
            for x, y in zip(found, expected, strict=True):
                torch.testing.assert_close(x, y, rtol=0.05, atol=0.05)
        elif change[0] == "value":
            assert not all(x.isfinite().all() for x in found), f"{key} {change} is not seen"
        else:
            assert name in ALONE and change[0] == "shape", f"{key} {change} was taken"

    run(budget, check)


@pytest.mark.parametrize("name", LOSSES)
def test_batches_without_sequences_or_steps(name: str) -> None:
    loss, data, _ = LOSSES[name]()
    for sequences, steps in ((0, None), (None, 0), (1, None), (None, 1), (None, 2)):
        got = answer(lambda part=data[:sequences, :steps]: loss(part))
        if got is not None:
            assert 0 not in (sequences, steps)
            assert all(x.isfinite().all() and x.numel() for x in numbers(got))
