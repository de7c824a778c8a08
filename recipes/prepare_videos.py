"""Turn videos, Something-Something-V2, .npz episodes, LeRobot or TorchRL data into a clip store.

python recipes/prepare_videos.py source=my-videos data=videos/mine

Interrupted, it continues when it is run again; nothing is decoded twice.
"""

from __future__ import annotations

import sys

from prelar_trl.recipes.entry import start

if __name__ == "__main__":  # before the imports that take seconds
    sys.exit(start("prepare_videos"))

import json
import os
from collections.abc import Callable
from pathlib import Path

from prelar_trl.data import ClipStore
from prelar_trl.data.sources import (
    EpisodeFolder,
    FrameLists,
    FrameOptions,
    LeRobotDataset,
    SomethingSomething,
    Source,
    TensorDictFolder,
    VideoFolder,
    export_episodes,
    export_frames,
    is_lerobot,
    is_tensordict,
    list_file,
    npz_files,
    opencv,
    prepare,
    write_lists,
)
from prelar_trl.recipes.schema import PrepareVideosConfig
from prelar_trl.record import Progress

EXPORTS = {"npz": export_episodes, "jpeg": export_frames}
KINDS: dict[str, Callable[..., Source]] = {
    "videos": VideoFolder,
    "something": SomethingSomething,
    "frames": FrameLists,
    "episodes": EpisodeFolder,
    "lerobot": LeRobotDataset,
    "torchrl": TensorDictFolder,
}
ONLY_FOR = {  # settings, which are arguments of these kinds
    "labels": ("something", "frames"),
    "lists": ("frames",),
    "actions": ("episodes", "lerobot", "torchrl"),
    "camera": ("lerobot", "torchrl"),
}


def detect(root: Path, lists: dict[str, str] | None, options: FrameOptions) -> str:
    """Which kind of source a folder is, by what most of its clips are."""
    if lists:
        return "frames"
    if not root.is_dir():
        raise FileNotFoundError(f"source folder {str(root)!r} does not exist")
    if is_lerobot(root):
        return "lerobot"
    if is_tensordict(root):
        return "torchrl"
    labels = list_file(root, "labels")
    if labels and (labels.name != "labels.json" or list_file(root, "train")):
        return "something"
    episodes = len(npz_files(root))
    return (
        "episodes" if episodes and episodes > len(VideoFolder(root, options).items()) else "videos"
    )


def make_source(cfg: PrepareVideosConfig) -> Source:
    """The source that the config describes.

    Raises:
        ValueError, FileNotFoundError, ImportError: bad settings, before any work.
    """
    root = Path(cfg.source)
    options = FrameOptions(
        size=cfg.pixels,
        resize=cfg.resize,
        stride=cfg.stride,
        max_frames=cfg.max_frames,
        flow=cfg.flow,
        white=cfg.white,
    )
    kind = detect(root, cfg.lists, options) if cfg.kind == "auto" else cfg.kind
    for key, kinds in ONLY_FOR.items():
        if getattr(cfg, key) and kind not in kinds:
            raise ValueError(f"{key}= is for kind={' or '.join(kinds)}, this source is {kind!r}")
    if cfg.flow:
        opencv()
    if kind == "frames" and not cfg.lists:
        raise ValueError("kind=frames needs lists={train: <file>, heldout: <file>}")
    own = {key: getattr(cfg, key) for key, kinds in ONLY_FOR.items() if kind in kinds}
    try:
        return KINDS[kind](root, options, **own)
    except (ValueError, FileNotFoundError) as error:
        if kind != "something" or cfg.kind != "auto":
            raise
        hint = "if these are videos of another kind, add kind=videos"
        raise type(error)(f"{error}; {hint}") from None


def run(cfg: PrepareVideosConfig) -> ClipStore:
    """Prepares the store; see `prelar_trl.data.sources.prepare` for what it raises."""
    source = make_source(cfg)
    data = Path(cfg.data)
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
        info={"labels": cfg.labels, "actions": cfg.actions}
        | ({"camera": cfg.camera} if cfg.camera else {}),
        progress=show,
    )
    for each in bar:
        each.close()
    write_lists(store, store.path / "lists")
    if cfg.export:
        EXPORTS[cfg.export_as](store, Path(cfg.export))
    return store


def summary(store: ClipStore) -> str:
    """What is in the store, and what was left out and why."""
    lengths = sorted(store.frames.tolist())
    lines = [
        f"{len(store)} clips, {store.num_frames} frames, {store.num_bytes / 2**20:.0f} MiB; "
        f"frames per clip {lengths[0]} to {lengths[-1]}, median {lengths[len(lengths) // 2]}; "
        f"{sum(n >= 25 for n in lengths)} clips have at least 25"
    ]
    skipped: dict[str, list[str]] = {}
    for name, reason in store.skipped():
        skipped.setdefault(reason, []).append(name)
    lines += table("skipped", {r: (len(names), names[0]) for r, names in skipped.items()})
    notes = store.notes()
    lines += table("kept in part", {r: (len(clips), clips[0][0]) for r, clips in notes.items()})
    left_out = store.meta.get("left_out", {})
    lines += table("files left out", {r: (x["count"], x["example"]) for r, x in left_out.items()})
    return "\n".join(lines)


def table(title: str, reasons: dict[str, tuple[int, str]]) -> list[str]:
    """Reasons with how often they occurred, the most frequent first, and an example of each."""
    if not reasons:
        return []
    lines = [f"{sum(count for count, _ in reasons.values())} {title}:"]
    for reason, (count, example) in sorted(reasons.items(), key=lambda item: -item[1][0]):
        lines.append(f"  {count:>6}  {reason}, e.g. {json.dumps(example)}")
    return lines


def main(cfg: PrepareVideosConfig) -> None:
    """Prepare, then say what there is."""
    store = run(cfg)
    print(summary(store))
    print(f"clip store: {store.path}")
