"""Suites from outside, and ``env=<module>:<callable>`` on the command line of the recipes."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint

import pytest
import torch

from prelar_trl.data import ClipStore
from prelar_trl.envs import ToyEnv, make_env, register_suite, registry, suites
from prelar_trl.recipes.entry import start
from prelar_trl.recipes.environments import build_env
from tests.test_envs_own import Gym
from tests.toy_runs import FINETUNE_ARGS, checkpoint

MODULE = """
from prelar_trl.envs import ToyEnv

calls = []

def make(seed, pixels=64):
    calls.append((seed, pixels))
    return ToyEnv(pixels, disc=(255, 255, 255))

def needs(size):
    return ToyEnv(size)

def colored(color, seed=0):
    return ToyEnv()

def keyword(*, color):
    return ToyEnv()

class Maze(ToyEnv):
    pass

number = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A user's module in the working directory, which is not on Python's path."""
    (tmp_path / "my_maze.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    yield "my_maze"
    sys.modules.pop("my_maze", None)


@pytest.fixture
def outside(monkeypatch):
    """A registry of this test's own."""
    monkeypatch.setattr(registry, "SUITES", dict(registry.SUITES))


def run(monkeypatch, recipe: str, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [recipe, *arguments])
    start(recipe)


def test_the_three_recipes_take_a_users_function_by_its_name(module, tmp_path, monkeypatch):
    own = ("env=", "size=", "model.depth=", "env_steps=")
    arguments = [a for a in FINETUNE_ARGS if not a.startswith(own)] + ["env_steps=30"]
    arguments += ["method=dreamerv2", "size=mini", "model.depth=2"]
    run(monkeypatch, "finetune", "env=my_maze:make", "run=fine", *arguments)
    calls = sys.modules[module].calls
    assert (0, 64) in calls and (10_000, 64) in calls  # training, evaluation
    assert checkpoint(tmp_path / "fine")["action_dim"] == 2
    arguments = ("run=fine", "episodes=1", "device=cpu", "seed=3")
    with pytest.raises(SystemExit, match="add trust_code=true"):
        run(monkeypatch, "evaluate", *arguments)
    run(monkeypatch, "evaluate", *arguments, "trust_code=true")
    assert calls[-1] == (3, 64)
    run(monkeypatch, "collect_videos", "env=my_maze:make", "data=clips", "episodes=1", "pixels=16")
    store = ClipStore(tmp_path / "clips")
    assert store.size == (16, 16)
    assert store.read(0).max() == 255  # the disc of that function is white


def test_a_class_is_a_function_too(module):
    options = {"seed": 1, "num_workers": 1, "max_steps": 3}
    env = build_env(make_env, "my_maze:Maze", **options)
    assert len(env.rollout(9)) == 3
    assert make_env("tests.test_envs_own:Gym", max_steps=4).rollout(9).shape == (4,)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_maze:absent", "env=my_maze:absent cannot be imported: .*no attribute 'absent'"),
        ("nowhere:make", "env=nowhere:make cannot be imported: No module named 'nowhere'"),
        ("my_maze:number", "env=my_maze:number is int, not a function or class"),
        ("my_maze:keyword", "env=my_maze:keyword: the function asks for color; it can get .*seed"),
    ],
)
def test_what_cannot_be_called_is_said_in_one_line(module, name, message):
    with pytest.raises(ValueError, match=message) as error:
        build_env(make_env, name, seed=0, num_workers=1)
    assert "\n" not in str(error.value)


def test_a_suite_from_outside(outside):
    @register_suite("mazes", max_steps=7)
    def make_maze(task, *, pixels, cameras, render_quality, walls=0):
        return {"torchrl": ToyEnv(pixels), "gym": Gym(), "walls": ToyEnv(pixels)}[task]

    assert "mazes" in suites()
    assert make_env("mazes/torchrl", pixels=16).rollout(9)["pixels"].shape == (7, 3, 16, 16)
    rollout = make_env("mazes/gym", max_steps=5, seed=3).rollout(9)
    assert rollout["pixels"].shape == (5, 3, 64, 64)
    assert rollout["is_first"].flatten().tolist() == [True] + 4 * [False]
    assert make_env("mazes/walls", walls=3).reset()["success"].dtype == torch.bool
    with pytest.raises(ValueError, match="unknown environment 'mazes'; write .*mazes/<task>"):
        make_env("mazes")


def test_a_suite_of_an_installed_package(outside, monkeypatch):
    offered = EntryPoint("boxes", "tests.test_envs_registry:make_box", registry.ENTRY_POINTS)
    monkeypatch.setattr(registry, "entry_points", lambda group: [offered])
    assert make_env("boxes/any", pixels=8).reset()["pixels"].shape == (3, 8, 8)


def make_box(task, *, pixels, cameras, render_quality):
    return ToyEnv(pixels)


def test_a_suites_name_is_taken_once(outside):
    def make(task, **view):
        return ToyEnv()

    register_suite("mazes")(make)
    register_suite("mazes")(make)  # a module that is imported again
    with pytest.raises(ValueError, match="'mazes' is .*make: take another name"):
        register_suite("mazes")(lambda task, **view: ToyEnv())
    with pytest.raises(ValueError, match="'toy' is prelar_trl.envs.toy:make_toy"):
        register_suite("toy")(make)
