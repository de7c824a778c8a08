"""``python -m prelar_trl.envs.rendering``: can this machine draw MuJoCo pictures off-screen?

Exits with 0 if it can; otherwise prints one line with the command that fixes it and exits with 1.
"""

from __future__ import annotations

import importlib
import os
import sys

from prelar_trl.envs.backend import rendering_error, select_backend

_SCENE = """<mujoco><worldbody>
<light pos="0 0 3"/><geom type="sphere" size="1" rgba="1 0 0 1"/>
</worldbody></mujoco>"""


def check_rendering() -> None:
    """Draw a red ball. Raises RuntimeError with a one-line remedy where that fails."""
    select_backend()
    try:
        mujoco = importlib.import_module("mujoco")  # a broken OpenGL library fails right here
        model = mujoco.MjModel.from_xml_string(_SCENE)
        data = mujoco.MjData(model)
        mujoco.mj_forward(model, data)
        with mujoco.Renderer(model, 64, 64) as renderer:
            renderer.update_scene(data)
            picture = renderer.render()
        if picture[32, 32, 0] == 0:
            raise RuntimeError("the picture came out black")
    except Exception as error:  # each OpenGL backend fails with a type of its own
        raise rendering_error(error) from error


def main() -> int:
    """Report on stdout; the return value is the exit status."""
    try:
        check_rendering()
    except RuntimeError as error:
        sys.stdout.write(f"{error}\n")
        return 1
    sys.stdout.write(f"off-screen rendering works (MUJOCO_GL={os.environ.get('MUJOCO_GL')})\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
