"""Progress of anything that takes longer than two seconds: a bar on a terminal, a plain line now and then elsewhere.

Knows nothing of training (that live line is `train/observers/progress_line.py`). Starts no threads, so that code which
forks workers may run inside. Everything goes to stderr; NO_COLOR and dumb terminals are honoured.
"""

import math
import sys
import time
from types import TracebackType
from typing import IO, Self

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress

REFRESH_SECONDS = 0.1


class Progress:
    """`with Progress("tokenizing", total=n, unit="B") as bar: bar.advance(k)`.

    `total`: units of work in all, or None when unknown. `unit`: "B" prints bytes as kB, MB, GB; any other word is
    printed as it is. `show=False` (ranks other than 0) prints nothing. `delay`, `interval`: seconds of silence at the
    start and between two plain lines.
    """

    def __init__(
        self,
        description: str,
        total: float | None = None,
        unit: str = "",
        *,
        show: bool = True,
        stream: IO[str] | None = None,
        delay: float = 2.0,
        interval: float = 10.0,
    ) -> None:
        self.description, self.total, self.unit = description, total, unit
        self.done = 0.0
        self._show, self._delay, self._interval = show, delay, interval
        self._console = Console(file=stream or sys.stderr, highlight=False, soft_wrap=True)
        self._live = self._console.is_terminal and not self._console.is_dumb_terminal
        self._bar: RichProgress | None = None
        self._start = self._next = time.monotonic()
        self._shown = False

    def __enter__(self) -> Self:
        self._start = time.monotonic()
        self._next = self._start + self._delay
        return self

    def advance(self, amount: float = 1) -> None:
        """Count `amount` more units as done."""
        self.done += amount
        now = time.monotonic()
        if not self._show or now < self._next:
            return
        self._shown = True
        if self._live:
            self._next = now + REFRESH_SECONDS
            self._draw()
        else:
            self._next = now + self._interval
            self._console.print(f"{self.description}: {self.status()}", markup=False)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._draw()
            self._bar.stop()
        elif self._shown and kind is None:
            seconds = duration(time.monotonic() - self._start)
            self._console.print(f"{self.description}: {quantity(self.done, self.unit)} in {seconds}", markup=False)

    def status(self) -> str:
        """For example `3.40 MB of 11.2 MB (30%), 1.25 MB/s, 0:06 left`."""
        seconds = max(time.monotonic() - self._start, 1e-9)
        rate = self.done / seconds
        speed = f"{quantity(rate, self.unit or '1')}/s"
        if not self.total:
            return f"{quantity(self.done, self.unit)}, {speed}"
        share = min(self.done / self.total, 1.0)
        left = f", {duration((self.total - self.done) / rate)} left" if rate > 0 else ""
        done = quantity(self.done, self.unit if self.unit == "B" else "")
        return f"{done} of {quantity(self.total, self.unit)} ({share:.0%}), {speed}{left}"

    def _draw(self) -> None:
        if self._bar is None:
            self._bar = RichProgress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[status]}", markup=False),
                console=self._console,
                auto_refresh=False,
            )
            self._bar.add_task(self.description, total=self.total, status="")
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=self.done, status=self.status())
        self._bar.refresh()


def quantity(value: float, unit: str = "") -> str:
    """`value` to three digits with a decimal prefix: 11.4 MB, 2.1k tokens, 820."""
    billion = "G" if unit == "B" else "B"
    prefixes = (("T", 1e12), (billion, 1e9), ("M", 1e6), ("k", 1e3))
    prefix, scale = next(((name, size) for name, size in prefixes if abs(value) >= 0.9995 * size), ("", 1.0))
    scaled = value / scale
    digits = 0 if scaled >= 99.95 or (scale == 1.0 and scaled == int(scaled)) else 1 if scaled >= 9.995 else 2
    number = f"{scaled:.{digits}f}"
    if unit == "B":
        return f"{number} {prefix}B"
    return f"{number}{prefix}" + (f" {unit}" if unit not in ("", "1") else "")


def duration(seconds: float) -> str:
    """m:ss, h:mm:ss, or `3d 04h` beyond two days."""
    if not math.isfinite(seconds):
        return "?"
    whole = max(int(seconds + 0.5), 0)
    hours, minutes = whole // 3600, whole % 3600 // 60
    if hours >= 48:
        return f"{hours // 24}d {hours % 24:02d}h"
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"
