"""Dense optical flow as pictures, for ``latent input = flow``.

Row t of the stream belongs to the step that led to frame t, as actions do: row 0 is still. Hue is
the direction, saturation the speed, white is standing still; full saturation is reached at
``FULL_SPEED`` of the picture's width a frame, the same for every clip.
"""

from __future__ import annotations

import importlib.util
from types import ModuleType

import numpy as np

FLOW_SIZE = 128  # flow is found at this size, then made smaller
FULL_SPEED = 1 / 8


def opencv() -> ModuleType:
    """OpenCV; ImportError if it is not installed."""
    if importlib.util.find_spec("cv2") is None:
        raise ImportError(
            "optical flow needs OpenCV, which is not installed: pip install opencv-python-headless"
        )
    import cv2  # an extra of this project, so not at the top

    cv2.setNumThreads(1)
    return cv2


class FlowPictures:
    """Flow from each frame to the next as a picture of ``size`` x ``size``, frame by frame."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._cv2 = opencv()
        self._finder = self._cv2.DISOpticalFlow_create(self._cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        self._before: np.ndarray | None = None

    def __call__(self, gray: np.ndarray) -> np.ndarray:
        """The flow, uint8 ``[size, size, 3]``, that led to this frame; white for the first one.

        ``gray`` is uint8 ``[FLOW_SIZE, FLOW_SIZE]``.
        """
        after = np.ascontiguousarray(gray)
        before, self._before = self._before, after
        size = (self.size, self.size)
        if before is None:
            return np.full((*size, 3), 255, np.uint8)
        picture = flow_colors(self._finder.calc(before, after, None))
        return self._cv2.resize(picture, size, interpolation=self._cv2.INTER_AREA)


def flow_colors(flow: np.ndarray) -> np.ndarray:
    """Flow ``[H, W, 2]`` (x to the right, y downwards, in pixels) as RGB uint8 ``[H, W, 3]``.

    A hue wheel: to the right red, downwards yellow-green, to the left cyan, upwards violet.
    """
    speed = np.hypot(flow[..., 0], flow[..., 1]) / (FULL_SPEED * flow.shape[1])
    angle = np.arctan2(flow[..., 1], flow[..., 0]) / (2 * np.pi)  # turns
    saturation = np.clip(speed, 0, 1)[..., None]
    hue = (angle[..., None] + np.array([0, -1 / 3, 1 / 3])) % 1  # [H, W, 3]
    color = np.clip(np.abs(hue * 6 - 3) - 1, 0, 1)
    return np.round(255 * (1 - saturation * (1 - color))).astype(np.uint8)
