"""Where clips come from: folders of videos, Something-Something-V2, ``.npz`` episodes."""

from __future__ import annotations

from prelar_trl.data.sources.base import ClipError, Item, Source
from prelar_trl.data.sources.episodes import EpisodeFolder, export_episodes
from prelar_trl.data.sources.flow import flow_colours, flow_pictures, opencv
from prelar_trl.data.sources.frames import FrameOptions, array_clip, picture_clip, video_clip
from prelar_trl.data.sources.prepare import prepare
from prelar_trl.data.sources.something import (
    FrameLists,
    SomethingSomething,
    export_frames,
    list_file,
    read_list,
    write_lists,
)
from prelar_trl.data.sources.videos import VideoFolder

__all__ = [
    "ClipError",
    "EpisodeFolder",
    "FrameLists",
    "FrameOptions",
    "Item",
    "SomethingSomething",
    "Source",
    "VideoFolder",
    "array_clip",
    "export_episodes",
    "export_frames",
    "flow_colours",
    "flow_pictures",
    "list_file",
    "opencv",
    "picture_clip",
    "prepare",
    "read_list",
    "video_clip",
    "write_lists",
]
