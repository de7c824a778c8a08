"""A progress bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from datetime import timedelta
from typing import TextIO

from torch import Tensor
from tqdm import tqdm

BAR = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}"


@dataclass(eq=False)
class Progress:
    """Shows how far a loop is, updates a second, frames a second and the newest metrics.

    On a terminal a bar that is redrawn at most twice a second; elsewhere (a file, CI) one line
    every ``every`` seconds and one at the end. Metrics become numbers only when shown, so that
    a tensor on a GPU is not waited for at each update.

    Args:
        total: the number of updates at the end.
        initial: the number already done. Default: 0.
        name: what is going on, e.g. "pretrain".
        unit: what is counted, in the plural. Default: "updates".
        every: seconds between lines without a terminal. Default: 30.
        stream: default: ``sys.stderr``.
        hidden: show nothing. Default: False.
    """

    total: int
    _: KW_ONLY
    initial: int = 0
    name: str = ""
    unit: str = "updates"
    every: float = 30.0
    stream: TextIO = field(default_factory=lambda: sys.stderr)
    hidden: bool = False

    def __post_init__(self) -> None:
        self._bar = None
        self._pause = self.every
        if self.stream.isatty() and not self.hidden:  # tqdm starts a thread, disabled too
            self._bar = tqdm(
                total=self.total,
                initial=self.initial,
                desc=self.name,
                file=self.stream,
                bar_format=BAR,
                dynamic_ncols=True,
            )
            self._pause = 0.5
        self.count, self._frames = self.initial, 0
        self._metrics: Mapping[str, float | Tensor] = {}
        self._start = self._shown = (time.monotonic(), self.initial, 0)  # when, updates, frames

    def update(
        self,
        count: int = 1,
        *,
        frames: int = 0,
        metrics: Mapping[str, float | Tensor] | None = None,
    ) -> None:
        """Count ``count`` more updates, which took ``frames`` frames, and note new metrics."""
        self.count += count
        self._frames += frames
        if metrics is not None:
            self._metrics = {**self._metrics, **metrics}
        if not self.hidden and time.monotonic() - self._shown[0] >= self._pause:
            self._show()

    def close(self) -> None:
        """Show the last state, with the mean pace, and end."""
        if not self.hidden:
            self._show(last=True)
        if self._bar is not None:
            self._bar.close()

    def _show(self, last: bool = False) -> None:
        now, (start, start_count, _) = time.monotonic(), self._start
        before, count, frames = self._start if last else self._shown
        seconds = max(now - before, 1e-9)
        parts = [f"{_number((self.count - count) / seconds)} {self.unit}/s"]
        if self._frames:
            parts.append(f"{_number((self._frames - frames) / seconds)} frames/s")
        parts += [f"{key} {_number(float(value))}" for key, value in self._metrics.items()]
        text = ", ".join(parts)
        if self._bar is not None:
            self._bar.n = self.count
            self._bar.set_postfix_str(text)
        else:
            clock = f"after {_clock(now - start)}"
            if not last and self.count > start_count:
                pace = (now - start) / (self.count - start_count)
                clock += f", {_clock(pace * (self.total - self.count))} to go"
            name = f"{self.name}: " if self.name else ""
            self.stream.write(f"{name}{self.count}/{self.total} {self.unit} {clock}, {text}\n")
            self.stream.flush()
        self._shown = (now, self.count, self._frames)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
