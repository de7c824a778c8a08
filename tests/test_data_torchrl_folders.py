"""What TorchRL writes on the disk, as a source of clips."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torchrl.data import LazyMemmapStorage, LazyTensorStorage, ReplayBuffer

from prelar_trl.data import ClipStore
from prelar_trl.data.sources import FrameOptions
from prelar_trl.data.sources.torchrl import TensorDictFolder
from prelar_trl.envs import make_env
from prelar_trl.recipes.prepare_videos import run
from prelar_trl.recipes.schema import PrepareVideosConfig
from tests.videos import times

LENGTHS = [4, 3, 5]


def steps(lengths: list[int] = LENGTHS) -> TensorDict:
    """Steps whose pictures tell their place; the frame after the last step of an episode too."""
    rows = []
    for number, length in enumerate(lengths):
        places = torch.arange(length + 1) + 10 * number
        pixels = torch.zeros(length + 1, 3, 16, 16, dtype=torch.uint8)
        pixels[:, 0] = (20 + 10 * (places % 23)).to(torch.uint8)[:, None, None]
        done = torch.zeros(length, 1, dtype=torch.bool)
        done[-1] = True
        rows.append(
            TensorDict(
                {
                    "pixels": pixels[:-1],
                    "action": places[:-1, None].float().expand(-1, 2),
                    "episode": torch.full((length,), number),
                    "next": {"pixels": pixels[1:], "done": done, "reward": torch.zeros(length, 1)},
                },
                batch_size=[length],
            )
        )
    return torch.cat(rows)


TOLD = [[t % 23 for t in range(10 * n, 10 * n + length + 1)] for n, length in enumerate(LENGTHS)]


def prepare(source: Path, data: Path, **settings) -> ClipStore:
    return run(PrepareVideosConfig(source=str(source), data=str(data), workers=1, **settings))


def told(store: ClipStore) -> list[list[int]]:
    return [times(store.read(clip)) for clip in range(len(store))]


@pytest.mark.parametrize("cut", ["done", "episode"])
def test_an_episode_of_a_tensordict_is_a_clip(tmp_path: Path, cut: str) -> None:
    data = steps()
    data = data.exclude("episode") if cut == "done" else data.exclude(("next", "done"))
    data.memmap(tmp_path / "set")
    store = prepare(tmp_path / "set", tmp_path / "store", actions=True)
    assert told(store) == TOLD
    for clip, length in enumerate(LENGTHS):
        led = [0, *range(10 * clip, 10 * clip + length)]
        assert store.read(clip, "actions")[:, 0].tolist() == led


def test_trajectories_that_are_padded_are_cut(tmp_path: Path) -> None:
    parts = steps().split(LENGTHS)
    padded = torch.stack([torch.cat([p, torch.zeros_like(p)])[: max(LENGTHS)] for p in parts])
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    padded.exclude("episode", ("next", "done")).set("mask", mask).memmap(tmp_path / "set")
    assert told(prepare(tmp_path / "set", tmp_path / "store")) == TOLD


@pytest.mark.parametrize("storage", [LazyMemmapStorage, LazyTensorStorage])
def test_a_dumped_replay_buffer_gives_what_it_holds(tmp_path: Path, storage: type) -> None:
    buffer = ReplayBuffer(storage=storage(50))
    buffer.extend(steps())
    buffer.dumps(tmp_path / "buffer")
    assert told(prepare(tmp_path / "buffer", tmp_path / "store")) == TOLD


def test_a_ring_that_is_full_begins_with_its_oldest_step(tmp_path: Path) -> None:
    buffer = ReplayBuffer(storage=LazyMemmapStorage(8))  # of 12 steps: the last 8
    for part in steps().split(4):
        buffer.extend(part)
    buffer.dumps(tmp_path / "buffer")
    assert told(prepare(tmp_path / "buffer", tmp_path / "store")) == TOLD[1:]


@pytest.mark.parametrize("dims", [1, 2])
def test_a_buffer_of_trajectories_is_refused_in_one_line(tmp_path: Path, dims: int) -> None:
    buffer = ReplayBuffer(storage=LazyMemmapStorage(30, ndim=dims))
    buffer.extend(torch.stack(steps([4, 4]).split(4)))
    buffer.dumps(tmp_path / "buffer")
    for folder in ("buffer", "buffer/storage"):
        with pytest.raises(ValueError, match=r"write its .* by buffer\[:\].memmap\(folder\)$"):
            prepare(tmp_path / folder, tmp_path / "store")
    buffer[:].memmap(tmp_path / "set")
    assert told(prepare(tmp_path / "set", tmp_path / "store")) == [TOLD[0], [*range(10, 15)]]


@pytest.mark.parametrize("layout", ["[H, W, 3]", "[1, H, W]", "[H, W]"])
def test_pictures_of_other_layouts(tmp_path: Path, layout: str) -> None:
    picture = torch.zeros(6, 16, 24, dtype=torch.uint8)
    picture[:, :8] = 200  # bright above
    if layout == "[H, W, 3]":
        picture = picture[..., None].expand(-1, -1, -1, 3)
    elif layout == "[1, H, W]":
        picture = picture[:, None]
    data = TensorDict({"observation": {"image": picture}, "step": torch.arange(6)}, batch_size=[6])
    data.memmap(tmp_path / "set")
    store = prepare(tmp_path / "set", tmp_path / "store")
    frames = store.read(0)
    assert frames.shape == (6, 3, 64, 64)
    assert (frames[:, :, :30] == 200).all() and (frames[:, :, 34:] == 0).all()


def test_one_of_several_pictures_is_chosen(tmp_path: Path) -> None:
    data = steps()
    data["observation", "wrist"] = torch.full((12, 16, 16, 3), 7, dtype=torch.uint8)
    data.memmap(tmp_path / "set")
    with pytest.raises(ValueError, match=r"camera=<one of pixels, observation/wrist>"):
        prepare(tmp_path / "set", tmp_path / "store")
    store = prepare(tmp_path / "set", tmp_path / "store", camera="wrist")
    assert store.frames.tolist() == LENGTHS and np.unique(store.read(0)).tolist() == [7]


def test_a_folder_without_pictures_is_said_in_one_line(tmp_path: Path) -> None:
    TensorDict({"observation": torch.zeros(4, 3)}, batch_size=[4]).memmap(tmp_path / "set")
    with pytest.raises(ValueError, match="holds no picture"):
        prepare(tmp_path / "set", tmp_path / "store")
    with pytest.raises(FileNotFoundError, match="no TensorDict"):
        prepare(tmp_path, tmp_path / "store", kind="torchrl")


def test_what_a_rollout_recorded_can_be_pre_trained_on(tmp_path: Path) -> None:
    env = make_env("toy", max_steps=6, seed=0)
    torch.cat([env.rollout(6) for _ in range(3)]).memmap(tmp_path / "set")
    store = prepare(tmp_path / "set", tmp_path / "store", actions=True)
    assert store.frames.tolist() == [7, 7, 7]


def test_an_array_of_another_size_is_named(tmp_path: Path) -> None:
    steps().memmap(tmp_path / "set")
    file = tmp_path / "set" / "pixels.memmap"
    whole = file.read_bytes()
    for content in (whole[:-1], whole + b"0", b""):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"pixels.memmap' is damaged: \d+ bytes, \d+ are"):
            TensorDictFolder(tmp_path / "set", FrameOptions()).entries["pixels"].open()
