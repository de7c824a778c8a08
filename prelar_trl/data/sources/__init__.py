"""Where clips come from: videos, Something-Something-V2, ``.npz`` episodes, LeRobot, TorchRL."""

from __future__ import annotations

from prelar_trl.data.sources.base import Clip, ClipError, FrameOptions, Item, Source
from prelar_trl.data.sources.decoding import video_clip
from prelar_trl.data.sources.episodes import EpisodeFolder, export_episodes, npz_files
from prelar_trl.data.sources.flow import FlowPictures, flow_colors, opencv
from prelar_trl.data.sources.lerobot import LeRobotDataset, is_lerobot
from prelar_trl.data.sources.numbering import in_time_order
from prelar_trl.data.sources.pictures import animation_clip, array_clip, picture_clip, to_rgb
from prelar_trl.data.sources.prepare import prepare
from prelar_trl.data.sources.something import (
    FrameLists,
    SomethingSomething,
    export_frames,
    list_file,
    write_lists,
)
from prelar_trl.data.sources.torchrl import TensorDictFolder, is_tensordict
from prelar_trl.data.sources.videos import VideoFolder

__all__ = [
    "Clip",
    "ClipError",
    "EpisodeFolder",
    "FlowPictures",
    "FrameLists",
    "FrameOptions",
    "Item",
    "LeRobotDataset",
    "SomethingSomething",
    "Source",
    "TensorDictFolder",
    "VideoFolder",
    "animation_clip",
    "array_clip",
    "export_episodes",
    "export_frames",
    "flow_colors",
    "in_time_order",
    "is_lerobot",
    "is_tensordict",
    "list_file",
    "npz_files",
    "opencv",
    "picture_clip",
    "prepare",
    "to_rgb",
    "video_clip",
    "write_lists",
]
