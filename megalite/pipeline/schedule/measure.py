"""What a schedule costs: makespan, bubble in both conventions in print, and activations in flight on each rank."""

from collections.abc import Sequence
from dataclasses import dataclass

from megalite.pipeline.schedule.ops import Kind, Op, Schedule
from megalite.pipeline.schedule.simulate import Durations, Event, simulate


@dataclass(frozen=True)
class Cost:
    """Times in the unit of the durations; memory in activations of one microbatch on all stages of a rank."""

    makespan: float
    ideal: float  # the work of the rank that has most
    spans: tuple[float, ...]  # of each rank: from its first op's start to its last op's end
    in_flight: tuple[float, ...]  # of each rank, at its peak: forwards without their input gradient
    until_weights: tuple[float, ...]  # the same, kept until the weight gradient

    @property
    def bubble_to_ideal(self) -> float:
        """Idle time over the time of the work, as in Narayanan et al. 2021."""
        return self.makespan / self.ideal - 1

    @property
    def bubble_to_makespan(self) -> float:
        """Idle time over all the time, as in Qi et al. 2024."""
        return 1 - self.ideal / self.makespan


def measure(schedule: Schedule, durations: Durations | None = None) -> Cost:
    """The schedule's cost; by default with F = I = W = 1 for a rank's share. Raises ValueError on a deadlock."""
    durations = durations or Durations.even(schedule.pp, schedule.chunks)
    return cost_of(schedule, simulate(schedule, durations), durations)


def cost_of(schedule: Schedule, events: Sequence[Event], durations: Durations) -> Cost:
    """The cost of events that `simulate` has found with these durations."""
    by_rank = [[event for event in events if event.rank == rank] for rank in range(schedule.pp)]
    return Cost(
        makespan=max(event.end for event in events),
        ideal=durations.ideal(schedule),
        spans=tuple(max(e.end for e in mine) - min(e.start for e in mine) for mine in by_rank),
        in_flight=tuple(peak(row, Kind.I) / schedule.chunks for row in schedule.rows),
        until_weights=tuple(peak(row, Kind.W) / schedule.chunks for row in schedule.rows),
    )


def peak(row: Sequence[Op], freed_by: Kind) -> int:
    """The most activations, one a stage and microbatch, that a row keeps from F to `freed_by` (I or W) or B."""
    kept = most = 0
    for op in row:
        kept += (op.kind == Kind.F) - (op.kind in (Kind.B, freed_by))
        most = max(most, kept)
    return most
