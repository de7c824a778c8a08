"""Environments: :func:`make_env` builds any of them, all with the same keys.

Importing this package chooses MuJoCo's off-screen backend (``MUJOCO_GL``) where none is set.
"""

from __future__ import annotations

from prelar_trl.envs.backend import select_backend
from prelar_trl.envs.make import make_env
from prelar_trl.envs.registry import import_factory, is_import_path, register_suite, suites
from prelar_trl.envs.toy import ToyEnv, play_toy, toy_expert, toy_return

select_backend()

__all__ = [
    "ToyEnv",
    "import_factory",
    "is_import_path",
    "make_env",
    "metaworld_tasks",
    "play_toy",
    "register_suite",
    "suites",
    "toy_expert",
    "toy_return",
]


def metaworld_tasks() -> tuple[str, ...]:
    """The names of the 50 Meta-world tasks, such as ``drawer-open``, in alphabetical order."""
    from prelar_trl.envs.metaworld import METAWORLD_TASKS  # imports MuJoCo: seconds, so on demand

    return METAWORLD_TASKS
