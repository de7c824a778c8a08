"""Turn a folder of videos, Something-Something-V2 or .npz episodes into a clip store, once.

python recipes/prepare_videos.py source=my-videos data=videos/mine

Interrupted, it continues when it is run again; nothing is decoded twice.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

from omegaconf import DictConfig

from prelar_trl.data import ClipStore
from prelar_trl.data.sources import (
    EpisodeFolder,
    FrameLists,
    FrameOptions,
    SomethingSomething,
    Source,
    VideoFolder,
    export_episodes,
    export_frames,
    list_file,
    opencv,
    prepare,
    write_lists,
)
from prelar_trl.recipes.entry import recipe, settings
from prelar_trl.recipes.schema import PrepareVideosConfig, register
from prelar_trl.record import Progress

register()

KINDS = ("videos", "something", "frames", "episodes")
EXPORTS = {"npz": export_episodes, "jpeg": export_frames}
ONLY_FOR = {"labels": ("something", "frames"), "lists": ("frames",), "actions": ("episodes",)}


def detect(root: Path, lists: dict[str, str] | None) -> str:
    """Which kind of source a folder is."""
    if lists:
        return "frames"
    if not root.is_dir():
        raise FileNotFoundError(f"source folder {str(root)!r} does not exist")
    if list_file(root, "labels"):
        return "something"
    return "episodes" if next(root.glob("*.npz"), None) else "videos"


def make_source(cfg: PrepareVideosConfig) -> Source:
    """The source that the config describes.

    Raises:
        ValueError, FileNotFoundError, ImportError: bad settings, before any work.
    """
    root = Path(cfg.source).expanduser()
    if not isinstance(cfg.lists, dict | None):
        raise ValueError(f"lists={cfg.lists} must be {{train: <file>, heldout: <file>}}")
    kind = detect(root, cfg.lists) if cfg.kind == "auto" else cfg.kind
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is unknown: choose auto, {', '.join(KINDS)}")
    if cfg.export_as not in EXPORTS:
        raise ValueError(f"export_as={cfg.export_as!r} is unknown: choose {', '.join(EXPORTS)}")
    for key, kinds in ONLY_FOR.items():
        if getattr(cfg, key) and kind not in kinds:
            raise ValueError(f"{key}= is for kind={' or '.join(kinds)}, this source is {kind!r}")
    if cfg.flow:
        opencv()
    options = FrameOptions(
        size=cfg.pixels,
        resize=cfg.resize,
        stride=cfg.stride,
        max_frames=cfg.max_frames,
        flow=cfg.flow,
    )
    if kind == "something":
        return SomethingSomething(root, options, labels=cfg.labels)
    if kind == "frames":
        if not cfg.lists:
            raise ValueError("kind=frames needs lists={train: <file>, heldout: <file>}")
        return FrameLists(root, options, lists=cfg.lists, labels=cfg.labels)
    if kind == "episodes":
        return EpisodeFolder(root, options, actions=cfg.actions)
    return VideoFolder(root, options)


def run(cfg: PrepareVideosConfig) -> ClipStore:
    """Prepares the store; see `prelar_trl.data.sources.prepare` for what it raises."""
    if cfg.shard_mib < 1:
        raise ValueError(f"shard_mib={cfg.shard_mib} must be at least 1")
    source = make_source(cfg)
    data = Path(cfg.data).expanduser()
    bar: list[Progress] = []

    def show(done: int, total: int, frames: int) -> None:
        if not bar:
            bar.append(Progress(total, initial=done - 1, name="prepare", unit="clips"))
        bar[0].update(frames=frames)

    store = prepare(
        source,
        data,
        min_frames=cfg.min_frames,
        workers=cfg.workers or os.cpu_count() or 1,
        shard_bytes=cfg.shard_mib * 2**20,
        info={"labels": cfg.labels, "actions": cfg.actions},
        progress=show,
    )
    for each in bar:
        each.close()
    write_lists(store, store.path / "lists")
    if cfg.export:
        EXPORTS[cfg.export_as](store, Path(cfg.export).expanduser())
    return store


def summary(store: ClipStore) -> str:
    """What is in the store, and what was left out and why."""
    lengths = sorted(store.frames.tolist())
    lines = [
        f"{len(store)} clips, {store.num_frames} frames, {store.num_bytes / 2**20:.0f} MiB; "
        f"frames per clip {lengths[0]} to {lengths[-1]}, median {lengths[len(lengths) // 2]}; "
        f"{sum(n >= 25 for n in lengths)} clips have at least 25"
    ]
    reasons: dict[str, list[str]] = {}
    for name, reason in store.skipped():
        reasons.setdefault(reason, []).append(name)
    counts = Counter({reason: len(names) for reason, names in reasons.items()})
    if counts:
        lines.append(f"{counts.total()} skipped:")
    for reason, count in counts.most_common():
        lines.append(f"  {count:>6}  {reason}, e.g. {json.dumps(reasons[reason][0])}")
    return "\n".join(lines)


@recipe("prepare_videos")
def main(config: DictConfig) -> None:
    """Prepare, then say what there is."""
    store = run(settings(config))
    print(summary(store))
    print(f"clip store: {store.path}")


if __name__ == "__main__":
    main()
