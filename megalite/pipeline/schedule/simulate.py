"""When each op of a schedule runs, and what it keeps in memory: makespan, bubble, peak activations in flight.

Dependencies and durations alone, with a fixed cost of a transfer between ranks; transfers overlap with computation and
do not share links. Time has the unit of the durations.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from megalite.pipeline.schedule.ops import Done, Kind, Op, Schedule, gives, needs


@dataclass(frozen=True)
class Durations:
    """Time of each stage's forward, input gradient and weight gradient for one microbatch; `transfer`: rank to rank."""

    F: Sequence[float]
    I: Sequence[float]  # noqa: E741
    W: Sequence[float]
    transfer: float = 0.0

    def __post_init__(self) -> None:
        if min(*self.F, *self.I, *self.W) <= 0 or self.transfer < 0:
            raise ValueError("durations of F, I and W are above 0, that of a transfer at least 0")

    @classmethod
    def even(
        cls,
        pp: int,
        chunks: int = 1,
        F: float = 1,
        I: float = 1,  # noqa: E741
        W: float = 1,
        transfer: float = 0,
    ) -> "Durations":
        """Equal stages; the times are those of a rank's whole share, all its chunks together."""
        forward, input_gradient, weight_gradient = ([time / chunks] * (pp * chunks) for time in (F, I, W))
        return cls(forward, input_gradient, weight_gradient, transfer)

    def of(self, op: Op) -> float:
        """Time of one op; of everything but computation none."""
        if op.kind in (Kind.F, Kind.RECOMPUTE):
            return self.F[op.stage]
        if op.kind == Kind.B:
            return self.I[op.stage] + self.W[op.stage]
        return {Kind.I: self.I, Kind.W: self.W}[op.kind][op.stage] if op.kind in (Kind.I, Kind.W) else 0.0

    def ideal(self, schedule: Schedule) -> float:
        """Time without any bubble: the work of the rank that has most."""
        work = [0.0] * schedule.pp
        for stage, rank in enumerate(schedule.placement):
            work[rank] += schedule.microbatches * (self.F[stage] + self.I[stage] + self.W[stage])
        return max(work)


@dataclass(frozen=True, slots=True)
class Event:
    """An op on its rank, from `start` to `end`. The two ops of an overlapped pair have the same times."""

    rank: int
    op: Op
    start: float
    end: float


def simulate(schedule: Schedule, durations: Durations | None = None) -> list[Event]:
    """All ops with their times, each started as early as its row and what it needs allow; in the order of the rows.

    An overlapped pair takes the sum of both times and needs what both need. Raises ValueError on a deadlock, which
    names each rank's op and what it waits for.
    """
    durations = durations or Durations.even(schedule.pp, schedule.chunks)
    rows = [units(row) for row in schedule.rows]
    done: dict[Done, tuple[float, int]] = {}
    place, clock = [0] * schedule.pp, [0.0] * schedule.pp
    events: list[Event] = []
    moved = True
    while moved:
        moved = False
        for rank, row in enumerate(rows):
            while place[rank] < len(row) and (
                (arrived := _arrived(row[place[rank]], rank, schedule, durations, done)) is not None
            ):
                unit, moved = row[place[rank]], True
                start = max(arrived, clock[rank])
                clock[rank] = start + sum(map(durations.of, unit))
                for op in unit:
                    events.append(Event(rank, op, start, clock[rank]))
                    done[gives(op)] = clock[rank], rank
                place[rank] += 1
    stuck = [(rank, row[place[rank]]) for rank, row in enumerate(rows) if place[rank] < len(row)]
    if stuck:
        raise ValueError("; ".join(_waits(rank, unit, schedule.stages, done) for rank, unit in stuck))
    return events


def units(row: Sequence[Op]) -> list[tuple[Op, ...]]:
    """The row with each overlapped pair as one entry."""
    ops = iter(row)
    return [(op, next(ops)) if op.overlaps_next else (op,) for op in ops]


def _arrived(
    unit: tuple[Op, ...], rank: int, schedule: Schedule, durations: Durations, done: dict[Done, tuple[float, int]]
) -> float | None:
    """When all that the ops need is on the rank; None: something has not been computed yet."""
    start = 0.0
    for need in itertools.chain.from_iterable(needs(op, schedule.stages) for op in unit):
        if need not in done:
            return None
        end, where = done[need]
        start = max(start, end + (durations.transfer if where != rank else 0))
    return start


def _waits(rank: int, unit: tuple[Op, ...], stages: int, done: dict[Done, tuple[float, int]]) -> str:
    missing = [Op(*need) for op in unit for need in needs(op, stages) if need not in done]
    return f"rank {rank}: {' with '.join(map(str, unit))} waits for {', '.join(map(str, missing))}, which never comes"
