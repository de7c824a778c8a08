"""RoboDesk, gymnasium-robotics and Meta-world's moved camera. Optional packages are skipped."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from torchrl.envs.utils import check_env_specs

from prelar_trl.envs import make_env

robodesk = pytest.mark.skipif(
    importlib.util.find_spec("robodesk") is None, reason="robodesk is not installed"
)
robotics = pytest.mark.skipif(
    importlib.util.find_spec("gymnasium_robotics") is None,
    reason="gymnasium-robotics is not installed",
)


@pytest.mark.parametrize(
    ("name", "package", "module"),
    [
        ("robodesk/open_slide", "robodesk", "robodesk"),
        ("robotics/FetchReach-v4", "gymnasium-robotics", "gymnasium_robotics"),
    ],
)
def test_a_missing_package_is_named(name, package, module, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda x, *a: None if x == module else real(x, *a)
    )
    with pytest.raises(ImportError, match=f"{name} needs {package}: pip install 'prelar_trl"):
        make_env(name)


@robodesk
def test_robodesk_gives_the_projects_keys():
    env = make_env("robodesk/open_slide", vectors=["*_robot", "end_effector"], max_steps=3)
    check_env_specs(env)
    rollout = env.rollout(3)
    assert rollout["pixels"].shape == (3, 3, 64, 64)
    assert rollout["pixels"].float().std() > 20
    assert rollout["vector"].shape == (3, 21) and rollout["action"].shape == (3, 5)
    assert rollout["next", "success"].dtype == torch.bool
    assert (rollout["next", "reward"] >= 0).all() and rollout["next", "reward"].max() <= 1


@robodesk
def test_robodesk_starts_follow_the_seed_and_leave_numpys_state_alone():
    def starts(seed):
        env = make_env("robodesk/push-green", seed=seed, pixels=None)
        return torch.stack([env.reset()["state"] for _ in range(2)])

    np.random.seed(3)  # noqa: NPY002
    expected = np.random.RandomState(3).rand()
    first = starts(1)
    assert np.random.rand() == expected  # noqa: NPY002
    assert torch.equal(first, starts(1)) and not torch.equal(first, starts(2))
    assert not torch.equal(first[0], first[1])


@robodesk
def test_robodesk_is_seen_as_the_package_draws_it(monkeypatch):
    from PIL import Image

    monkeypatch.setattr(Image, "ANTIALIAS", Image.LANCZOS, raising=False)
    for size in (64, 96):
        env = make_env("robodesk/open_slide", render_quality="full", pixels=size)
        ours = env.reset()["pixels"].float()
        sim = env.base_env._env.unwrapped.sim
        sim.image_size = size
        theirs = torch.from_numpy(sim.render().copy()).permute(2, 0, 1).float()
        # Another filter makes the smaller picture: edges differ, not where they lie.
        coarse = [torch.nn.functional.avg_pool2d(x, 4) for x in (ours, theirs, theirs.roll(4, 1))]
        assert (coarse[0] - coarse[1]).abs().mean() < (coarse[0] - coarse[2]).abs().mean() / 3


@robodesk
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("robodesk/open_slid", {}, "'open_slid'; the nearest are open_slide"),
        ("robodesk/open_slide", {"reward": "none"}, "reward='none' is unknown; choose dense"),
        ("robodesk/open_slide", {"camera": "top"}, "robodesk has one view, got cameras top"),
    ],
)
def test_what_robodesk_does_not_have(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_env(name, pixels=None, **options)


@robotics
def test_gymnasium_robotics_shows_the_goal_of_this_episode():
    env = make_env("robotics/FetchReach-v4", camera="external_camera_0", max_steps=3)
    check_env_specs(env)
    env.set_seed(0)
    start = env.reset()
    assert start["state"].shape == (16,) and start["pixels"].float().std() > 10
    simulation = env.base_env._env.unwrapped
    site = simulation.model.site("target0")
    shown = simulation.data.site("target0").xpos
    assert np.allclose(shown, simulation.goal, atol=1e-3), (shown, simulation.goal, site.pos)
    assert make_env("robotics/FetchReach-v4", vectors=["*_goal"], pixels=None).reset()[
        "vector"
    ].shape == (6,)


def test_corner2_is_moved_where_the_papers_have_it():
    near = make_env("metaworld/drawer-open", camera="corner2_near", seed=1)
    far = make_env("metaworld/drawer-open", camera="corner2", seed=1)
    pictures = [env.reset()["pixels"].float() for env in (near, far)]
    assert (pictures[0] - pictures[1]).abs().mean() > 5
    model = near.base_env._env.unwrapped.sim.model
    assert model.camera("corner2").pos.tolist() == [0.75, 0.075, 0.7]
    data = near.base_env._env.unwrapped.sim.data
    assert np.allclose(data.camera("corner2").xpos, [0.75, 0.075, 0.7])
    for env in (near, far):
        env.close()
    with pytest.raises(ValueError, match="corner2_near is corner2 elsewhere"):
        make_env("metaworld/drawer-open", cameras=["corner2", "corner2_near"])


def test_metaworld_from_two_cameras_and_what_the_robot_feels():
    env = make_env(
        "metaworld/reach", cameras=["corner", "gripperPOV"], vectors=["proprio"], max_steps=2
    )
    check_env_specs(env)
    start = env.reset()
    assert start["pixels"].shape == (6, 64, 64)
    assert torch.equal(start["vector"], start["state"][:4])
    alone = make_env("metaworld/reach", camera="corner", max_steps=2)
    assert torch.equal(alone.reset()["pixels"], make_env("metaworld/reach").reset()["pixels"])
    env.close()
    alone.close()
