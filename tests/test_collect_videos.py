from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchrl.envs import EnvBase

from prelar_trl.data import StoreError, VideoClips
from prelar_trl.envs import make_env
from prelar_trl.recipes.collect_videos import (
    collect,
    draw_sheet,
    env_names,
    episode_stream,
    summary,
)
from prelar_trl.recipes.schema import CollectVideosConfig
from tests.files import contents

TOY = {"env": "toy", "episodes": 5, "pixels": 16, "max_steps": 12, "after_success": None}


def config(path: Path, **overrides) -> CollectVideosConfig:
    return CollectVideosConfig(data=str(path), **overrides)


def test_the_toy_env_fills_a_store_with_its_expert(tmp_path) -> None:
    store = collect(config(tmp_path / "s", **TOY, noise=0.0))
    assert len(store) == 5 and store.size == (16, 16)
    assert store.frames.tolist() == [13] * 5  # 12 steps
    assert all(info == {"success": True, "expert": True} for info in store.infos)
    actions = store.read(0, "actions")
    assert actions.shape == (13, 2) and not actions[0].any() and actions[1:].any()
    assert "expert success 5/5 = 1.00" in summary(store)
    batch = VideoClips(store.path, clip_len=6, batch_size=4).sample()
    assert set(batch.keys()) == {"pixels", "is_first"}


def test_the_toy_in_another_look_has_the_same_expert(tmp_path) -> None:
    plain = collect(config(tmp_path / "plain", **TOY))
    shifted = collect(config(tmp_path / "shifted", **TOY | {"env": "toy/shifted"}))
    assert set(shifted.labels) == {"toy/shifted"}
    assert summary(plain) == summary(shifted)
    for clip in range(len(plain)):
        assert (plain.read(clip, "actions") == shifted.read(clip, "actions")).all()
        assert (plain.read(clip) != shifted.read(clip)).mean() > 0.9


def test_actions_are_those_that_led_to_the_frames(tmp_path) -> None:
    """Noise-free, the expert moves the red disc along its action: right is right, up is up."""
    store = collect(config(tmp_path / "s", **TOY | {"pixels": 64}, noise=0.0))
    for clip in range(len(store)):
        red = store.read(clip)[:, 0].astype(int) - store.read(clip)[:, 1] > 120  # [T, H, W]
        columns = (red * np.arange(64)).sum((1, 2)) / red.sum((1, 2))
        moved = np.diff(columns)
        action = store.read(clip, "actions")[1:, 0]
        fast = np.abs(action) > 0.3
        assert (np.sign(moved[fast]) == np.sign(action[fast])).all()
        assert (np.abs(moved[action == 0]) < 0.5).all()


def test_frames_lie_as_far_apart_as_those_of_fine_tuning_with_the_same_action_repeat(tmp_path):
    settings = {**TOY, "episodes": 2, "noise": 0.0}
    once = collect(config(tmp_path / "once", **settings))
    twice = collect(config(tmp_path / "twice", **settings, action_repeat=2))
    first = slice(0, 2)
    assert (once.read(0)[0] == twice.read(0)[0]).all()
    assert (once.read(0, "actions")[first] == twice.read(0, "actions")[first]).all()
    moved = [np.abs(x.read(0)[1].astype(int) - x.read(0)[0]).sum() for x in (once, twice)]
    assert moved[1] > 1.3 * moved[0]


def test_interrupted_continued_and_parallel_collecting_give_the_same_store(tmp_path) -> None:
    whole = contents(collect(config(tmp_path / "whole", **TOY, random_fraction=0.4)).path)
    for episodes in (2, 5):
        collect(config(tmp_path / "two", **TOY | {"episodes": episodes}, random_fraction=0.4))
    assert contents(tmp_path / "two") == whole
    collect(config(tmp_path / "parallel", **TOY, random_fraction=0.4, workers=2))
    assert contents(tmp_path / "parallel") == whole


def deadly() -> EnvBase:
    """A toy whose process dies while the file of that name is there."""
    if Path(os.environ["DEADLY"]).exists():
        os.kill(os.getpid(), signal.SIGKILL)
    return make_env("toy", pixels=16, max_steps=12)


