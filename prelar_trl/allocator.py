"""Memory of long work on the CPU: blocks that are freed and asked for again in every update.

glibc gives every large block back to the kernel, which hands out, and clears, a new one: up to a
third of an update's time. gperftools' tcmalloc keeps them, without holding more than it needs.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import multiprocessing
import os
import sys
from pathlib import Path

__all__ = ["keep_freed_memory", "tcmalloc_environment", "with_tcmalloc"]

CHOICE = "PRELAR_MALLOC"  # environment variable; "system" leaves the allocator as it is
PRELOAD = ("LD_PRELOAD", "TCMALLOC_RELEASE_RATE", "TCMALLOC_LARGE_ALLOC_REPORT_THRESHOLD")


def tcmalloc_environment() -> dict[str, str]:
    """Environment variables that start a program with tcmalloc; empty where it is not installed.

    Also empty if another library is preloaded already, or with ``PRELAR_MALLOC=system``.
    """
    if os.environ.get(CHOICE) or os.environ.get("LD_PRELOAD"):
        return {}
    library = ctypes.util.find_library("tcmalloc_minimal") if sys.platform == "linux" else None
    if library is None:
        return {}
    # Never back to the kernel, and no report of large blocks.
    return dict(zip(PRELOAD, (library, "0", str(2**62)), strict=True)) | {CHOICE: "tcmalloc"}


def with_tcmalloc() -> None:
    """Start this program anew, with the same arguments, under tcmalloc; else keep freed memory.

    Only a program that can be started anew: no worker process, no script from standard input, no
    interactive session. Its own children run without tcmalloc.
    """
    if os.environ.get(CHOICE) == "tcmalloc":  # started anew
        for name in PRELOAD:
            os.environ.pop(name, None)
    environment, arguments = tcmalloc_environment(), sys.orig_argv[1:]
    interactive = not arguments or "-" in arguments or sys.flags.interactive
    if environment and not interactive and multiprocessing.parent_process() is None:
        sys.stdout.flush()
        sys.stderr.flush()
        os.environ.update(environment)
        os.execv(sys.executable, [sys.executable, *arguments])
    keep_freed_memory()


def keep_freed_memory() -> bool:
    """Let this process keep the memory it frees for what it allocates next (Linux with glibc).

    It then holds its high-water mark, which is up to twice what it needs: glibc does not reuse a
    hole for an aligned block of the same size. Nothing changes under tcmalloc.

    Returns:
        Whether the C library took the settings.
    """
    if sys.platform != "linux" or "tcmalloc" in Path("/proc/self/maps").read_text():
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # M_MMAP_MAX: no separate mappings; M_TRIM_THRESHOLD: never shrink; M_TOP_PAD: grow by 64 MiB.
    settings = ((-4, 0), (-1, -1), (-2, 64 << 20))
    return mallopt is not None and all(mallopt(name, value) for name, value in settings)
