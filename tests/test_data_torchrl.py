"""What a TorchRL user does with the buffers of clips and replay."""

from __future__ import annotations

import random

import pytest
import torch
from torchrl.collectors import Collector
from torchrl.data import SliceSampler
from torchrl.envs import DTypeCastTransform, SerialEnv

from prelar_trl.data import ClipWriter, EpisodeReplay, VideoClips, WindowSampler
from prelar_trl.envs import make_env


def collected(path, *, capacity: int = 500, steps: int = 64) -> EpisodeReplay:
    """Episodes of 7 frames of the toy, written by a collector."""
    replay = EpisodeReplay(path, window=4, batch_size=8, capacity=capacity)
    env = make_env("toy", seed=1, pixels=16, max_steps=6)
    collector = Collector(
        env, None, frames_per_batch=16, total_frames=steps, replay_buffer=replay.buffer
    )
    for _ in collector:
        pass
    collector.shutdown()
    return replay


def test_collectors_and_rollouts_fill_the_buffer_and_transforms_are_appended(tmp_path) -> None:
    replay = collected(tmp_path / "r")
    assert replay.num_episodes == 10 and len(replay.buffer) == 70
    assert bool(replay.episode(9)["is_first"][0])
    rollout = make_env("toy", seed=1, pixels=16, max_steps=6).rollout(6)
    replay.extend(rollout)
    assert torch.equal(replay.episode(10)["pixels"][1:], rollout["next", "pixels"])
    several = SerialEnv(2, lambda: make_env("toy", seed=1, pixels=16, max_steps=6))
    collector = Collector(several, None, frames_per_batch=16, total_frames=48)
    for data in collector:
        replay.extend(data)
    collector.shutdown()
    assert replay.num_episodes == 19
    assert {len(replay.episode(i)) for i in range(19)} == {7}
    replay.buffer.append_transform(DTypeCastTransform(torch.uint8, torch.float32, ["pixels"]))
    batch = replay.sample()
    assert batch["pixels"].dtype == torch.float32 and batch["pixels"].shape == (8, 4, 3, 16, 16)


@pytest.mark.parametrize("capacity", [500, 33])
@pytest.mark.parametrize("cache_values", [False, True])
def test_the_sampler_is_replaced_by_a_slice_sampler(
    tmp_path, capacity: int, cache_values: bool
) -> None:
    replay = collected(tmp_path / "r", capacity=capacity, steps=128)
    sampler = SliceSampler(
        slice_len=4, init_key="is_first", truncated_key=None, cache_values=cache_values
    )
    replay.buffer.set_sampler(sampler)
    seen: set[int] = set()
    for _ in range(30):
        data = replay.buffer.sample().reshape(8, 4)
        assert bool((data["episode"] == data["episode"][:, :1]).all())  # no slice spans two
        index = {tuple(row.tolist()) for row in data["action"][:, 0]}
        seen |= set(data["episode"][:, 0, 0].tolist())
        assert len(index) > 1
    newest = replay.storage.num_written
    first = 0 if capacity == 500 else newest - 5  # 33 frames: four whole episodes and 5 of one
    assert seen == set(range(first, newest))
    batch = replay.sample()
    assert batch.batch_size == (8, 4)
    assert batch["is_first"].squeeze(-1).tolist() == [[True, False, False, False]] * 8


def test_dumps_and_loads_bring_everything_back(tmp_path) -> None:
    replay = collected(tmp_path / "r", steps=64)
    replay.buffer.dumps(tmp_path / "copy")
    expected = [replay.sample() for _ in range(2)]
    other = EpisodeReplay(tmp_path / "o", window=4, batch_size=8, capacity=500, seed=7)
    other.buffer.loads(tmp_path / "copy")
    for batch in expected:
        assert bool((other.sample() == batch).all())
    ours, theirs = (each.state_dict()["pending"] for each in (replay, other))
    assert ours.keys() == theirs.keys() and len(ours) == 1  # the unfinished episode came along
    for key, rows in ours.items():
        assert bool((rows == theirs[key]).all())


