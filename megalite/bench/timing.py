"""How long a call takes: from a flushed cache, after it has become steady, in turns with the others.

On CUDA events around each call, queued without waiting; on a CPU the clock. What the machine reaches at best is
measured here too, on the spot: a matrix product and a copy.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megalite.train.peak import measured_matmul_peak

STEADY = 0.1
"""Warm-up ends when two groups of calls agree to this share."""


@dataclass(frozen=True)
class Call:
    """`run` is timed. `before`, if any, is not; its result is handed to `run`."""

    run: Callable[[Any], Any]
    before: Callable[[], Any] | None = None

    def __call__(self) -> Any:
        return self.run(self.before() if self.before else None)


@dataclass(frozen=True)
class Times:
    """Seconds: the median, and what 20 % and 80 % of the calls stay below."""

    median: float
    low: float
    high: float
    calls: int


def summary(seconds: Sequence[float]) -> Times:
    if len(seconds) == 1:
        return Times(seconds[0], seconds[0], seconds[0], 1)
    fifths = statistics.quantiles(seconds, n=5, method="inclusive")
    return Times(statistics.median(seconds), fifths[0], fifths[3], len(seconds))


def cache_bytes(device: torch.device) -> int:
    """Size of the last cache before memory; 32 MiB where a CPU's is not told."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 1 << 10, "M": 1 << 20}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=32 << 20)


class Clock:
    """Times calls on `device`, each after at least twice the last cache's bytes have been written.

    On CUDA 256 MiB at least: while they are written, the launches of the call that follows are queued.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        size = max(2 * cache_bytes(device), 1 << 28 if device.type == "cuda" else 0)
        self.flushed = torch.empty(size, dtype=torch.int8, device=device)

    def times(self, call: Call, count: int) -> list[float]:
        """Seconds of each of `count` calls."""
        return self._by_events(call, count) if self.device.type == "cuda" else self._by_clock(call, count)

    def _by_clock(self, call: Call, count: int) -> list[float]:
        found = []
        for i in range(count):
            given = call.before() if call.before else None
            self.flushed.fill_(i % 100)
            started = time.perf_counter()
            call.run(given)
            found.append(time.perf_counter() - started)
        return found

    def _by_events(self, call: Call, count: int) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for start, end in events:
            given = call.before() if call.before else None
            self.flushed.zero_()
            start.record()
            call.run(given)
            end.record()
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(end) / 1e3 for start, end in events]

    def settle(self, call: Call, patience: float = 1.0) -> float:
        """Seconds that a call takes by the wall, flush and all, once it is steady, or after `patience` seconds.

        The first call, which may compile, does not count.
        """
        call()
        deadline, previous = time.perf_counter() + patience, float("inf")
        while True:
            started = time.perf_counter()
            now = statistics.median(self.times(call, 3))
            wall = (time.perf_counter() - started) / 3
            if abs(now - previous) <= STEADY * now or time.perf_counter() > deadline:
                return wall
            previous = now


def in_turns(
    clock: Clock, calls: dict[str, Call], counts: dict[str, int], rounds: int, done: Callable[[], None]
) -> dict[str, Times]:
    """Times of each call: `rounds` turns of so many `counts`, one after another, so that a slow minute hits all.

    The one that begins changes with every round. `done` is called after a turn.
    """
    found: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(rounds):
        for name in itertools.islice(itertools.cycle(names), turn, turn + len(names)):
            found[name] += clock.times(calls[name], counts[name])
            done()
    return {name: summary(each) for name, each in found.items()}


def as_graph(call: Call) -> Call:
    """The call recorded as a CUDA graph, so that launching its kernels costs nothing."""
    assert call.before is None
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call.run(None)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call.run(None)
    return Call(lambda _: graph.replay())


@dataclass(frozen=True)
class Peaks:
    """What this machine reached just now: FLOP/s of a square matrix product, bytes/s of a copy (read and written)."""

    flops: float
    bytes: float


def measure_peaks(device: torch.device, dtype: torch.dtype) -> Peaks:
    source = torch.ones(max(4 * cache_bytes(device), 1 << 28), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    clock, copy = Clock(device), Call(lambda _: target.copy_(source))
    clock.settle(copy)
    seconds = min(clock.times(copy, 5))
    return Peaks(measured_matmul_peak(device, dtype), 2 * source.numel() / seconds)
