"""Meta-world tasks: pictures, seeds, limits, success."""

from __future__ import annotations

import pytest
import torch
from metaworld.policies import ENV_POLICY_MAP
from torchrl.envs.utils import check_env_specs

from prelar_trl.envs import make_env, metaworld_tasks
from tests.test_envs import assert_keys


def expert(task: str):
    policy = ENV_POLICY_MAP[f"{task}-v3"]()

    def act(tensordict):
        action = torch.as_tensor(policy.get_action(tensordict["state"].double().numpy()))
        return tensordict.set("action", action.float().clamp(-1, 1))

    return act


def test_metaworld_passes_check_env_specs_and_gives_the_promised_keys():
    env = make_env("metaworld/drawer-open")
    check_env_specs(env)
    assert_keys(env)
    start = env.reset()
    assert start["state"].dtype == torch.float32 and start["state"].shape == (39,)
    assert env.rand_step(start)["next", "reward"].item() > 0
    env.close()


@pytest.mark.parametrize("name", ["drawer_open", "drawer-open-v3"])
def test_a_task_has_the_names_of_other_packages_too(name):
    starts = [
        make_env(f"metaworld/{x}", pixels=None, seed=0).reset() for x in (name, "drawer-open")
    ]
    assert torch.equal(starts[0]["state"], starts[1]["state"])


def test_all_fifty_tasks_step():
    tasks = metaworld_tasks()
    assert len(tasks) == 50
    for task in tasks:
        env = make_env(f"metaworld/{task}", pixels=None)
        start = env.reset()
        assert start["state"][36:].any(), f"{task}: the goal is hidden"
        step = env.rand_step(start)["next"]
        assert torch.equal(step["state"][36:], start["state"][36:]), task
        assert step["reward"].isfinite() and step["state"].isfinite().all()
        # What the first observation says holds: one step moves nothing far.
        assert (step["state"][:18] - start["state"][:18]).abs().max() < 0.1, task
        env.close()


def test_unknown_task_and_camera_name_the_alternatives():
    with pytest.raises(ValueError, match="'drawr-open'; the nearest are drawer-open") as error:
        make_env("metaworld/drawr-open")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="'side'.*corner2.*gripperPOV"):
        make_env("metaworld/reach", camera="side")
    with pytest.raises(ValueError, match="render_quality='best' is unknown; choose fast or full"):
        make_env("metaworld/reach", render_quality="best")


def test_interleaved_environments_draw_what_each_draws_alone():
    specs = [("drawer-open", 0), ("reach", 1), ("dial-turn", 2)]
    actions = [torch.full((4,), value) for value in (0.5, -0.5, 1.0)]

    def frames(env):
        state = env.reset()
        for action in actions:
            step, state = env.step_and_maybe_reset(state.set("action", action))
            yield step["next", "pixels"]

    def make():
        return [make_env(f"metaworld/{task}", seed=seed) for task, seed in specs]

    alone = []
    for env in make():
        alone.append(list(frames(env)))
        env.close()
    envs = make()
    playing = [frames(env) for env in envs]
    together = [[next(each) for each in playing] for _ in range(2)]
    envs[0].close()  # must not disturb the others
    last = [next(each) for each in playing[1:]]
    for number, expected in enumerate(alone):
        got = [row[number] for row in together] + ([last[number - 1]] if number else [])
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=False))
    assert not torch.equal(alone[0][0], alone[1][0])
    for env in envs[1:]:
        env.close()


@pytest.mark.parametrize("camera", ["corner", "corner2", "corner3", "corner4"])
def test_picture_is_upright(camera):
    """Raising the gripper raises its red arm in the picture."""
    env = make_env("metaworld/reach", camera=camera, action_repeat=25)

    def arm_row(direction: float) -> float:
        action = torch.tensor([0.0, 0.0, direction, 0.0])
        red, green, blue = env.step(env.reset().set("action", action))["next", "pixels"].float()
        red_mask = (red > 2.5 * green) & (red > 2.5 * blue) & (red > 60)
        return torch.nonzero(red_mask)[:, 0].float().mean().item()

    assert arm_row(1.0) < arm_row(-1.0) - 1.0  # row 0 is the top
    env.close()


