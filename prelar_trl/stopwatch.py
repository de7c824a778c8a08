"""Where a program's time goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Stopwatch:
    """Times named stretches of work: ``with watch("env"): ...``. Stretches do not overlap.

    A GPU works on after it has been asked to, so by default a stretch holds the time for which the
    program was kept, and the wait falls to whatever first needs a result. With
    ``wait=torch.cuda.synchronize`` a stretch holds its own work on the GPU, at the price of speed.

    Args:
        wait: called before and after each stretch. Default: nothing.

    Attributes:
        times: milliseconds of each stretch by name, since the last lap.
    """

    def __init__(self, wait: Callable[[], object] = lambda: None) -> None:
        self.wait = wait
        self.times: dict[str, list[float]] = {}
        self._lap, self._step = time.perf_counter(), 0

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.wait()
        start = time.perf_counter()
        yield
        self.wait()
        self.times.setdefault(name, []).append(1e3 * (time.perf_counter() - start))

    def lap(self, step: int) -> dict[str, float]:
        """Ends a lap at ``step``, and begins the next.

        Returns:
            ``seconds`` of the lap, ``steps_per_s`` unless there were none, and the share of each
            stretch, ``time/<name>``; ``time/rest`` is what no stretch holds.
        """
        now = time.perf_counter()
        seconds, steps = now - self._lap, step - self._step
        shares = {f"time/{name}": sum(ms) / 1e3 / seconds for name, ms in self.times.items()}
        shares["time/rest"] = 1 - sum(shares.values())
        self.times, self._lap, self._step = {}, now, step
        rate = {"steps_per_s": steps / seconds} if steps else {}
        return {"seconds": seconds, **rate, **shares}
