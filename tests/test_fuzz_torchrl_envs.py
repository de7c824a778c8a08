"""TorchRL environments, and transforms of a user's own, that give something else than declared."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import Tensor
from torchrl.data import Binary, Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase, Transform, TransformedEnv

from prelar_trl.envs import make_env
from tests.fuzz import answer, fuzz, run
from tests.test_envs_own import Walkers

KEYS = ("pixels", "speed", "gear", "success", "reward", "done", "terminated")
Spoil = Callable[[dict[str, Any]], Any]


class Odd(EnvBase):
    """Observes a picture, two floats and a choice; what one of its methods gives is spoiled."""

    def __init__(self, batch: tuple[int, ...], place: str, spoil: Spoil) -> None:
        super().__init__(batch_size=torch.Size(batch))
        self.place, self.spoil = place, spoil
        self.observation_spec = Composite(
            pixels=Bounded(0, 255, (*batch, 3, 16, 16), dtype=torch.uint8),
            speed=Unbounded((*batch, 2)),
            gear=Categorical(3, (*batch, 1)),
            success=Binary(1, (*batch, 1), dtype=torch.bool),
            shape=batch,
        )
        self.action_spec = Bounded(-1, 1, (*batch, 2), dtype=torch.float32)
        self.reward_spec = Unbounded((*batch, 1))

    def _set_seed(self, seed: int | None) -> None:
        pass

    def _give(self, place: str) -> Any:
        entries = {
            **self.observation_spec.zero(),
            **({"reward": torch.full(self.reward_spec.shape, 0.25)} if place == "step" else {}),
            **self.full_done_spec.zero(),
        }
        found = self.spoil(entries) if place == self.place else entries
        return TensorDict(found, self.batch_size) if type(found) is dict else found

    def _reset(self, tensordict: Any, **kwargs: Any) -> Any:
        return self._give("reset")

    def _step(self, tensordict: Any) -> Any:
        return self._give("step")


class Spoils(Transform):
    """A user's own transform that does the same."""

    def __init__(self, place: str, spoil: Spoil) -> None:
        super().__init__()
        self.place, self.spoil = place, spoil

    def _spoiled(self, td: Any, place: str) -> Any:
        return td if place != self.place else TensorDict(self.spoil(dict(td.items())), td.shape)

    def _step(self, tensordict: Any, next_tensordict: Any) -> Any:
        return self._spoiled(next_tensordict, "step")

    def _reset(self, tensordict: Any, tensordict_reset: Any) -> Any:
        return self._spoiled(tensordict_reset, "reset")


def cast(dtype: torch.dtype) -> Callable[[Tensor], Any]:
    return lambda x: x.to(dtype)


def filled(value: float) -> Callable[[Tensor], Any]:
    return lambda x: torch.full(x.shape, value)


DTYPES = (torch.float64, torch.float16, torch.int64, torch.uint8, torch.bool, torch.complex64)
VALUES = (math.nan, math.inf, -math.inf, 1e30, -1.0, 0.5, 1.0, 2.0, 3.0, 300.0)
CHANGES: dict[str, Callable[[Tensor], Any]] = {
    **{str(dtype): cast(dtype) for dtype in DTYPES},
    **{str(value): filled(value) for value in VALUES},
    "integers": lambda x: torch.full(x.shape, 2),
    "wide": lambda x: torch.cat([x, x], -1),
    "small": lambda x: x[..., :1],
    "flat": lambda x: x.flatten(),
    "deep": lambda x: x.unsqueeze(-1),
    "first": lambda x: x.flatten()[:1],
    "turned": lambda x: x.movedim(-1, 0),
    "empty": lambda x: x[..., :0],
    "none": lambda x: None,
    "word": lambda x: "a word",
    "nested": lambda x: {"a": x},
}


def promised(found: TensorDict, batch: tuple[int, ...], step: bool) -> None:
    """What `make_env` says of a reset or a step."""
    for key in ("is_first", "success", "done", "terminated"):
        assert found[key].dtype == torch.bool and found[key].shape == (*batch, 1)
    assert found["pixels"].dtype == torch.uint8 and found["pixels"].shape == (*batch, 3, 16, 16)
    assert found["vector"].dtype == torch.float32 and found["vector"].shape == (*batch, 3)
    if step:
        assert found["reward"].dtype == torch.float32 and found["reward"].shape == (*batch, 1)
        assert (found["reward"].abs() <= 1e8).all()


def given_by(env: EnvBase, place: str) -> TensorDict:
    """What a reset, or a step, gives."""
    td = env.reset()
    if place == "step":
        td = env.step(td.set("action", torch.zeros(*env.batch_size, 2)))["next"]
    return td


