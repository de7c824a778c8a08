"""The replays of a run, one for each of its processes."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch

from prelar_trl.data import EpisodeReplay
from prelar_trl.data.episodes import EpisodeStorage
from prelar_trl.recipes.processes import Processes
from prelar_trl.recipes.schema import FinetuneConfig


def replay_folder(run: Path, rank: int) -> Path:
    return run / (f"replay-{rank}" if rank else "replay")


def replay_bytes(cfg: FinetuneConfig, frame: Sequence[int], processes: Processes) -> int:
    """What the replays of all processes need on disk, with what the last checkpoints need of them.

    Args:
        frame: shape of an observation's pixels, ``[..., C, H, W]``.
    """
    capacity = processes.size * cfg.capacity + (cfg.keep + 1) * cfg.checkpoint_every
    return min(capacity, cfg.env_steps // cfg.action_repeat) * prod(frame[-3:])


def prefetched(cfg: FinetuneConfig, device: torch.device) -> int:
    """Batches drawn ahead; on a CPU the thread would only take time from the updates."""
    if cfg.prefetch is not None:
        return cfg.prefetch
    return 2 if device.type == "cuda" else 0


def open_replay(
    cfg: FinetuneConfig,
    run: Path,
    video_clips: int,
    device: torch.device,
    processes: Processes,
    checkpoint: dict[str, Any] | None,
) -> EpisodeReplay:
    """This process's replay, which gives its share of each batch but for the ``video_clips``."""
    path = replay_folder(run, processes.rank)
    if checkpoint is not None and processes.rank > len(checkpoint.get("others", [])):
        shutil.rmtree(path, ignore_errors=True)  # left from when the run had more processes
    return EpisodeReplay(
        path,
        window=cfg.batch_length,
        batch_size=processes.share("batch_size", cfg.batch_size) - video_clips,
        capacity=cfg.capacity,
        seed=processes.seed(cfg.seed),
        device=device,
        min_length=cfg.min_length,
        pack=True,  # the official replay never trains on shorter episodes
        prefetch=prefetched(cfg, device),
    )


def share_replays(replay: EpisodeReplay, checkpoint: dict[str, Any], processes: Processes) -> None:
    """Deal the episodes out where a run continues with more or fewer processes than it had.

    A process that is new takes a copy of an earlier one's; those of a process that is gone are
    appended to those of one that stays. The folder of the latter is kept: the checkpoint names it.
    """
    run, rank, size = replay.path.parent, processes.rank, processes.size
    states = [checkpoint, *checkpoint.get("others", [])]
    for new in range(len(states), size):
        copy = run / f"replay-{new}.part"
        if rank == new % len(states):
            replay.storage.dumps(copy)
        processes.wait()
        if rank == new:
            replay.storage.loads(copy)
            shutil.rmtree(copy)
    for gone in range(size, len(states)):
        if rank == gone % size:
            source = EpisodeStorage(replay_folder(run, gone), replay.capacity)
            source.load_state_dict(states[gone]["replay"])
            for number in range(len(source.episodes()["lengths"])):
                replay.storage.append(source.episode(number))
            source.close()
