"""Pictures of a MuJoCo simulation: one renderer per environment."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import mujoco
import numpy as np
import torch

from prelar_trl.envs.backend import rendering_error
from prelar_trl.types import RenderQuality
from prelar_trl.utils import check_choice


class Camera:
    """Draws one simulation from one camera; an instance is called to get the present picture.

    gymnasium's own renderer mixes up the frames of several environments in one process, so each
    environment gets a ``mujoco.Renderer`` (and OpenGL context) of its own.

    Args:
        model: the MuJoCo model. With ``fast`` its visual quality settings are changed.
        data: the MuJoCo data that is drawn.
        camera: a camera of the model; ``None`` takes the first, or a free view where there is none.
        size: height and width of the picture in pixels.
        quality: ``fast`` leaves out shadows, anti-aliasing and reflections; ``full`` has them.
        before: called before each picture, to show what the environment marks only then.
        flip: turn the picture upside down (for cameras that are mounted the wrong way up).

    Raises:
        ValueError: unknown ``camera`` or ``quality``.
        RuntimeError: MuJoCo cannot render on this machine.
    """

    def __init__(
        self,
        model: mujoco.MjModel,
        data: mujoco.MjData,
        *,
        camera: str | None = None,
        size: int = 64,
        quality: RenderQuality = "fast",
        before: Callable[[], None] | None = None,
        flip: bool = False,
    ) -> None:
        names = [model.camera(index).name for index in range(model.ncam)]
        if camera is not None and camera not in names:
            raise ValueError(f"unknown camera {camera!r}; this environment has {', '.join(names)}")
        check_choice("render_quality", quality, get_args(RenderQuality))
        if quality == "fast":  # read when the renderer is created: set before
            model.vis.quality.shadowsize = 0
            model.vis.quality.offsamples = 0
        model.vis.global_.offwidth = max(model.vis.global_.offwidth, size)
        model.vis.global_.offheight = max(model.vis.global_.offheight, size)
        self._data = data
        self._camera = camera if camera is not None else min(0, model.ncam - 1)
        self._flip, self._before = flip, before
        try:
            self._renderer = mujoco.Renderer(model, size, size)
        except Exception as error:  # each OpenGL backend fails with a type of its own
            raise rendering_error(error) from error
        if quality == "fast":
            self._renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False

    def __call__(self) -> torch.Tensor:
        """The present picture, uint8 [3, size, size]."""
        if self._before is not None:
            self._before()
        self._renderer.update_scene(self._data, camera=self._camera)
        frame = self._renderer.render()  # [H, W, 3]
        if self._flip:
            frame = frame[::-1]
        return torch.from_numpy(np.ascontiguousarray(frame.transpose(2, 0, 1)))

    def close(self) -> None:
        """Free the OpenGL context of this camera, and no other's."""
        self._renderer.close()