@pytest.mark.timeout(120)  # instead of for ever
def test_a_process_that_dies_is_said_and_collecting_goes_on_later(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("DEADLY", str(tmp_path / "deadly"))
    settings = TOY | {"env": f"{__name__}:deadly"}
    whole = contents(collect(config(tmp_path / "whole", **settings)).path)
    collect(config(tmp_path / "s", **settings | {"episodes": 2}))
    (tmp_path / "deadly").touch()
    cfg = config(tmp_path / "s", **settings, workers=2)
    with pytest.raises(RuntimeError, match=r"has died \(.*\): the same command goes on"):
        collect(cfg)
    (tmp_path / "deadly").unlink()
    collect(replace(cfg, workers=1))
    assert contents(tmp_path / "s") == whole


def sleep(number: int) -> int:
    time.sleep(number)
    return number


@pytest.mark.timeout(60)
def test_ctrl_c_does_not_wait_for_running_episodes() -> None:
    numbers = range(0, 500, 100)
    with pytest.raises(KeyboardInterrupt), episode_stream(numbers, sleep, 2) as episodes:
        assert next(episodes) == 0
        raise KeyboardInterrupt


def test_a_finished_store_is_left_alone_and_other_settings_are_refused(tmp_path) -> None:
    cfg = config(tmp_path / "s", **TOY)
    collect(cfg)
    before = contents(tmp_path / "s")
    assert len(collect(cfg)) == len(collect(replace(cfg, episodes=1))) == 5
    assert contents(tmp_path / "s") == before
    with pytest.raises(StoreError, match="was begun with info.noise=0.3, not 0.9"):
        collect(replace(cfg, noise=0.9))


def test_an_episode_ends_some_steps_after_success(tmp_path) -> None:
    cfg = config(tmp_path / "s", **TOY | {"after_success": 0, "max_steps": 50}, noise=0.0)
    assert int(collect(cfg).frames.max()) < 30


def test_random_episodes_use_no_expert(tmp_path) -> None:
    store = collect(config(tmp_path / "s", **TOY, random_fraction=1.0))
    assert not any(info["expert"] for info in store.infos)
    assert "expert" not in summary(store)


def test_the_contact_sheet_is_a_picture_of_the_frames(tmp_path) -> None:
    store = collect(config(tmp_path / "s", **TOY | {"pixels": 64}))
    sheet = np.asarray(Image.open(draw_sheet(store)))
    assert sheet.ndim == 3 and min(sheet.shape[:2]) > 300
    red = (sheet[..., 0] > 200) & (sheet[..., 1] < 100)
    assert red.sum() > 40 * 200  # 40 pictures with a disc


def test_meta_world_experts_make_upright_moving_pictures(tmp_path) -> None:
    cfg = config(tmp_path / "s", tasks=["drawer_open"], episodes=1, max_steps=20)
    store = collect(cfg)
    assert store.labels == ["drawer-open"] and store.frames.tolist() == [21]
    frames = torch.from_numpy(store.read(0).copy()).float()
    assert store.read(0, "actions").shape == (21, 4)
    assert float(frames.std()) > 20 and float((frames[0] - frames[-1]).abs().mean()) > 2
    wall, floor = frames[0, :, :8, 40:], frames[0, :, -12:, :24]
    assert float(wall.std()) < 15 < float(floor.std())  # plain above, chequered below


def test_task_lists_are_understood() -> None:
    assert len(env_names("metaworld", "evaluation")) == 6
    assert len(env_names("metaworld", "all")) == 50
    assert env_names("metaworld", ["drawer_open", "reach-v3"]) == [
        "metaworld/drawer-open",
        "metaworld/reach",
    ]
    assert env_names("toy", "all") == ["toy"]
    with pytest.raises(ValueError, match="unknown Meta-world task 'drawer-opem'"):
        env_names("metaworld", ["drawer-opem"])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("episodes", 0),
        ("max_steps", 0),
        ("noise", -1.0),
        ("random_fraction", 1.5),
        ("after_success", -1),
        ("workers", 0),
    ],
)
def test_impossible_settings_are_refused_by_name(tmp_path, key: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{key}={value}"):
        config(tmp_path / "s", **{key: value})
