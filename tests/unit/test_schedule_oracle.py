"""Makespans, spans and peaks of 248 schedules, simulated by an independent event loop from torch's own generators."""

import csv
from collections import defaultdict
from pathlib import Path

import pytest

from megalite.pipeline.schedule import make_schedule
from megalite.pipeline.schedule.measure import measure
from megalite.pipeline.schedule.simulate import Durations

ORACLE = Path(__file__).parents[3] / "shared/data/schedules/schedule_oracle.csv"
NAMES = {
    "GPipe": "gpipe", "1F1B": "1f1b", "Interleaved1F1B": "interleaved", "LoopedBFS": "looped_bfs",
    "InterleavedZeroBubble": "zb_h1", "ZBVZeroBubble": "zbv", "DualPipeV": "dualpipev",
}  # fmt: skip
DURATIONS = {"F=B=W=1": (1.0, 1.0, 1.0), "F=1,B=1.2,W=0.8": (1.0, 1.2, 0.8)}  # its B is our I


@pytest.mark.skipif(not ORACLE.exists(), reason="the shared table of simulated schedules is not beside the repository")
@pytest.mark.parametrize("name", NAMES)
def test_every_row_of_the_oracle(name: str) -> None:
    with ORACLE.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["schedule"] == name]
    assert len(rows) >= 24
    schedules: dict[tuple[int, ...], list[dict[str, str]]] = defaultdict(list)
    for row in rows:
        size = ("pp", "virtual_stages_per_rank", "microbatches")
        schedules[tuple(int(row[key]) for key in size)].append(row)
    for (pp, chunks, microbatches), found in schedules.items():
        schedule = make_schedule(NAMES[name], pp, chunks, microbatches)
        for row in found:
            durations = DURATIONS[row["durations_per_full_rank_stage"]]
            cost = measure(schedule, Durations.even(pp, chunks, *durations))
            ours = {
                "makespan": cost.makespan,
                "ideal": cost.ideal,
                "bubble_time": cost.makespan - cost.ideal,
                "bubble_fraction_of_makespan": cost.bubble_to_makespan,
                "max_rank_span": max(cost.spans),
                "bubble_by_rank_span": max(cost.spans) - cost.ideal,
                "bubble_rate_by_rank_span": 1 - cost.ideal / max(cost.spans),
                "peak_inflight_chunks_max_rank": max(cost.in_flight) * chunks,
                "peak_inflight_microbatch_equiv_rank0": cost.in_flight[0],
                "peak_inflight_microbatch_equiv_max": max(cost.in_flight),
                "peak_until_W_equiv_max": max(cost.until_weights),
            }
            published = {key: float(row[key]) for key in ours}
            assert ours == pytest.approx(published, rel=0, abs=1e-6), (pp, chunks, microbatches)
