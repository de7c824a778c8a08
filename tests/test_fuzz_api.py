"""Odd arguments of the library's functions and classes: a clear error, or the right result."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict

from prelar_trl.data import EpisodeReplay, VideoClips, WindowSampler, to_frames
from prelar_trl.modules import distributions as d
from prelar_trl.modules.heads import MLP, Actor
from prelar_trl.modules.rssm import RSSM
from prelar_trl.objectives import functional as F
from prelar_trl.record import statistics
from tests.fuzz import answer, fuzz, run
from tests.test_data_clips import write
from tests.test_replay import steps

DTYPES = (torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool, torch.complex64)
SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 4]), max_size=4).map(tuple)
REALS = st.sampled_from([0, 1, 2, 0.5, -1, -0.5, 3, 1e30, math.nan, math.inf, -math.inf])
NUMBERS = REALS | st.sampled_from([None, "a", True, 2.5, 10**20])


def tensors(count: int) -> st.SearchStrategy[list[torch.Tensor]]:
    """Tensors that often, but not always, have one shape, dtype and device."""

    def make(drawn: tuple[Any, ...]) -> list[torch.Tensor]:
        shape, dtype, device, change = drawn
        made = [torch.ones(shape, dtype=dtype, device=device) for _ in range(count)]
        if change is not None:
            place, other_shape, other_dtype = change
            made[place % count] = torch.ones(other_shape, dtype=other_dtype, device=device)
        return made

    change = st.none() | st.tuples(st.integers(0, 3), SHAPES, st.sampled_from(DTYPES))
    device = st.sampled_from(["cpu", "cpu", "meta"])
    dtype = st.sampled_from(DTYPES[:1] * 4 + DTYPES)
    return st.tuples(SHAPES, dtype, device, change).map(make)


FUNCTIONS: dict[str, tuple[int, Any, Any]] = {  # tensors; call; shape of the result
    "gaussian_nll": (2, lambda x, n: F.gaussian_nll(*x, event_dims=n), None),
    "balanced_kl": (2, lambda x, n: F.balanced_kl(*x, balance=n, free_nats=n), ()),
    "lambda_return": (3, lambda x, n: F.lambda_return(*x, lmbda=n), "same"),
    "action_state_consistency": (
        2,
        lambda x, n: F.action_state_consistency(*x, temperature=n),
        (),
    ),
    "action_contrast": (1, lambda x, n: F.action_contrast(*x, temperature=n), ()),
    "sliding_mean": (1, lambda x, n: F.sliding_mean(*x, window=n), None),
    "knn_distance": (3, lambda x, n: F.knn_distance(x[0], x[1], x[2], k=n), None),
    "categorical_kl": (2, lambda x, n: d.categorical_kl(*x), None),
    "gaussian_kl": (2, lambda x, n: d.gaussian_kl(*x), None),
    "truncated_normal": (3, lambda x, n: d.TruncatedNormal(*x[:2]).log_prob(x[2]), None),
    "one_hot": (2, lambda x, n: d.OneHot(x[0]).log_prob(x[1]), None),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@fuzz(80)
def test_functions_of_tensors(name: str, budget: Any) -> None:
    count, call, shape = FUNCTIONS[name]

    @given(tensors(count), st.sampled_from([0, 1, 2, 0.5]) | NUMBERS)
    def check(x: list[torch.Tensor], number: Any) -> None:
        got = answer(lambda: call(x, number))
        if got is None:
            return
        assert name == "one_hot" or all(t.is_floating_point() for t in x[:2]), "integers were taken"
        if shape is not None:
            assert got.shape == (x[0].shape if shape == "same" else shape)
        if got.device.type == "cpu":
            assert got.isfinite().all()

    run(budget, check)


MODULES = {
    "categorical": (2, lambda n: d.Categorical(*n), lambda m, x: m.rsample(m.params(x))),
    "gaussian": (1, lambda n: d.Gaussian(*n), lambda m, x: m.rsample(m.params(x))),
    "mlp": (4, lambda n: MLP(*n), None),
    "actor": (4, lambda n: Actor(*n), None),
}
SIZES = st.sampled_from([1, 2, 3, 4]) | st.sampled_from([0, -1, 2.5, "a", None, True, math.nan])


@pytest.mark.parametrize("name", MODULES)
@fuzz(60)
def test_sizes_of_modules(name: str, budget: Any) -> None:
    count, make, use = MODULES[name]

    @given(st.lists(SIZES, min_size=count, max_size=count), tensors(1))
    def check(sizes: list[Any], x: list[torch.Tensor]) -> None:
        module = answer(lambda: make(sizes))
        if module is None:
            return
        assert all(type(size) is int and size >= 0 for size in sizes)
        if use is not None and x[0].is_floating_point():
            got = answer(lambda: use(module, x[0]))
            assert got is None or got.shape == (*x[0].shape[:-1], *module.shape)

    run(budget, check)


@fuzz(100)
def test_sequences_of_the_rssm(budget: Any) -> None:
    rssm = RSSM(3, 4, stoch=2, classes=2, deter=4, hidden=4)
    dims = st.sampled_from([1, 2, 2, 2, 3, 0])
    odd = st.sampled_from([3, 3, 3, 2, 4])

    @given(st.tuples(dims, dims, st.sampled_from([4, 4, 3])), st.tuples(dims, dims, odd), SHAPES)
    def check(embed: tuple, action: tuple, first: tuple) -> None:
        for shape in (embed[:2], first):
            is_first = torch.zeros(shape, dtype=torch.bool)
            got = answer(lambda f=is_first: rssm.observe(torch.ones(embed), torch.ones(action), f))
            right = embed[:2] == action[:2] == shape and embed[2] == 4 and action[2] <= 3
            assert (got is not None) == (right and math.prod(shape) > 0)
        answer(lambda: rssm.imagine(torch.ones(action), rssm.initial_state(embed[0])))

    run(budget, check)


TABLES = st.lists(st.lists(REALS, min_size=1, max_size=3), max_size=4) | st.lists(REALS, max_size=5)
OPTIONS = {"samples": 20, "confidence": 0.9}
STATISTICS = {
    "iqm": lambda x, y, n: statistics.interquartile_mean(x),
    "interval": lambda x, y, n: statistics.bootstrap_interval(x, samples=20, confidence=n),
    "samples": lambda x, y, n: statistics.bootstrap_interval(x, samples=n),
    "curve": lambda x, y, n: statistics.aggregate_curve(x, statistic=n),
    "ratio": lambda x, y, n: statistics.ratio_of_means(x, y, **OPTIONS),
    "improvement": lambda x, y, n: statistics.probability_of_improvement(x, y, **OPTIONS),
    "steps": lambda x, y, n: statistics.steps_to_threshold(x, y, 0.5, confirm=n),
    "profile": lambda x, y, n: statistics.performance_profile(x, y, **OPTIONS),
    "wilson": lambda x, y, n: statistics.wilson_interval(1, n, 0.9),
    "confidence": lambda x, y, n: statistics.wilson_interval(1, 2, n),
}


@pytest.mark.parametrize("name", STATISTICS)
@fuzz(60)
def test_statistics(name: str, budget: Any) -> None:
    few = st.sampled_from([0.5, 0.9, 1, 2, 3, 20, "mean", "iqm", "median"]) | NUMBERS
    few = few.filter(lambda n: name != "samples" or n != 10**20)  # of the memory

    @given(TABLES, TABLES, few)
    def check(x: list[Any], y: list[Any], number: Any) -> None:
        with np.errstate(all="ignore"):
            got = answer(lambda: STATISTICS[name](x, y, number))
        if got is not None and name != "curve":
            assert all(np.isfinite(value).all() for value in np.atleast_1d(got)), got

    run(budget, check)


@fuzz(150)
def test_window_samplers(budget: Any) -> None:
    whole = st.sampled_from([1, 2, 3, 4]) | st.sampled_from([0, -1, 2.5, None, "a", True, 10**20])
    strategy = st.sampled_from(["episodes", "frames", "epoch", "prioritize_ends", "x", None])
    options = st.fixed_dictionaries(
        {}, optional={k: whole for k in ("seed", "min_length", "world_size", "rank")}
    )
    lengths = st.lists(st.sampled_from([0, 1, 3, 5, 9, -1]), max_size=4)

    @given(whole, strategy, options, lengths, whole, st.sampled_from(DTYPES[:3] + DTYPES[2:3] * 4))
    def check(length, strategy, options, lengths, rows, dtype) -> None:
        sampler = answer(lambda: WindowSampler(length, strategy=strategy, **options))
        if sampler is None:
            return
        episodes = torch.tensor(lengths, dtype=dtype)

        def draw() -> Any:
            starts = episodes.cumsum(0) - episodes
            sampler.set_episodes(episodes, starts=starts)
            if not sampler.num_eligible:
                with pytest.raises(RuntimeError, match="no episode has"):
                    sampler.draw(1)
                return None
            return sampler.sample(None, None if rows is None else rows * length)[0]

        index = answer(draw)
        if index is not None:
            assert len(index) == rows * length and 0 <= index.min() <= index.max() < sum(lengths)

    run(budget, check)


@fuzz(80)
def test_video_clips(budget: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = write(tmp_path_factory.mktemp("clips") / "s")
    odd = st.sampled_from([0, -1, math.nan, math.inf, 2.5, "a", None, 10**20])
    values: dict[str, Any] = {
        "clip_len": st.sampled_from([1, 2, 4, 7, 99]) | odd,
        "batch_size": st.sampled_from([1, 3]) | odd.filter(lambda x: x != 10**20),
        "seed": st.sampled_from([0, 7, 2**40]),
        "split": st.sampled_from(["all", "train", "heldout", "x", None]),
        "heldout": st.sampled_from([0.1, 0.5, 1, 0, -1, math.nan, math.inf]),
        "strategy": st.sampled_from(["episodes", "frames", "epoch", "x"]),
        "streams": st.sampled_from([("pixels",), (), "pixels", ("x",), ("pixels", "pixels")]),
        "labels": st.sampled_from([0.5, 1, 2, 0]) | REALS,
        "prefetch": st.sampled_from([0, 0, 1, -1, 1.5]),
    }
    weights = st.sampled_from([1, 2.0]) | REALS

    @given(st.fixed_dictionaries({}, optional=values), st.none() | weights)
    def check(options: dict[str, Any], weight: float | None) -> None:
        def sample() -> TensorDict:
            clips = VideoClips(path if weight is None else {path: weight}, **options)
            return clips.sample()

        batch = answer(sample)
        if batch is not None:
            assert batch.shape == (options.get("batch_size", 16), options.get("clip_len", 25))
            time = batch["pixels"][..., 0, 0, 0].long().diff()
            assert (time == 1).all()

    run(budget, check)


KEYS = ("pixels", "action", ("next", "pixels"), ("next", "reward"), ("next", "done"))
KEYS += (("next", "terminated"), "vector", ("next", "vector"), "is_first")
CHANGES = st.lists(
    st.tuples(st.sampled_from(KEYS), SHAPES | st.none(), st.sampled_from(DTYPES)), max_size=2
)


def changed(changes: list[Any]) -> TensorDict:
    """Five steps; some entries are missing, or have another shape or dtype."""
    data = steps(5, base=3)
    for key, shape, dtype in changes:
        if shape is None:
            data = data.exclude(key)
        else:
            data[key] = torch.ones((5, *shape), dtype=dtype)
    return data


@fuzz(150)
def test_steps_become_frames(budget: Any) -> None:
    @given(CHANGES)
    def check(changes: list[Any]) -> None:
        frames = answer(lambda: to_frames(changed(changes)))
        if frames is not None:
            assert frames.shape == (6,)
            shapes = [frames[key].shape for key in ("reward", "is_first", "terminated")]
            assert shapes == [(6, 1)] * 3 and frames["reward"].is_floating_point()

    run(budget, check)


@fuzz(60)
def test_steps_enter_the_replay(budget: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    @given(CHANGES)
    def check(changes: list[Any]) -> None:
        path = tmp_path_factory.mktemp("replay")
        replay = EpisodeReplay(path / "r", window=4, batch_size=2, capacity=60)
        if answer(lambda: replay.extend(changed(changes))) is None:
            assert replay.num_frames == 0
        elif replay.num_eligible:
            batch = replay.sample()
            assert batch["reward"].shape == (2, 4, 1) and batch["action"].dim() == 3
        replay.close()

    run(budget, check)
