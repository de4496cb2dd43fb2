"""Whether a schedule computes everything once, in an order that can run, without ranks waiting for each other forever.

Takes computation alone and lowered schedules, our own and a user's. A problem is a line that names rank and op.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator

from megalite.pipeline.schedule.ops import COMPUTE, OF_A_STAGE, RECEIVES, SENDS, Done, Kind, Op, Schedule, gives, needs
from megalite.pipeline.schedule.simulate import simulate

Message = tuple[Kind, int, int | None]
"""What a send and its receive have in common: F or B, the receiving stage, the microbatch."""


def problems(schedule: Schedule, blocking: bool = True) -> list[str]:
    """Every problem found; none: the schedule runs. `blocking`: a send waits for its receiver (rendezvous)."""
    found = [*_misplaced(schedule)] or [*_counts(schedule), *_row_order(schedule)]
    if found:
        return found
    if communicates(schedule):
        return [*_channels(schedule)] or [*_stuck(schedule, blocking)]
    try:
        simulate(schedule)
    except ValueError as error:
        return str(error).split("; ")
    return []


def communicates(schedule: Schedule) -> bool:
    """Whether sends and receives are in the rows; without them, only what a rank waits for is known."""
    return any(op.kind in SENDS | RECEIVES for row in schedule.rows for op in row)


def _misplaced(schedule: Schedule) -> Iterator[str]:
    for rank, row in enumerate(schedule.rows):
        for place, op in enumerate(row):
            if not 0 <= op.stage < schedule.stages:
                yield f"rank {rank}: {op} names stage {op.stage}; there are {schedule.stages}"
            elif schedule.placement[op.stage] != rank:
                yield f"rank {rank}: {op} belongs to rank {schedule.placement[op.stage]}, which holds stage {op.stage}"
            elif op.kind not in OF_A_STAGE and op.microbatch not in range(schedule.microbatches):
                yield f"rank {rank}: {op} is not of one of the {schedule.microbatches} microbatches"
            if op.overlaps_next and (place + 1 == len(row) or row[place + 1].kind not in COMPUTE):
                yield f"rank {rank}: {op} overlaps with nothing"


def _counts(schedule: Schedule) -> Iterator[str]:
    """Everything once, nothing more; what is optional is there for all stages and microbatches, or for none."""
    every = [(stage, n) for stage in range(schedule.stages) for n in range(schedule.microbatches)]
    wanted: dict[Kind, list[tuple[int, int | None]]] = {kind: [*every] for kind in (Kind.F, Kind.I, Kind.W)}
    if communicates(schedule):
        down = [(stage, n) for stage, n in every if schedule.crosses(stage)]
        wanted |= {Kind.SEND_F: [*down], Kind.RECV_B: [*down]}
        up = [(stage, n) for stage, n in every if stage and schedule.crosses(stage - 1)]
        wanted |= {Kind.RECV_F: [*up], Kind.SEND_B: [*up]}
    used = {op.kind for row in schedule.rows for op in row}
    if Kind.RECOMPUTE in used:
        wanted[Kind.RECOMPUTE] = [*every]
    if Kind.REDUCE_GRAD in used:
        wanted[Kind.REDUCE_GRAD] = [(stage, None) for stage in range(schedule.stages)]
    if Kind.OPTIMIZER in used:
        wanted[Kind.OPTIMIZER] = [(schedule.stages_of(rank)[0], None) for rank in range(schedule.pp)]
    seen = Counter(done for row in schedule.rows for op in row for done in _all_done(op))
    for kind, pairs in wanted.items():
        for stage, n in pairs:
            times = seen.pop((kind, stage, n), 0)
            if times != 1:
                or_whole = f" (or {Op(Kind.B, stage, n)})" if kind in (Kind.I, Kind.W) else ""
                rank = schedule.placement[stage]
                yield f"rank {rank}: {Op(kind, stage, n)}{or_whole} stands there {times} times; once is right"
    for kind, stage, n in seen:
        if kind not in (Kind.GATHER, Kind.RESHARD):
            yield f"rank {schedule.placement[stage]}: {Op(kind, stage, n)} has nothing to do there; leave it out"


def _all_done(op: Op) -> tuple[Done, ...]:
    """As `gives`, and also the W of a B."""
    return (gives(op), (Kind.W, op.stage, op.microbatch)) if op.kind == Kind.B else (gives(op),)


def _row_order(schedule: Schedule) -> Iterator[str]:
    """Within each row: an op stands after everything that it needs from its own rank, received or computed."""
    gathers = any(op.kind == Kind.GATHER for row in schedule.rows for op in row)
    for rank, row in enumerate(schedule.rows):
        places: dict[Done, int] = {}
        for place, op in enumerate(row):
            places |= dict.fromkeys(_all_done(op), place)
        whole: set[int] = set()
        for place, op in enumerate(row):
            first = place - (place > 0 and row[place - 1].overlaps_next)  # a pair needs what it needs before both
            for need in _local_needs(op, schedule):
                if places.get(need, -1) >= first:
                    yield f"rank {rank}: {op} stands before {Op(*need)}, which it needs"
            if op.kind == Kind.GATHER:
                whole.add(op.stage)
            elif op.kind == Kind.RESHARD:
                whole.discard(op.stage)
            elif gathers and op.kind in COMPUTE | {Kind.RECOMPUTE} and op.stage not in whole:
                yield f"rank {rank}: {op} needs the weights of stage {op.stage}, which are sharded there; gather them"


def _local_needs(op: Op, schedule: Schedule) -> Iterator[Done]:
    """What must stand before the op in its row; what another rank computes, as the receive of it."""
    microbatches = range(schedule.microbatches)
    if op.kind == Kind.REDUCE_GRAD:
        yield from ((Kind.W, op.stage, n) for n in microbatches)
    if op.kind == Kind.OPTIMIZER:
        own = schedule.stages_of(schedule.placement[op.stage])
        yield from ((Kind.W, stage, n) for stage in own for n in microbatches)
        yield from ((Kind.REDUCE_GRAD, stage, None) for stage in own)
    if op.kind in (Kind.I, Kind.B):
        yield Kind.RECOMPUTE, op.stage, op.microbatch
    for kind, stage, n in needs(op, schedule.stages):
        if schedule.placement[stage] == schedule.placement[op.stage]:
            yield kind, stage, n
        else:
            yield (Kind.RECV_F if kind == Kind.F else Kind.RECV_B), op.stage, n


def channel(op: Op, placement: tuple[int, ...]) -> tuple[tuple[int, int], Message]:
    """Of a send or a receive: (sending rank, receiving rank), and the message."""
    step = 1 if op.kind in (Kind.SEND_F, Kind.RECV_F) else -1
    kind = Kind.F if step == 1 else Kind.B
    receiver = op.stage + step if op.kind in SENDS else op.stage
    return (placement[receiver - step], placement[receiver]), (kind, receiver, op.microbatch)


def _channels(schedule: Schedule) -> Iterator[str]:
    """Both ends of each channel must have its messages in one order."""
    ends: dict[tuple[int, int], tuple[list[Op], list[Op]]] = defaultdict(lambda: ([], []))
    for row in schedule.rows:
        for op in row:
            if op.kind in SENDS | RECEIVES:
                ends[channel(op, schedule.placement)[0]][op.kind in RECEIVES].append(op)
    for (source, target), (sent, received) in ends.items():
        for send, receive in zip(sent, received, strict=True):
            if channel(send, schedule.placement) != channel(receive, schedule.placement):
                yield f"rank {source}: {send} comes where rank {target} expects the message of {receive}"
                break


def _stuck(schedule: Schedule, blocking: bool) -> Iterator[str]:
    """Walks all rows at once; a line for each rank that cannot go on."""
    rows = [[op for op in row if op.kind in SENDS | RECEIVES] for row in schedule.rows]
    place, arrived = [0] * schedule.pp, Counter[tuple[int, int]]()
    moved = True
    while moved:
        moved = False
        for rank, row in enumerate(rows):
            while place[rank] < len(row):
                (source, target), message = channel(row[place[rank]], schedule.placement)
                sends = row[place[rank]].kind in SENDS
                if sends and blocking:
                    waiting = rows[target][place[target]] if place[target] < len(rows[target]) else None
                    if waiting is None or waiting.kind not in RECEIVES:
                        break
                    if channel(waiting, schedule.placement) != ((source, target), message):
                        break
                    place[target] += 1
                elif sends:
                    arrived[source, target] += 1
                elif not blocking and arrived[source, target]:
                    arrived[source, target] -= 1
                else:
                    break
                place[rank] += 1
                moved = True
    for rank, row in enumerate(rows):
        if place[rank] < len(row):
            op = row[place[rank]]
            ends, _ = channel(op, schedule.placement)
            other = ends[op.kind in SENDS]
            at = rows[other][place[other]] if place[other] < len(rows[other]) else "its end"
            yield f"rank {rank}: {op} waits for rank {other}, which stands at {at}: a deadlock"
