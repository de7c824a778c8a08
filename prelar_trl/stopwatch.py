"""Where a program's time goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Stopwatch:
    """Times named sections of work: ``with watch("env"): ...``. Sections do not overlap.

    A GPU works on after it has been asked to, so by default a section holds the time for which the
    program was kept, and the wait falls to whatever first needs a result. With
    ``wait=torch.cuda.synchronize`` a section holds its own work on the GPU, at the price of speed.

    Args:
        wait: called before and after each section. Default: nothing.

    Attributes:
        times: milliseconds of each section by name, since the last `summary`.
    """

    def __init__(self, wait: Callable[[], object] = lambda: None) -> None:
        self.wait = wait
        self.times: dict[str, list[float]] = {}
        self._start, self._step = time.perf_counter(), 0

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.wait()
        start = time.perf_counter()
        yield
        self.wait()
        self.times.setdefault(name, []).append(1e3 * (time.perf_counter() - start))

    def summary(self, step: int) -> dict[str, float]:
        """Sums up the time since the last call, and begins anew.

        Args:
            step: how many steps there are now.

        Returns:
            ``seconds`` since then, ``steps_per_s`` unless there were none, and the share of each
            section, ``time/<name>``; ``time/rest`` is what no section holds.
        """
        now = time.perf_counter()
        seconds, steps = now - self._start, step - self._step
        shares = {f"time/{name}": sum(ms) / 1e3 / seconds for name, ms in self.times.items()}
        shares["time/rest"] = 1 - sum(shares.values())
        self.times, self._start, self._step = {}, now, step
        rate = {"steps_per_s": steps / seconds} if steps else {}
        return {"seconds": seconds, **rate, **shares}
