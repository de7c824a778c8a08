"""Folders of ``.npz`` episodes: RLBench as APV released it, and DreamerV2's replays.

Keys of a file of L steps: ``image`` uint8 ``[L + 1, H, W, 3]``, ``action``, ``reward``,
``is_first``, ``is_last``, ``is_terminal``, each with L + 1 rows; the action led to the image.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from pathlib import Path

import numpy as np

from prelar_trl.data.sources.base import ClipError, Item, text
from prelar_trl.data.sources.frames import PICTURE_DECODER, FrameOptions, array_clip
from prelar_trl.data.store import ACTIONS, ClipStore

_STAMP = "20000101T000000"  # exported files carry no date, so that they can be compared


class EpisodeFolder:
    """The ``.npz`` files of a folder, ordered by name.

    Args:
        root: the folder.
        options: how frames are made; a stride leaves actions out.
        actions: also store the actions, for probes. RLBench's are left out officially.

    Raises:
        FileNotFoundError: ``root`` is no folder.
        ValueError: actions were asked for together with a stride.
    """

    kind = "episodes"
    decoder = f"NumPy, {PICTURE_DECODER}"

    def __init__(self, root: str | Path, options: FrameOptions, *, actions: bool = False) -> None:
        self.root, self.options, self.actions = Path(root), options, actions
        if not self.root.is_dir():
            raise FileNotFoundError(f"source folder {str(root)!r} does not exist")
        if actions and options.stride > 1:
            raise ValueError(f"actions=true needs stride=1, got stride={options.stride}")

    def items(self) -> list[Item]:
        """See `Source.items`."""
        return [Item(text(file.name), file) for file in sorted(self.root.glob("*.npz"))]

    def load(self, item: Item) -> dict[str, np.ndarray]:
        """See `Source.load`."""
        try:
            with np.load(item.path, allow_pickle=False) as episode:
                keys = ("image", "action") if self.actions else ("image",)
                missing = [k for k in keys if k not in episode]
                if missing:
                    raise ClipError(f"no {missing[0]!r} in the file")
                arrays = {key: episode[key] for key in keys}
        except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            if isinstance(error, ClipError):
                raise
            raise ClipError("not readable as .npz") from None
        image = arrays["image"]
        if image.dtype != np.uint8 or image.ndim != 4 or image.shape[-1] != 3:
            shape = list(image.shape)
            raise ClipError(f"image must be uint8 [T, H, W, 3], is {image.dtype} {shape}")
        clip = array_clip(image, self.options)
        if self.actions:
            action = arrays["action"]
            if action.ndim != 2 or len(action) != len(image) or not np.isfinite(action).all():
                raise ClipError(f"action must be finite [T, A], is {list(action.shape)}")
            clip[ACTIONS] = action[: len(clip["pixels"])].astype(np.float32)
        return clip


def export_episodes(store: ClipStore, folder: str | Path) -> int:
    """Writes every clip of a store as an ``.npz`` episode that DreamerV2's replay reads.

    The store's actions are written if it has them, else zeros ``[T, 1]``; rewards are zero.
    Files that exist are left alone, each file appears whole or not at all.

    Returns:
        The number of files written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = 0
    for clip in range(len(store)):
        pixels = store.read(clip)
        steps = len(pixels)
        file = folder / f"{_STAMP}-{clip:08d}-{steps - 1}.npz"
        if file.exists():
            continue
        first, last = np.zeros(steps, bool), np.zeros(steps, bool)
        first[0] = last[-1] = True
        known = ACTIONS in store.streams
        part = file.with_suffix(".part")
        with part.open("wb") as handle:
            np.savez_compressed(
                handle,
                image=pixels.transpose(0, 2, 3, 1),
                action=store.read(clip, ACTIONS) if known else np.zeros((steps, 1), np.float32),
                reward=np.zeros(steps, np.float32),
                is_first=first,
                is_last=last,
                is_terminal=np.zeros(steps, bool),
            )
        os.replace(part, file)
        written += 1
    return written
