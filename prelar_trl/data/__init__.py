"""Video clips for pre-training and the replay for fine-tuning, as TorchRL replay buffers."""

from __future__ import annotations

from prelar_trl.data.clips import VideoClips
from prelar_trl.data.layout import to_dreamer_v3, to_frames
from prelar_trl.data.motion import shift_for_motion, typical_motion
from prelar_trl.data.replay import EpisodeReplay
from prelar_trl.data.store import ClipStore, StoreError
from prelar_trl.data.windows import WindowSampler
from prelar_trl.data.writer import ClipWriter

__all__ = [
    "ClipStore",
    "ClipWriter",
    "EpisodeReplay",
    "StoreError",
    "VideoClips",
    "WindowSampler",
    "shift_for_motion",
    "to_dreamer_v3",
    "to_frames",
    "typical_motion",
]
