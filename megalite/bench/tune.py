"""Tiles measured here and kept in a file: `megalite bench OP tune=FILE.json`. See megalite_kernels.tuning."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from megalite_kernels.gpu.chips import chip_of
from megalite_kernels.gpu.tune import defaults, flat, tune
from megalite_kernels.tuning import Tuned
from torch import Tensor

from megalite.bench.ops import OPS, Maker, Op
from megalite.bench.peers import Build
from megalite.bench.runner import TOLERANCE, gradients, outputs_of, relative_error
from megalite.bench.shapes import Shape
from megalite.bench.timing import Call, Clock
from megalite.errors import UserError

CALLS = 10
"""Timed calls of a candidate, forward and backward together."""


def open_record(path: Path, op: str, device: torch.device) -> Tuned:
    """What a file says of this GPU. Raises UserError for an op without tiles to tune, or a damaged file."""
    if OPS[op].tiled is None:
        able = ", ".join(name for name, entry in OPS.items() if entry.tiled)
        raise UserError(f"tune={path}: {op} has no tiles that are tuned; there are {able}")
    try:
        return Tuned.load(path, device)
    except ValueError as error:
        raise UserError(f"tune={error}") from None


def tuned(
    op: str, shapes: Sequence[Shape], record: Tuned, path: Path, clock: Clock, dtype: torch.dtype,
    say: Callable[[str], None] = print,
) -> Build:  # fmt: skip
    """Megalite's op with the best tiles for each shape: those on record, or measured now and put there."""
    entry = OPS[op]
    assert entry.tiled is not None
    run = entry.tiled.run
    for shape in shapes:
        sizes = entry.tiled.sizes(shape)
        if record.tiles(entry.kernel, dtype, sizes) is None:
            trial = _Trial(entry, shape, record, clock, dtype)
            best = tune(entry.kernel, chip_of(clock.device), dtype, sizes, trial.seconds)
            record = record.with_tiles(entry.kernel, dtype, sizes, best)
            record.save(path)
            at = f"{op}, {shape.name}, {shape.sequence_length} x {shape.batch}"
            say(f"tuned {at}: {len(trial.times)} candidates, {trial.failed} failed, {trial.gain:.2f}x of the default")
    return lambda s, t: lambda: run(s, t, record)


class _Trial:
    """Measures an op at one shape with given tiles. The first to be measured is the default, which is right."""

    def __init__(self, op: Op, shape: Shape, record: Tuned, clock: Clock, dtype: torch.dtype) -> None:
        assert op.tiled is not None
        self.kernel, self.tiled, self.shape, self.record = op.kernel, op.tiled, shape, record
        self.clock, self.dtype, self.sizes = clock, dtype, op.tiled.sizes(shape)
        self.tensors = op.inputs(shape, Maker(clock.device, dtype))
        default = flat(op.kernel, defaults(op.kernel, chip_of(clock.device), dtype, self.sizes))
        make = Maker(clock.device, dtype, seed=1)
        self.upstream = [make.normal(*output.shape) for output in outputs_of(self._call(default)())]
        self.right = self._results(default)
        self.times: list[float] = []

    def _call(self, tiles: list[int]) -> Callable[[], Any]:
        record = self.record.with_tiles(self.kernel, self.dtype, self.sizes, tiles)
        return lambda: self.tiled.run(self.shape, self.tensors, record)

    def _results(self, tiles: list[int]) -> list[Tensor]:
        outputs = outputs_of(self._call(tiles)())
        return [*(x.detach() for x in outputs), *gradients(lambda: outputs, self.tensors, self.upstream)]

    def seconds(self, tiles: list[int]) -> float:
        """Median of both ways; inf for what does not compile, does not start or gives other numbers."""
        found = float("inf")
        try:
            pairs = zip(self._results(tiles), self.right, strict=True)
            if max(relative_error(x, right) for x, right in pairs) <= 2 * TOLERANCE[self.dtype]:
                both = Call(lambda _: gradients(self._call(tiles), self.tensors, self.upstream))
                found = statistics.median(self.clock.times(both, CALLS))
        except Exception:  # a compiler's, a driver's: of any kind; how many there were is said
            pass
        self.times.append(found)
        return found

    @property
    def failed(self) -> int:
        return self.times.count(float("inf"))

    @property
    def gain(self) -> float:
        return self.times[0] / min(self.times)
