"""The way of a frame from a video file to the loss, and of an action from the actor to the loss.

python benchmarks/paths.py

Traces real calls and prints the project's files in the order in which they are first entered:
what a reader who follows one frame, or one action, has to open.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from prelar_trl.data import EpisodeReplay, VideoClips
from prelar_trl.data.sources import FrameOptions, VideoFolder, prepare
from prelar_trl.envs import make_env
from prelar_trl.models import make_agent, make_world_model, make_world_model_loss
from prelar_trl.modules import WorldModelPolicy
from prelar_trl.recipes.interaction import Collection, EpisodeCollector
from prelar_trl.record import write_video
from prelar_trl.stopwatch import Stopwatch
from prelar_trl.updates import WorldModelUpdate

ROOT = Path(__file__).resolve().parents[1]
ROOMS = (ROOT / "prelar_trl", ROOT / "recipes")


@contextmanager
def traced(files: list[str]) -> Iterator[None]:
    """Adds to ``files`` the project's files that are entered inside."""

    def note(frame: FrameType, event: str, _: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and any(room in path.parents for room in ROOMS):
            name = str(path.relative_to(ROOT))
            if name not in files:
                files.append(name)

    sys.setprofile(note)
    try:
        yield
    finally:
        sys.setprofile(None)


def frame_path(folder: Path) -> tuple[list[str], list[str]]:
    """Files from video to store, and from store to loss."""
    (folder / "videos").mkdir()
    frames = torch.randint(0, 256, (30, 3, 64, 64), dtype=torch.uint8)
    write_video(folder / "videos" / "a.mp4", frames)
    to_store: list[str] = []
    with traced(to_store):
        prepare(VideoFolder(folder / "videos", FrameOptions()), folder / "store", workers=1)
    world_model = make_world_model("prelar", "pretrain", action_dim=0, size="mini")
    update = WorldModelUpdate(make_world_model_loss("prelar", "pretrain", world_model))
    clips = VideoClips(folder / "store", clip_len=8, batch_size=2)
    to_loss: list[str] = []
    with traced(to_loss):
        update.forward_backward(clips.sample(), None)
    return to_store, to_loss


def action_path(folder: Path) -> tuple[list[str], list[str]]:
    """Files from actor to replay, and from replay to loss."""
    agent = make_agent("prelar", action_dim=2, size="mini").eval()
    loss = make_world_model_loss(
        "prelar", "finetune", agent.world_model, video_bonus=agent.video_bonus
    )
    policy = WorldModelPolicy(agent.world_model, agent.actor)
    env = make_env("toy", max_steps=12)
    replay = EpisodeReplay(folder / "replay", window=8, batch_size=2, capacity=100)
    collector = EpisodeCollector(env, policy, torch.device("cpu"), Stopwatch(), seed=0)
    collection = Collection(collector, replay)
    collection.reset()
    to_replay: list[str] = []
    with traced(to_replay):
        for _ in range(26):
            collection.step(random=False)
    to_loss: list[str] = []
    update = WorldModelUpdate(loss)
    with traced(to_loss):
        update.forward_backward(collection.sample(), None)
    return to_replay, to_loss


def main() -> None:
    for title, path in (("frame", frame_path), ("action", action_path)):
        with tempfile.TemporaryDirectory() as folder:
            first, second = path(Path(folder))
        together = list(dict.fromkeys(first + second))
        print(f"{title}: {len(together)} files, {len(first)} + {len(second)}")
        for part in (first, second):
            print("  " + "\n  ".join(part) + "\n")


if __name__ == "__main__":
    main()