@pytest.mark.parametrize("by", ["environment", "transform"])
@fuzz(50)
def test_an_entry_that_is_not_as_declared(by: str, budget: Any) -> None:
    places = st.sampled_from([(place, key) for place in ("reset", "step") for key in KEYS])

    @given(places, st.sampled_from([*CHANGES, "cut"]), st.sampled_from([(), (2,)]))
    def check(where: tuple[str, str], change: str, batch: tuple[int, ...]) -> None:
        place, key = where
        if key == "reward" and place == "reset":
            return
        if by == "transform" and place == "reset" and key in ("done", "terminated"):
            return  # TorchRL itself looks at those
        given: list[Any] = []

        def spoil(entries: dict[str, Any]) -> dict[str, Any]:
            value = entries.pop(key)
            if change != "cut":
                given[:] = [CHANGES[change](value)]
                entries[key] = given[0]
                lacks = isinstance(given[0], Tensor) and given[0].shape[: len(batch)] != batch
                assume(not lacks)  # no TensorDict takes what lacks the batch
            return entries

        env: EnvBase = Odd(batch, place, spoil if by == "environment" else lambda x: x)
        if by == "transform":
            env = TransformedEnv(env, Spoils(place, spoil))
        made = make_env(env, pixels=16, vectors=["speed", "gear"])
        found = answer(lambda: given_by(made, place), names=("Odd",))
        if found is None:
            return
        promised(found, batch, place == "step")
        if change == "cut":  # TorchRL's rule
            assert key in ("done", "terminated") and not found[key].any()
            return
        assert isinstance(given[0], Tensor) and found[key].numel() == given[0].numel()
        torch.testing.assert_close(
            found[key].flatten().double(), given[0].flatten().double(), equal_nan=True
        )
        assert key != "gear" or found[key].max() < 3
        assert (found["done"] | ~found["terminated"]).all() or by == "transform"
        assert place == "step" or not found["done"].any()

    run(budget, check)


WHOLES = [
    lambda entries: None,
    lambda entries: (entries,),
    lambda entries: entries["pixels"],
    lambda entries: TensorDict(entries, [1]),
    lambda entries: TensorDict({}),
    lambda entries: TensorDict({"all": TensorDict(entries)}),
]


@pytest.mark.parametrize("place", ["reset", "step"])
@pytest.mark.parametrize("whole", range(len(WHOLES)))
def test_what_is_no_tensordict_of_the_environment(whole: int, place: str) -> None:
    def spoil(entries: dict[str, Any]) -> Any:
        if whole == 3:
            entries = {key: x[:1] for key, x in entries.items()}
        return WHOLES[whole](entries)

    env = make_env(Odd((2,), place, spoil), pixels=16)
    assert answer(lambda: given_by(env, place), names=("Odd",)) is None


def test_an_end_needs_what_tells_its_kind() -> None:
    def spoil(entries: dict[str, Any]) -> dict[str, Any]:
        entries["truncated"] = entries.pop("terminated")
        return entries

    env = make_env(Odd((), "step", spoil), pixels=16)
    with pytest.raises(ValueError, match=r"Odd: step\(\): Cannot infer the value of terminated"):
        given_by(env, "step")


class Truncates(Walkers):
    """Declares all kinds of ends; gives ``truncated`` and those of ``others``, which are false."""

    def __init__(self, *others: str) -> None:
        super().__init__(ends=(2, 2))
        end, self.others = Binary(1, (2, 1), dtype=torch.bool), others
        kinds = {key: end.clone() for key in ("done", "terminated", "truncated")}
        self.done_spec = Composite(kinds, shape=(2,))

    def _step(self, tensordict: Any) -> TensorDict:
        found = super()._step(tensordict)
        found.rename_key_("done", "truncated")
        del found["terminated"]
        return found.update({key: torch.zeros(2, 1, dtype=torch.bool) for key in self.others})


@pytest.mark.parametrize("others", [(), ("terminated",)])
def test_an_episode_that_is_only_truncated_ends(others: tuple[str, ...]) -> None:
    rollout = make_env(Truncates(*others)).rollout(5)
    assert rollout["next", "done"][..., 0].tolist() == [[False, True]] * 2
    assert not rollout["next", "terminated"].any()


def test_a_truncated_episode_that_is_not_done_is_refused() -> None:
    env = make_env(Truncates("done", "terminated"))
    with pytest.raises(ValueError, match=r"step\(\) gives truncated=True, but done=False"):
        env.rollout(5)


@pytest.mark.parametrize("repeat", [1, 2])
def test_what_is_as_declared_is_not_touched(repeat: int) -> None:
    env = make_env(Odd((2,), "step", lambda x: x), pixels=16, action_repeat=repeat)
    found = given_by(env, "step")
    assert found["reward"].flatten().tolist() == [0.25 * repeat] * 2


def test_a_success_that_is_nan() -> None:
    class Unsure(Walkers):
        def __init__(self) -> None:
            super().__init__()
            self.observation_spec["success"] = Unbounded((2, 1))

        def _observe(self) -> dict[str, Tensor]:
            return {**super()._observe(), "success": torch.full((2, 1), math.nan)}

    with pytest.raises(ValueError, match="success=NaN, which is no flag"):
        make_env(Unsure()).reset()


@pytest.mark.parametrize("value", [torch.ones(2, 1), torch.full((2, 1), math.nan), "yes"])
def test_a_success_that_is_not_declared_is_none(value: object) -> None:
    class Undeclared(Walkers):
        def _observe(self) -> dict[str, Tensor]:
            return {**super()._observe(), "success": value}

    assert not make_env(Undeclared()).reset()["success"].any()
