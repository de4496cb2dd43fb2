"""Every generator at any size: everything computed once from the right inputs, no deadlock, memory within its promise.

The rows run on a little machine of their own here: ranks that hold values, and channels where a send waits until its
receiver takes the message.
"""

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.pipeline.schedule import (
    NAMES,
    Kind,
    Op,
    Schedule,
    default_chunks,
    lower,
    make_schedule,
    memory_bound,
    schedule_problems,
)
from megalite.pipeline.schedule.check import problems
from megalite.pipeline.schedule.lower import merge_backward
from megalite.pipeline.schedule.measure import measure
from megalite.pipeline.schedule.simulate import Durations, simulate

TIME = st.sampled_from([0.25, 0.5, 0.8, 1.0, 1.2, 2.0, 3.0])


@st.composite
def sizes(draw: st.DrawFn) -> tuple[str, int, int, int]:
    """A schedule with ranks, chunks and microbatches that it takes."""
    name = draw(st.sampled_from(NAMES))
    pp, microbatches = draw(st.integers(1, 8)), draw(st.integers(1, 32))
    chunks = draw(st.integers(1, 4))
    if schedule_problems(name, pp, chunks, microbatches):
        chunks = default_chunks(name)
    return name, pp, chunks, microbatches


@st.composite
def unequal(draw: st.DrawFn, stages: int) -> Durations:
    times = [draw(st.lists(TIME, min_size=stages, max_size=stages)) for _ in range(3)]
    return Durations(*times, transfer=draw(st.sampled_from([0.0, 0.1, 1.0])))


