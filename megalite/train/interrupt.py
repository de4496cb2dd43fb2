"""SIGTERM and Ctrl-C ask for a stop: the current step ends, a checkpoint is written, the run exits cleanly."""

import signal
from types import FrameType
from typing import Any


class Stopped(Exception):
    """Work that may be left undone was left for a stop."""


class StopRequest:
    """Context manager; `asked` becomes True on the first signal, a second one interrupts at once."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.asked = False
        self._previous: dict[int, Any] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __enter__(self) -> "StopRequest":
        try:
            self._previous = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        except ValueError:  # only the main thread may install handlers; elsewhere the caller's stay
            self._previous = {}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
