"""Odd environments, options and actions, and imagination: a clear error, or what is promised."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from torchrl.data import Binary, Bounded, Categorical, OneHot, Unbounded
from torchrl.envs import EnvBase

from prelar_trl.envs import make_env
from prelar_trl.imagination import ImaginationEnv, posterior_states
from tests.fuzz import ODD, answer, fuzz, run
from tests.test_envs_own import BYTES, Gym
from tests.test_imagination import KINDS, model_of
from tests.tiny import batch

PICTURE = spaces.Box(0, 255, (64, 64, 3), np.uint8)
DTYPES = (np.float32, np.float64, np.float16, np.uint8, np.int64)
NAMES = ["a", "p", "pixels", "state", "success", "is_first", "vector", "next", "action", "done"]
NAMES += ["reward", "step_count", "truncated", "belief", "dropped", "_reset"]


def promised(env: EnvBase, size: int | None) -> None:
    """A reset and two steps give what make_env says."""
    rollout = env.rollout(2)
    for part in (rollout, rollout["next"]):
        for key in ("is_first", "success", "done", "terminated"):
            assert part[key].dtype == torch.bool and part[key].shape == (*rollout.shape, 1)
        assert ("pixels" in part.keys()) == (size is not None)
        if size is not None:
            assert part["pixels"].dtype == torch.uint8
            assert part["pixels"].shape == (*rollout.shape, 3, size, size)
        if "state" in part.keys():
            assert part["state"].dtype == torch.float32 and part["state"].dim() == 2
    reward, action = rollout["next", "reward"], rollout["action"]
    assert reward.dtype == torch.float32 and reward.shape == (*rollout.shape, 1)
    assert action.dtype == torch.float32 and action.dim() == 2 and action.abs().max() <= 1


@fuzz(60)
def test_options(budget: Any) -> None:
    few = st.sampled_from([1, 2, 3, None])
    values: dict[str, Any] = {
        **{name: few | ODD for name in ("seed", "pixels", "action_repeat", "max_steps")},
        **{name: ODD for name in ("camera", "cameras", "vectors", "device", "render_quality")},
        **{name: few.map(lambda x: x or 1) | ODD for name in ("worker_timeout", "worker_failures")},
        "num_workers": ODD.filter(lambda x: type(x) is not int or not 1 < x < 1e4),
    }
    names = st.sampled_from(["toy", "toy/shifted", "x", "toy/x", "gym/x", "metaworld", "math:pi"])

    @given(names | ODD, st.fixed_dictionaries({}, optional=values))
    def check(name: Any, options: dict[str, Any]) -> None:
        env = answer(lambda: make_env(name, **options))
        if env is None:
            return
        assert str(name).startswith("toy")
        for key in ("seed", "action_repeat", "max_steps", "worker_failures"):
            assert type(options.get(key)) in (int, type(None))
        promised(env, options.get("pixels", 64))

    run(budget, check)


BOXES = st.tuples(
    st.sampled_from([0, -1, -math.inf]),
    st.sampled_from([1, 255, 0, math.inf]),
    st.sampled_from([(3,), (), (0,), (16, 16), (16, 16, 3), (3, 16, 16), (2, 3), (2, 16, 16, 3)]),
    st.sampled_from(DTYPES),
)


def box(drawn: tuple[Any, ...]) -> spaces.Space:
    low, high, shape, dtype = drawn
    if np.dtype(dtype).kind in "iu":
        low, high = max(low, 0), min(high, 255)
    return spaces.Box(low, high, shape, dtype)


SPACES = BOXES.map(box) | st.sampled_from(
    [spaces.Discrete(3), spaces.Discrete(3, start=1), spaces.MultiBinary(3)]
    + [spaces.MultiDiscrete([2, 3]), spaces.Text(3), spaces.Tuple((PICTURE,)), PICTURE]
    + [spaces.Sequence(spaces.Discrete(2)), spaces.Dict({"b": PICTURE}), spaces.Discrete(1)]
)


@fuzz(60)
def test_spaces(budget: Any) -> None:
    nested = st.dictionaries(st.sampled_from(NAMES), SPACES, max_size=3).map(spaces.Dict)

    @given(SPACES | nested, SPACES, st.sampled_from([None, ["state"], ["a"]]))
    def check(seen: Any, acted: Any, vectors: Any) -> None:
        env = answer(
            lambda: make_env(Gym(seen, actions=acted), pixels=16, vectors=vectors, max_steps=3)
        )
        if env is not None:
            answer(lambda: promised(env, 16))  # a picture may turn out to be none

    run(budget, check)


class Odd(Gym):
    """A gymnasium environment whose step gives one odd thing."""

    def __init__(self, place: int, thing: Any) -> None:
        super().__init__(PICTURE, BYTES)
        self.place, self.thing = place, thing

    def step(self, action):
        found = [*super().step(action)]
        cut = isinstance(self.thing, str) and self.thing == "cut"
        found[self.place :] = [] if cut else [self.thing, *found[self.place + 1 :]]
        return tuple(found)


THINGS = ODD | st.sampled_from(
    [np.array([1.0]), np.array([1.0, 2.0]), np.zeros(0), np.float16(2), 1j, True, "cut"]
    + [{"success": x} for x in (None, True, 0, math.nan, "yes", [True, False], {}, np.zeros(0))]
    + [np.full((64, 64, 3), x) for x in (300, -1, math.nan, 0.5, 7)]
    + [BYTES[:32], BYTES[..., 0], BYTES.transpose(2, 0, 1), BYTES.astype(float), BYTES.tolist()]
)


@fuzz(80)
def test_what_a_step_gives(budget: Any) -> None:
    @given(st.integers(0, 4), THINGS)
    def check(place: int, thing: Any) -> None:
        env = answer(lambda: make_env(Odd(place, thing), pixels=16))
        td = env.reset().set("action", torch.zeros(2))
        step = answer(lambda: env.step(td)["next"], names=("Odd",))
        if step is None:
            return
        if place == 0:
            assert np.array_equal(np.asarray(thing), np.asarray(thing).astype(np.uint8))
            assert np.shape(thing) == (64, 64, 3)
        elif place == 1:
            assert step["reward"].item() == pytest.approx(float(np.asarray(thing).item()))
        elif place in (2, 3):
            key = ("terminated", "truncated")[place - 2]
            assert step[key].item() == bool(np.asarray(thing).item())
        else:
            known = thing.get("success")
            assert step["success"].item() == bool(np.any(known is not None and known))

    run(budget, check)


VALUES = st.sampled_from([0.0, 1.0, -1.0, 0.5, 5.0, math.nan, math.inf])
TYPES = st.sampled_from([torch.float32] * 6 + [torch.float64, torch.int64, torch.bool])
SHAPES = st.sampled_from([(2,), (2,), (2,), (1,), (3,), (2, 2), (), (0,)])


@pytest.mark.parametrize("kind", ["box", "choice"])
@fuzz(80)
def test_actions(kind: str, budget: Any) -> None:
    acted = spaces.Discrete(2) if kind == "choice" else spaces.Box(-3, 5, (2,), np.float32)
    env = make_env(Gym(PICTURE, BYTES, actions=acted), pixels=16)
    start, gym = env.reset(), env.base_env.unwrapped

    @given(SHAPES, TYPES, st.lists(VALUES, min_size=4, max_size=4))
    def check(shape: tuple[int, ...], dtype: torch.dtype, values: list[float]) -> None:
        action = torch.tensor(values)[: math.prod(shape)].reshape(shape).to(dtype)
        td = start.clone().set("action", action)
        step = answer(lambda: env.step(td), names=("action",))
        if step is None:
            return
        got, action = gym.actions[-1], action.double()
        assert action.shape == (2,) and action.isfinite().all()
        if kind == "choice":
            assert sorted(action.tolist()) == [0, 1] and got == action.argmax()
        else:
            assert dtype.is_floating_point and action.abs().max() <= 1
            np.testing.assert_allclose(got, 1 + 4 * action.numpy(), rtol=1e-5)

    run(budget, check)


SPECS = st.sampled_from(
    [None, Bounded(-1, 1, (2,)), Bounded(-1, 1, (1,)), Bounded(-1, 1, (3,)), Bounded(-1, 1, (2, 2))]
    + [Bounded(-1, 1, ()), Bounded(-1, 1, (2,), dtype=torch.int64), OneHot(2), OneHot(3)]
    + [Categorical(2), Unbounded((2,)), Binary(2), "a", 5]
)
STATES = st.sampled_from(["stoch", "deter", "action_history", None, None])
CHANGES = st.sampled_from(["missing", "wide", "flat", "double", "half", "int", "meta", "empty"])


def changed(states: TensorDict, key: str | None, change: str) -> TensorDict:
    """States of which one entry is another one."""
    if key is None or key not in states.keys():
        return states[:0] if change == "empty" else states
    x = states[key]
    td = TensorDict(dict(states.items()), states.batch_size)
    match change:
        case "missing" | "empty":
            return td.exclude(key)
        case "wide":
            return td.set(key, torch.cat([x, x[..., :1]], -1))
        case "flat":
            return td.set(key, x.flatten(1).unsqueeze(-1))
        case "meta":
            return TensorDict({**td.to_dict(), key: x.to("meta")}, td.batch_size)
    types = {"double": torch.float64, "half": torch.float16, "int": torch.int64}
    return td.set(key, x.to(types[change]))


@pytest.mark.parametrize("kind", ["real", "encoded", "window", "latent", "stacked"])
@fuzz(30)
def test_imagination(kind: str, budget: Any) -> None:
    model = model_of(kind)
    assert kind in KINDS
    states = posterior_states(model, batch(2, 3)).reshape(-1)
    sizes = st.sampled_from([(), (), (3,), (2, 2), (0,), (-1,), (2.5,), 3, "a", None])

    @given(SPECS, STATES, CHANGES, sizes, SHAPES, TYPES, st.booleans())
    def check(spec, key, change, size, shape, dtype, draws) -> None:
        starts = changed(states, key, change)
        env = answer(
            lambda: ImaginationEnv(
                model, action_spec=spec, starts=starts if draws else None, batch_size=size
            )
        )
        if env is None:
            return
        assert spec is None or kind != "latent"
        assert not draws or set(env.state_spec.keys()) <= set(starts.keys())
        rollout = env.rollout(2)
        assert rollout.shape == (*size, 2) and rollout["next", "feat"].isfinite().all()
        begun = answer(lambda: env.reset(starts if size == () else None))
        if begun is None:
            assert starts is not states
            return
        td = env.rand_action(begun)
        width = env.action_spec.shape[-1:]
        odd = torch.zeros((*td.batch_size, *shape)).to(dtype)
        step = answer(lambda: env.step(td.set("action", odd)), names=("action",))
        if step is not None:
            assert shape == tuple(width)
            assert step["next", "feat"].isfinite().all()

    run(budget, check)
