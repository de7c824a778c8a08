"""Choice of MuJoCo's off-screen OpenGL backend. Imports nothing heavy."""

from __future__ import annotations

import contextlib
import ctypes.util
import importlib
import os
import sys

from prelar_trl.utils import one_line


def select_backend() -> None:
    """Set ``MUJOCO_GL`` to ``egl``, else ``osmesa``, where it is unset and Linux has the library.

    MuJoCo reads the variable once, at its import, and ``import torchrl.envs`` already imports it.
    So that the order of imports does not matter, the part of MuJoCo that reads it is reloaded.
    """
    if "MUJOCO_GL" in os.environ or not sys.platform.startswith("linux"):
        return
    for backend, library in (("egl", "EGL"), ("osmesa", "OSMesa")):
        if ctypes.util.find_library(library):
            os.environ["MUJOCO_GL"] = backend
            break
    if "mujoco.gl_context" in sys.modules:
        with contextlib.suppress(ImportError, AttributeError):  # a broken library: Camera reports
            importlib.reload(sys.modules["mujoco.gl_context"])


def rendering_error(error: BaseException) -> RuntimeError:
    """The one-line error for a machine on which no picture can be drawn, with the way out."""
    backend = os.environ.get("MUJOCO_GL", "unset")
    packages = "libosmesa6" if backend == "osmesa" else "libegl1 libgl1"
    other = "" if backend == "osmesa" else " (or libosmesa6, with MUJOCO_GL=osmesa)"
    sudo = "" if os.geteuid() == 0 else "sudo "
    reason = one_line(error) or type(error).__name__
    return RuntimeError(
        f"MuJoCo cannot render off-screen with MUJOCO_GL={backend} ({reason[:120]}); "
        f"on Debian run: {sudo}apt-get install -y {packages}{other}"
    )
