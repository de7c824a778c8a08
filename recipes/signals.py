"""What asks a run to stop."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

# Ctrl-C and the like, which reach a terminal's whole group.
GROUP_SIGNALS = (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


class Interruption:
    """SIGINT (Ctrl-C), SIGTERM, SIGHUP and SIGUSR1 are acted on between two updates, never within.

    A second SIGINT stops at once, without saving. SIGHUP stays ignored where it was (``nohup``).
    Outside the main thread, where Python allows no handlers (agents of sweeps run there), nothing
    is noted.

    Attributes:
        requested: a signal has come.
    """

    def __init__(self) -> None:
        self.requested = False
        self._interrupts = 0

    def __enter__(self) -> Interruption:
        self._terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
        in_main_thread = threading.current_thread() is threading.main_thread()
        numbers = [*GROUP_SIGNALS, signal.SIGTERM] if in_main_thread else []
        if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
            numbers = [number for number in numbers if number != signal.SIGHUP]
        self._before = {s: signal.signal(s, self._note) for s in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.requested = True
        if number == signal.SIGHUP:  # the terminal is gone: writing to it would be an error
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for descriptor in self._terminals:
                os.dup2(nowhere, descriptor)
            os.close(nowhere)
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            raise KeyboardInterrupt