def test_objects_are_placed_anew_at_each_reset_from_the_seed():
    def episodes(seed: int) -> torch.Tensor:
        env = make_env("metaworld/drawer-open", seed=seed)
        starts = [env.reset() for _ in range(3)]
        env.close()
        return torch.stack([torch.cat([s["state"], s["pixels"].flatten()]) for s in starts])

    first, again, other = episodes(3), episodes(3), episodes(4)
    assert torch.equal(first, again)
    assert not torch.equal(first[:, :39], other[:, :39])
    assert not torch.equal(first[0, :39], first[1, :39])
    assert not torch.equal(first[0, 39:], first[1, 39:])


def test_an_environment_seeded_again_repeats_its_episodes_to_the_last_bit():
    env = make_env("metaworld/drawer-open", seed=1, max_steps=10)
    torch.manual_seed(0)
    actions = torch.rand(20, 4) * 2 - 1

    def play():
        moves = iter(actions)
        return env.rollout(20, lambda td: td.set("action", next(moves)), break_when_any_done=False)

    fresh = play()
    env.rollout(7)  # another episode, broken off
    env.set_seed(1)
    again = play()
    for key in ("pixels", "state", ("next", "reward"), ("next", "pixels")):
        assert torch.equal(fresh[key], again[key]), key
    env.close()


def test_first_observation_and_picture_show_the_episode_that_is_played():
    env = make_env("metaworld/window-close")
    for _ in range(3):
        start = env.reset()
        step = env.step(start.set("action", torch.zeros(4)))
        assert (step["next", "state"][:18] - start["state"][:18]).abs().max() < 0.01
        change = (step["next", "pixels"].float() - start["pixels"].float()).abs()
        assert change.mean() < 1.0
    env.close()


def test_step_500_is_truncated_not_terminated():
    env = make_env("metaworld/reach", pixels=None)
    rollout = env.rollout(600)
    assert len(rollout) == 500
    assert rollout["next", "truncated"].sum() == 1
    assert rollout["next", "truncated"][-1].item() and not rollout["next", "terminated"].any()
    env.rand_step(env.reset())  # another episode begins
    env.close()


def test_scripted_expert_succeeds():
    env = make_env("metaworld/drawer-open", pixels=None)
    rollout = env.rollout(150, policy=expert("drawer-open"))
    assert not rollout["success"][0].item() and rollout["next", "success"].any()
    env.close()


def test_action_repeat_is_the_same_action_several_times():
    single = make_env("metaworld/reach")
    triple = make_env("metaworld/reach", action_repeat=3)
    action = torch.tensor([1.0, 0.0, -1.0, 0.0])
    state, rewards = single.reset(), []
    for _ in range(3):
        step = single.step(state.set("action", action))
        rewards.append(step["next", "reward"])
        state = single.step_mdp(step)
    once = triple.step(triple.reset().set("action", action))["next"]
    assert torch.equal(once["state"], state["state"])
    assert torch.equal(once["pixels"], state["pixels"])
    assert torch.allclose(once["reward"], torch.stack(rewards).sum(0))
    assert once["step_count"].item() == 1
    assert len(make_env("metaworld/reach", action_repeat=3, pixels=None).rollout(600)) == 167


def test_full_quality_differs_from_fast_but_shows_the_same_scene():
    pictures = []
    for quality in ("fast", "full"):
        env = make_env("metaworld/drawer-open", render_quality=quality)
        pictures.append(env.reset()["pixels"].float())
        env.close()
    difference = (pictures[0] - pictures[1]).abs().mean()
    assert 0.5 < difference < 12
