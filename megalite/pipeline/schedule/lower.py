"""From computation alone to what the runtime executes: passes that merge backwards, add sends, reductions, the step.

Sends and receives stand where a simulated run has them: one order of all ops of all ranks, in which every send is
followed at once by its receive. Walking that order can always go on, so nothing deadlocks, even when a send blocks
until its receiver is there; and every pair of ranks sees its messages in one order.
"""

from megalite.pipeline.schedule.ops import COMPUTE, SENDS, Kind, Op, Schedule
from megalite.pipeline.schedule.simulate import Durations, Event, simulate


def lower(
    schedule: Schedule, *, gather: bool = False, recompute: bool = False, durations: Durations | None = None
) -> Schedule:
    """The schedule with all passes applied: recompute and gather where asked, sends, reductions, the optimizer.

    `durations` only decide where sends and receives stand. What a user's file already has stays as it stands there.
    Raises ValueError when the schedule cannot run.
    """
    there = {op.kind for row in schedule.rows for op in row}
    if not there & SENDS:
        schedule = merge_backward(schedule)
    if recompute and Kind.RECOMPUTE not in there:
        schedule = add_recompute(schedule)
    if gather and Kind.GATHER not in there:
        schedule = add_gather(schedule)
    if Kind.REDUCE_GRAD not in there:
        schedule = add_reduce(schedule)
    if Kind.OPTIMIZER not in there:
        schedule = add_optimizer(schedule)
    return schedule if there & SENDS else add_sends(schedule, durations)


def add_sends(schedule: Schedule, durations: Durations | None = None) -> Schedule:
    """A send after each op whose result another rank needs, and its receive there, in one order on both sides."""
    if durations is None:  # whole numbers: ties stay ties
        durations = Durations.even(schedule.stages)
    events = sorted(simulate(schedule, durations), key=lambda event: event.start)
    steps: list[tuple[float, int, int, list[tuple[int, Op]]]] = []
    for number, event in enumerate(events):
        steps.append((event.start, 1, number, [(event.rank, event.op)]))
        steps.append((event.end, 0, number, _transfer(schedule, event)))
    rows: list[list[Op]] = [[] for _ in schedule.rows]
    for *_, ops in sorted(steps, key=lambda step: step[:3]):
        for rank, op in ops:
            rows[rank].append(op)
    return _with_rows(schedule, rows)


def _transfer(schedule: Schedule, event: Event) -> list[tuple[int, Op]]:
    """The send and the receive that an op's result takes, if it goes to another rank."""
    stage, microbatch, placement = event.op.stage, event.op.microbatch, schedule.placement
    if event.op.kind == Kind.F and schedule.crosses(stage):
        receiver = stage + 1
        send, receive = Kind.SEND_F, Kind.RECV_F
    elif event.op.kind in (Kind.I, Kind.B) and stage > 0 and schedule.crosses(stage - 1):
        receiver = stage - 1
        send, receive = Kind.SEND_B, Kind.RECV_B
    else:
        return []
    return [(event.rank, Op(send, stage, microbatch)), (placement[receiver], Op(receive, receiver, microbatch))]


def add_reduce(schedule: Schedule) -> Schedule:
    """REDUCE_GRAD of each stage right after its last weight gradient, so that it overlaps with what is left."""
    rows = []
    for row in schedule.rows:
        last = {op.stage: place for place, op in enumerate(row) if op.kind in (Kind.B, Kind.W)}
        ends = {_after_pair(row, place): stage for stage, place in last.items()}
        rows.append(
            [
                entry
                for place, op in enumerate(row)
                for entry in ([op, Op(Kind.REDUCE_GRAD, ends[place])] if place in ends else [op])
            ]
        )
    return _with_rows(schedule, rows)


def add_optimizer(schedule: Schedule) -> Schedule:
    """The step at the end of each row."""
    rows = [[*row, Op(Kind.OPTIMIZER, schedule.stages_of(rank)[0])] for rank, row in enumerate(schedule.rows)]
    return _with_rows(schedule, rows)


def add_recompute(schedule: Schedule) -> Schedule:
    """RECOMPUTE before each backward, and before the pair that it overlaps with."""
    rows: list[list[Op]] = []
    for row in schedule.rows:
        found: list[Op] = []
        for op in row:
            if op.kind in (Kind.I, Kind.B):
                paired = bool(found) and found[-1].overlaps_next
                found.insert(len(found) - paired, Op(Kind.RECOMPUTE, op.stage, op.microbatch))
            found.append(op)
        rows.append(found)
    return _with_rows(schedule, rows)


def add_gather(schedule: Schedule, kept: int = 2) -> Schedule:
    """GATHER before a stage's weights are used, one stage ahead; RESHARD once `kept` other stages come first.

    For zero 3: at most `kept` stages of a rank are whole at any time.
    """
    return _with_rows(schedule, [_gathered(row, kept) for row in schedule.rows])


def _gathered(row: tuple[Op, ...], kept: int) -> list[Op]:
    found: list[Op] = []
    whole: list[int] = []
    uses = [op.stage if op.kind in COMPUTE or op.kind == Kind.RECOMPUTE else None for op in row]
    for place, op in enumerate(row):
        coming = list(dict.fromkeys(stage for stage in uses[place:] if stage is not None))[:kept]
        if uses[place] is not None and not (place and row[place - 1].overlaps_next):
            found += [Op(Kind.RESHARD, stage) for stage in whole if stage not in coming]
            found += [Op(Kind.GATHER, stage) for stage in coming if stage not in whole]
            whole = coming
        found.append(op)
    return found + [Op(Kind.RESHARD, stage) for stage in whole]


def merge_backward(schedule: Schedule) -> Schedule:
    """I directly followed by its W becomes B, one pass over the stage, where no other rank waits for the I."""
    rows: list[list[Op]] = []
    for row in schedule.rows:
        merged: list[Op] = []
        for op in row:
            waited_for = op.stage > 0 and schedule.crosses(op.stage - 1)
            if op.kind == Kind.W and not waited_for and merged and merged[-1] == Op(Kind.I, op.stage, op.microbatch):
                merged[-1] = Op(Kind.B, op.stage, op.microbatch)
            else:
                merged.append(op)
        rows.append(merged)
    return _with_rows(schedule, rows)


def _after_pair(row: tuple[Op, ...], place: int) -> int:
    """The place itself, or of the second op where it is the first of an overlapped pair."""
    return place + row[place].overlaps_next


def _with_rows(schedule: Schedule, rows: list[list[Op]]) -> Schedule:
    return Schedule(
        schedule.name, schedule.pp, schedule.chunks, schedule.microbatches, schedule.placement,
        tuple(tuple(row) for row in rows),
    )  # fmt: skip