def test_clips_take_transforms_and_samplers_too(tmp_path) -> None:
    with ClipWriter(tmp_path / "s", source="test", height=8, width=8) as writer:
        for clip in range(6):
            number = 20 * clip + torch.arange(5 + clip, dtype=torch.uint8)
            writer.add(number.view(-1, 1, 1, 1).repeat(1, 3, 8, 8))
    clips = VideoClips(tmp_path / "s", 4, 8, split="train", heldout=0.34)
    own = set((clips.sample()["pixels"][:, 0, 0, 0, 0] // 20).tolist())
    clips.buffer.set_sampler(SliceSampler(slice_len=4, truncated_key=None, cache_values=True))
    clips.buffer.append_transform(lambda data: data.set("doubled", data["pixels"] * 2))
    seen = set()
    for _ in range(20):
        batch = clips.sample()
        number = batch["pixels"][..., 0, 0, 0].int()
        assert bool((number.diff(dim=1) == 1).all())
        assert torch.equal(batch["doubled"], batch["pixels"] * 2)
        seen |= set((number[:, 0] // 20).tolist())
    assert own <= seen and len(seen) == 4  # none that is held out


@pytest.mark.parametrize("name", ["sampler/sampler.pt", "writer/pending.pt"])
def test_a_flipped_bit_in_a_dump_is_noticed(name: str, tmp_path) -> None:
    collected(tmp_path / "r").buffer.dumps(tmp_path / "copy")
    file, generator = tmp_path / "copy" / name, random.Random(0)
    whole, refused = file.read_bytes(), 0
    for number in range(40):
        other = EpisodeReplay(tmp_path / f"{number}", window=4, batch_size=8, capacity=500, seed=7)
        damaged = bytearray(whole)
        damaged[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        file.write_bytes(damaged)
        try:
            other.buffer.loads(tmp_path / "copy")
        except ValueError as error:
            assert file.name in str(error) and "\n" not in str(error)
            refused += 1
        else:  # the bit means nothing
            state = other.state_dict()
            file.write_bytes(whole)
            other.buffer.loads(tmp_path / "copy")
            assert repr(other.state_dict()) == repr(state)
            for key, rows in other.state_dict()["pending"].items():
                assert bool((rows == state["pending"][key]).all())
    assert refused > 25


def frames(**changed: torch.Tensor) -> dict[str, torch.Tensor]:
    """Two frames of an unfinished episode."""
    flag = torch.zeros(2, 1, dtype=torch.bool)
    pixels = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    rows = {"pixels": pixels, "action": torch.zeros(2, 2), "reward": torch.zeros(2, 1)}
    return rows | {"is_first": flag, "terminated": flag} | changed


@pytest.mark.parametrize(
    "pending",
    [
        [1, 2],
        {0: {}},
        {0: {"pixels": frames()["pixels"]}},
        {0: frames(action=torch.zeros(2))},
        {0: frames(action=torch.zeros(3, 2))},
        {0: frames(reward=torch.zeros(2, 1, dtype=torch.float64))},
        {0: frames(terminated=torch.zeros(2, 2, dtype=torch.bool))},
        {0: frames(other=torch.zeros(2, 2))},
    ],
)
def test_what_is_no_unfinished_episode_is_not_read(pending, tmp_path) -> None:
    replay = collected(tmp_path / "r")
    before = replay.state_dict()["pending"]
    replay.buffer.dumps(tmp_path / "copy")
    torch.save(pending, tmp_path / "copy" / "writer" / "pending.pt")
    with pytest.raises(ValueError, match=r"pending.pt holds no unfinished episodes \("):
        replay.buffer.loads(tmp_path / "copy")
    assert replay.state_dict()["pending"].keys() == before.keys()
    torch.save({0: frames()}, tmp_path / "copy" / "writer" / "pending.pt")
    replay.buffer.loads(tmp_path / "copy")
    assert list(replay.state_dict()["pending"]) == [0]


@pytest.mark.parametrize(
    "changed",
    [{"position": -1}, {"position": 0.5}, {"rng": torch.zeros(7)}, {"order_rng": "x"}, {"rng": 1}],
)
def test_what_is_no_state_of_a_sampler_is_not_read(changed, tmp_path) -> None:
    sampler = WindowSampler(4, strategy="epoch")
    sampler.set_episodes(torch.tensor([4, 5, 6]))
    sampler.draw(2)
    state = sampler.state_dict()
    sampler.dumps(tmp_path)
    torch.save(state | changed, tmp_path / "sampler.pt")
    with pytest.raises(ValueError, match="sampler.pt holds no state of a WindowSampler"):
        sampler.loads(tmp_path)
    assert torch.equal(sampler.state_dict()["rng"], state["rng"])


def test_a_sampler_does_not_hang_where_fewer_episodes_are_left() -> None:
    sampler = WindowSampler(4, strategy="epoch")
    sampler.set_episodes(torch.tensor([4, 5, 6, 7, 8]))
    sampler.draw(4)
    other = WindowSampler(4, strategy="epoch")
    other.set_episodes(torch.tensor([4, 5]))
    other.load_state_dict(sampler.state_dict())
    assert sorted(other.draw(2).episode.tolist()) == [0, 1]
