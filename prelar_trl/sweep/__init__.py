"""Many runs as one: methods x tasks x seeds, their states on disk, and where they are started.

Needs no torch; what it keeps of a run, in :mod:`prelar_trl.sweep.results`, does.
"""

from __future__ import annotations

from prelar_trl.sweep.engine import Engine, Results, module_command
from prelar_trl.sweep.jobs import Job, Suite, Variant
from prelar_trl.sweep.launchers import Launcher, LocalLauncher, Program, RayLauncher, SlurmLauncher
from prelar_trl.sweep.source import Source, lock_root, locked, prepare_source
from prelar_trl.utils import STOPPED

__all__ = [
    "STOPPED",
    "Engine",
    "Job",
    "Launcher",
    "LocalLauncher",
    "Program",
    "RayLauncher",
    "Results",
    "SlurmLauncher",
    "Source",
    "Suite",
    "Variant",
    "lock_root",
    "locked",
    "module_command",
    "prepare_source",
]