class Machine:
    """Executes lowered rows with blocking sends. A value is what it was computed from; wrong inputs fail at once."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.values: list[set[tuple[str, int, int | None]]] = [set() for _ in schedule.rows]
        self.kept = [0] * schedule.pp
        self.most = 0
        self.weights: set[tuple[int, int | None]] = set()
        self.reduced: set[int] = set()
        self.stepped: set[int] = set()

    def run(self) -> None:
        schedule, place = self.schedule, [0] * self.schedule.pp
        while any(at < len(row) for at, row in zip(place, schedule.rows, strict=True)):
            before = list(place)
            for rank, row in enumerate(schedule.rows):
                while place[rank] < len(row) and not row[place[rank]].kind.startswith(("SEND", "RECV")):
                    self.compute(rank, row[place[rank]])
                    place[rank] += 1
                if place[rank] == len(row) or row[place[rank]].kind.startswith("RECV"):
                    continue
                op = row[place[rank]]
                step = 1 if op.kind == Kind.SEND_F else -1
                peer = schedule.placement[op.stage + step]
                assert peer != rank
                taking = schedule.rows[peer][place[peer]] if place[peer] < len(schedule.rows[peer]) else None
                if taking == Op(Kind(op.kind.replace("SEND", "RECV")), op.stage + step, op.microbatch):
                    value = ("output" if step == 1 else "input gradient", op.stage, op.microbatch)
                    assert value in self.values[rank], f"{op} has nothing to send"
                    self.values[rank].remove(value)
                    self.values[peer].add(value)
                    place[rank] += 1
                    place[peer] += 1
            assert place != before, f"deadlock at {[row[at : at + 1] for row, at in zip(schedule.rows, place)]}"  # noqa: B905

    def compute(self, rank: int, op: Op) -> None:
        stage, n, values = op.stage, op.microbatch, self.values[rank]
        assert self.schedule.placement[stage] == rank
        if op.kind == Kind.F:
            if stage > 0:
                values.remove(("output", stage - 1, n))
            assert ("kept", stage, n) not in values
            values |= {("output", stage, n), ("kept", stage, n)}
            self.kept[rank] += 1
            self.most = max(self.most, self.kept[rank])
        if op.kind in (Kind.I, Kind.B):
            assert ("kept", stage, n) in values
            values.remove(
                ("input gradient", stage + 1, n) if stage + 1 < self.schedule.stages else ("output", stage, n)
            )
            values |= {("half", stage, n)} | ({("input gradient", stage, n)} if stage else set())
        if op.kind in (Kind.W, Kind.B):
            values -= {("kept", stage, n)}
            values.remove(("half", stage, n))
            assert (stage, n) not in self.weights
            self.weights.add((stage, n))
            self.kept[rank] -= 1
        if op.kind == Kind.REDUCE_GRAD:
            assert all((stage, each) in self.weights for each in range(self.schedule.microbatches))
            assert stage not in self.reduced
            self.reduced.add(stage)
        if op.kind == Kind.OPTIMIZER:
            assert self.reduced >= set(self.schedule.stages_of(rank))
            assert rank not in self.stepped
            self.stepped.add(rank)


@settings(max_examples=100, deadline=None)
@given(sizes())
def test_computes_everything_once_without_deadlock_within_its_memory(size: tuple[str, int, int, int]) -> None:
    schedule = make_schedule(*size)
    machine = Machine(lower(schedule))
    machine.run()
    _, pp, chunks, microbatches = size
    assert machine.weights == {(stage, n) for stage in range(pp * chunks) for n in range(microbatches)}
    assert machine.reduced == set(range(pp * chunks))
    assert machine.stepped == set(range(pp))
    assert not any(machine.values)
    assert machine.most / chunks <= memory_bound(*size)
    assert machine.most / chunks == max(measure(schedule).until_weights)


@settings(max_examples=40, deadline=None)
@given(sizes(), st.booleans(), st.booleans())
def test_the_checker_accepts_all_that_runs(size: tuple[str, int, int, int], gather: bool, recompute: bool) -> None:
    schedule = make_schedule(*size)
    assert problems(schedule) == []
    lowered = lower(schedule, gather=gather, recompute=recompute)
    assert problems(lowered) == []
    assert problems(lowered, blocking=False) == []


@settings(max_examples=40, deadline=None)
@given(sizes())
def test_gradients_are_summed_in_the_order_of_the_microbatches(size: tuple[str, int, int, int]) -> None:
    """In every schedule, so that the choice of schedule does not change a bit of the sum."""
    for row in make_schedule(*size).rows:
        for stage in {op.stage for op in row}:
            for kinds in ((Kind.F,), (Kind.I, Kind.B), (Kind.W, Kind.B)):
                order = [op.microbatch for op in row if op.stage == stage and op.kind in kinds]
                assert order == list(range(size[3]))


@settings(max_examples=40, deadline=None)
@given(st.data(), sizes())
def test_unequal_stages(data: st.DataObject, size: tuple[str, int, int, int]) -> None:
    """Planned and run with any durations: needs come first, a rank does one thing at a time, work takes its time."""
    _, pp, chunks, microbatches = size
    durations = data.draw(unequal(pp * chunks))
    schedule = make_schedule(*size, durations=durations)
    assert max(measure(schedule).until_weights) <= memory_bound(*size)
    for variant in (schedule, lower(schedule, durations=durations)):
        events = simulate(variant, durations)
        ends = {(event.op.kind, event.op.stage, event.op.microbatch): event for event in events}
        busy = [0.0] * pp
        for event in events:
            kind, stage, n = event.op.kind, event.op.stage, event.op.microbatch
            inputs = [(Kind.F, stage - 1)] if kind == Kind.F and stage else []
            if kind in (Kind.I, Kind.B):
                inputs = [(Kind.F, stage)]
                if stage + 1 < schedule.stages:
                    inputs.append((Kind.I if (Kind.I, stage + 1, n) in ends else Kind.B, stage + 1))
            for need in inputs:
                source = ends[(*need, n)]
                assert event.start >= source.end + durations.transfer * (source.rank != event.rank) - 1e-9
            if not event.op.overlaps_next:
                assert event.start >= busy[event.rank] - 1e-9
                busy[event.rank] = event.end
        ideal = durations.ideal(schedule)
        chain = sum(durations.F) + sum(durations.I)
        makespan = measure(variant, durations).makespan
        assert makespan == max(busy) >= max(ideal, chain) - 1e-9
        assert (
            makespan
            <= sum(sum(times) for times in (durations.F, durations.I, durations.W)) * microbatches
            + (durations.transfer * 2 * schedule.stages * microbatches)
            + 1e-6
        )


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 24), TIME, TIME, TIME, st.sampled_from([0.0, 0.3]), st.integers(1, 14))
def test_zb_auto_keeps_its_limit_and_is_never_longer_than_zb_h1(
    pp: int, microbatches: int, f: float, i: float, w: float, transfer: float, limit: int
) -> None:
    durations = Durations.even(pp, 1, f, i, w, transfer)
    schedule = make_schedule("zb_auto", pp, 1, microbatches, limit=limit, durations=durations)
    cost = measure(schedule, durations)
    assert max(cost.until_weights) <= limit
    for name, needed in (("zb_h1", pp), ("zb_h2", 2 * pp - 1)):
        if limit >= needed:
            other = measure(make_schedule(name, pp, 1, microbatches), durations)
            assert cost.makespan <= other.makespan + 1e-9


@settings(max_examples=40, deadline=None)
@given(sizes())
def test_merged_backwards_cost_no_time(size: tuple[str, int, int, int]) -> None:
    schedule = make_schedule(*size)
    merged = merge_backward(schedule)
    assert math.isclose(measure(merged).makespan, measure(schedule).makespan)
    first = [op.kind for op in merged.rows[0] if op.stage == 0]
    adjacent = [
        (one, two) for one, two in zip(merged.rows[0], merged.rows[0][1:], strict=False)
        if one == Op(Kind.I, 0, one.microbatch) and two == Op(Kind.W, 0, one.microbatch)
    ]  # fmt: skip
    assert Kind.F in first
    assert not adjacent


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 8), st.integers(2, 4), st.integers(1, 4), TIME, TIME, TIME)
def test_bubbles_equal_their_closed_forms(pp: int, chunks: int, rounds: int, f: float, i: float, w: float) -> None:
    """Of Narayanan et al. 2021 and Qi et al. 2024, where the microbatches fill the pipeline."""
    microbatches, work = 2 * pp * rounds, f + i + w

    def idle(name: str, chunks: int, span: bool = False) -> float:
        cost = measure(make_schedule(name, pp, chunks, microbatches), Durations.even(pp, chunks, f, i, w))
        return (max(cost.spans) if span else cost.makespan) - cost.ideal

    assert math.isclose(idle("gpipe", 1), (pp - 1) * work, abs_tol=1e-9)
    assert math.isclose(idle("1f1b", 1), (pp - 1) * work, abs_tol=1e-9)
    assert math.isclose(idle("interleaved", chunks), (pp - 1) * work / chunks, abs_tol=1e-9)
    assert math.isclose(idle("looped_bfs", chunks), (pp - 1) * work / chunks, abs_tol=1e-9)
    if w <= f and w <= i:
        assert math.isclose(idle("zb_h1", 1), (pp - 1) * (f + i - w), abs_tol=1e-9)
        assert math.isclose(idle("zb_h1", chunks), (pp - 1) * (f + i - w) / chunks, abs_tol=1e-9)
        assert math.isclose(idle("zb_h2", 1, span=True), (pp - 1) * (f + i - 2 * w), abs_tol=1e-9)


def test_v_schedules_at_equal_times() -> None:
    for pp in range(2, 9):
        microbatches = 3 * pp
        zbv, half, dual = (make_schedule(name, pp, 2, microbatches) for name in ("zbv", "v_half", "dualpipev"))
        cost = measure(dual)
        assert cost.makespan - cost.ideal == pp - 1  # (p - 1)(F + 2I - W) / 2
        cost = measure(zbv)
        assert max(cost.spans) == cost.ideal
        assert set(cost.until_weights) == {pp}
        cost, plain = measure(half), measure(make_schedule("1f1b", pp, 1, microbatches))
        assert cost.makespan - cost.ideal <= (plain.makespan - plain.ideal) / 2
        assert max(cost.until_weights) <= max(plain.until_weights) / 2 + 1


def test_promised_memory() -> None:
    """Written out, so that a promise cannot grow unseen."""
    promised = {
        ("gpipe", 1): 24, ("1f1b", 1): 4, ("interleaved", 2): 5.5, ("interleaved", 3): 5, ("looped_bfs", 2): 24,
        ("zb_h1", 1): 4, ("zb_h1", 3): 4, ("zb_h2", 1): 7, ("zb_auto", 1): 8, ("zbv", 2): 4, ("v_half", 2): 3,
        ("dualpipev", 2): 4.5,
    }  # fmt: skip
    for (name, chunks), most in promised.items():
        assert memory_bound(name, 4, chunks, 24) == most
        assert memory_bound(name, 4, chunks, 2) <= 2
    assert memory_bound("zb_auto", 4, 1, 24, limit=3) == 3
    assert memory_bound("interleaved", 4, 2, 24, group=6) == (6 + 7) / 2
    assert memory_bound("v_half", 5, 2, 24) == 3
