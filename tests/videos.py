"""Small real videos and pictures that tell what they are, and what ffmpeg makes of a file."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from prelar_trl.recipes.schema import PrepareVideosConfig

CODECS = {".mp4": "libx264", ".webm": "libvpx-vp9", ".avi": "mpeg4", ".mov": "libx264"}


def ramp(length: int, height: int = 96, width: int = 128) -> np.ndarray:
    """Frames [T, H, W, 3] that tell their time by their red and their orientation by the rest.

    Red is 20 + 10 t everywhere; green is bright in the upper half, blue in the left half.
    """
    frames = np.zeros((length, height, width, 3), np.uint8)
    frames[..., 0] = 20 + 10 * np.arange(length)[:, None, None]
    frames[:, : height // 2, :, 1] = 200
    frames[:, :, : width // 2, 2] = 200
    return frames


def encode(path: Path, frames: np.ndarray) -> Path:
    """Encodes frames as the suffix says, by the real encoder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gif":
        pictures = [Image.fromarray(f) for f in frames]
        pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=80, loop=0)
        return path
    with av.open(str(path), "w") as container:
        stream = container.add_stream(CODECS[path.suffix], rate=Fraction(12))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        if path.suffix in (".mp4", ".mov"):
            stream.options = {"crf": "12", "g": "4", "bf": "0"}
        elif path.suffix == ".webm":
            stream.options = {"deadline": "realtime", "cpu-used": "8", "crf": "12", "b": "0"}
        else:
            stream.bit_rate = 4_000_000
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode(None))
    return path


def times(pixels: np.ndarray) -> list[int]:
    """The time that each frame of `ramp` tells."""
    return [round(t) for t in (pixels[:, 0].astype(float).mean((1, 2)) - 20) / 10]


def assert_upright(pixels: np.ndarray) -> None:
    half = pixels.shape[-1] // 2
    margin = slice(None, half - 6), slice(half + 6, None)
    assert pixels[:, 1, margin[0]].mean() > 150 > 60 > pixels[:, 1, margin[1]].mean()
    assert pixels[:, 2, :, margin[0]].mean() > 150 > 60 > pixels[:, 2, :, margin[1]].mean()


def config(source: Path, data: Path, **overrides) -> PrepareVideosConfig:
    options = {"data": str(data), "workers": 1} | overrides
    return PrepareVideosConfig(source=str(source), **options)


def ffmpeg(*arguments: Any) -> bytes:
    """Runs ffmpeg; returns what it writes to its standard output."""
    program = pytest.importorskip("imageio_ffmpeg").get_ffmpeg_exe()
    command = [program, "-v", "error", "-y", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True).stdout


def by_ffmpeg(path: Path, size: int = 64, *options: Any) -> np.ndarray:
    """The frames of a video as ffmpeg shows them, made smaller by it: uint8 [T, 3, size, size]."""
    scale = ["-vf", f"scale={size}:{size}:flags=area", "-fps_mode", "passthrough"]
    raw = ffmpeg("-i", path, *options, *scale, "-f", "rawvideo", "-pix_fmt", "rgb24", "-")
    return np.frombuffer(raw, np.uint8).reshape(-1, size, size, 3).transpose(0, 3, 1, 2)


def save_pictures(folder: Path, frames: np.ndarray, names: Sequence[str]) -> Path:
    """Saves frames [T, H, W, 3] as pictures of these names."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, frame in zip(names, frames, strict=True):
        Image.fromarray(frame).save(folder / name)
    return folder
