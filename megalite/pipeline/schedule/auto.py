"""zb_auto: the shortest of several zero-bubble schedules that keep within a memory limit, for given durations.

Candidates are greedy schedules that start differently far ahead, and ZB-H1 and ZB-H2 where they fit: so it is never
longer than those. Follows Qi et al. 2024, "Zero Bubble Pipeline Parallelism", which searches the same choices.
"""

import math
from collections.abc import Iterator

from megalite.pipeline.schedule.fill import Filler
from megalite.pipeline.schedule.measure import measure
from megalite.pipeline.schedule.ops import Kind, Op, Schedule, loop_placement
from megalite.pipeline.schedule.simulate import Durations
from megalite.pipeline.schedule.zero_bubble import handcrafted

DEPTHS = (1.0, 1.5, 2.0, 3.0, math.inf)
"""Forwards ahead of the first input gradient, for each rank behind."""


def zb_auto(pp: int, microbatches: int, limit: int, durations: Durations) -> list[list[Op]]:
    """The rows with the least makespan, then rank span, then memory; a rank keeps at most `limit` microbatches."""

    def cost(rows: list[list[Op]]) -> tuple[float, float, float]:
        schedule = Schedule("zb_auto", pp, 1, microbatches, loop_placement(pp, 1), tuple(map(tuple, rows)))
        found = measure(schedule, durations)
        return round(found.makespan, 9), round(max(found.spans), 9), max(found.until_weights)

    return min(_candidates(pp, microbatches, limit, durations), key=cost)


def _candidates(pp: int, microbatches: int, limit: int, durations: Durations) -> Iterator[list[list[Op]]]:
    for hops, enough in ((1, pp), (2, 2 * pp - 1)):
        if limit >= min(enough, microbatches):
            yield [handcrafted(rank, pp, 1, [microbatches], hops) for rank in range(pp)]
    queues = [[[Op(kind, rank, n) for n in range(microbatches)] for kind in (Kind.I, Kind.F)] for rank in range(pp)]
    for depth in DEPTHS:
        ahead = [limit if depth == math.inf else math.ceil(depth * (pp - 1 - rank)) + 1 for rank in range(pp)]
        for patient in (True, False):
            yield Filler(loop_placement(pp, 1), queues, durations, limit, ahead, patient).run()
