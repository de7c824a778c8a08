"""Dense optical flow as pictures, for ``latent input = flow``.

Row t of the stream belongs to the step that led to frame t, as actions do: row 0 is still. Hue is
the direction, saturation the speed, white is standing still; full saturation is reached at
``FULL_SPEED`` of the picture's width a frame, the same for every clip.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from types import ModuleType

import numpy as np

FLOW_SIZE = 128  # flow is found at this size, then made smaller
FULL_SPEED = 1 / 8


def opencv() -> ModuleType:
    """OpenCV.

    Raises:
        ImportError: it is not installed.
    """
    if importlib.util.find_spec("cv2") is None:
        raise ImportError(
            "optical flow needs OpenCV, which is not installed: pip install opencv-python-headless"
        )
    import cv2  # an extra of this project, so not at the top

    cv2.setNumThreads(1)
    return cv2


def flow_pictures(grey: Sequence[np.ndarray], size: int) -> list[np.ndarray]:
    """Flow from each frame to the next as pictures.

    Args:
        grey: T frames uint8 ``[FLOW_SIZE, FLOW_SIZE]``.
        size: height and width of the result.

    Returns:
        T pictures uint8 ``[size, size, 3]``, the first one white.
    """
    cv2 = opencv()
    finder = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    pictures = [np.full((size, size, 3), 255, np.uint8)]
    for before, after in zip(grey[:-1], grey[1:], strict=True):
        flow = finder.calc(np.ascontiguousarray(before), np.ascontiguousarray(after), None)
        picture = flow_colours(flow)
        pictures.append(cv2.resize(picture, (size, size), interpolation=cv2.INTER_AREA))
    return pictures


def flow_colours(flow: np.ndarray) -> np.ndarray:
    """Flow ``[H, W, 2]`` (x to the right, y downwards, in pixels) as RGB uint8 ``[H, W, 3]``.

    A hue wheel: to the right red, downwards yellow-green, to the left cyan, upwards violet.
    """
    speed = np.hypot(flow[..., 0], flow[..., 1]) / (FULL_SPEED * flow.shape[1])
    angle = np.arctan2(flow[..., 1], flow[..., 0]) / (2 * np.pi)  # turns
    saturation = np.clip(speed, 0, 1)[..., None]
    hue = (angle[..., None] + np.array([0, -1 / 3, 1 / 3])) % 1  # [H, W, 3]
    colour = np.clip(np.abs(hue * 6 - 3) - 1, 0, 1)
    return np.round(255 * (1 - saturation * (1 - colour))).astype(np.uint8)
