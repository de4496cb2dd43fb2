"""ZB-V and DualPipeV, in a V placement: rank r holds stages r and 2 pp - 1 - r, so rank 0 has both ends.

Sources: Qi et al. 2024, "Zero Bubble Pipeline Parallelism"; DualPipe cut in half (DeepSeek-AI and Qi et al. 2025).
Both are written for enough microbatches to fill the pipeline; with fewer, the ops of those that do not exist fall away.
"""

from dataclasses import replace

from megalite.pipeline.schedule.ops import Kind, Op, Row


def zbv(rank: int, pp: int, microbatches: int) -> list[Op]:
    """ZB-V: memory of 1F1B on every rank, and no bubble where F, I and W take the same time."""
    row = Row()
    down, up = rank, 2 * pp - 1 - rank
    enough = max(2 * pp - 1, microbatches)
    for _ in range(2 * (pp - rank) - 1):
        row.add(Kind.F, down)
    for _ in range(rank):
        row.add(Kind.F, up)
        row.add(Kind.F, down)
    for _ in range(pp - rank):
        row.add(Kind.F, up)
        _backward(row, up)
    while row.done(Kind.F, up) < enough:
        if row.done(Kind.F, down) < enough:
            row.add(Kind.F, down)
        _backward(row, down)
        row.add(Kind.F, up)
        _backward(row, up)
    for _ in range(rank):
        row.add(Kind.I, down)
        row.add(Kind.I, up)
    for _ in range(pp - rank):
        row.add(Kind.I, down)
        row.add(Kind.W, down)
    for stage in (up, down):
        while row.done(Kind.W, stage) < enough:
            row.add(Kind.W, stage)
    return existing(row.ops, microbatches)


def _backward(row: Row, stage: int) -> None:
    row.add(Kind.I, stage)
    row.add(Kind.W, stage)


def dualpipev(rank: int, pp: int, microbatches: int) -> list[Op]:
    """DualPipeV: in the steady state a forward of one stage overlaps with a backward of the rank's other stage."""
    row = Row()
    down, up = rank, 2 * pp - 1 - rank
    behind, enough = pp - 1 - rank, max(2 * pp, microbatches)
    late: list[int] = []
    for _ in range(2 * behind):
        row.add(Kind.F, down)
    for _ in range(rank + 1):
        row.add(Kind.F, down)
        row.add(Kind.F, up)
    for _ in range(behind):
        _backward(row, up)
        row.add(Kind.F, up)
    for step in range(enough - 2 * pp + rank + 1):
        # On the last rank the first backward needs the forward beside it: no pair there.
        row.add(Kind.F, down, overlaps_next=step > 0 or rank < pp - 1)
        row.add(Kind.B, up)
        row.add(Kind.F, up, overlaps_next=True)
        row.add(Kind.B, down)
    for _ in range(behind):
        row.add(Kind.B, up)
        row.add(Kind.F, up, overlaps_next=True)
        row.add(Kind.B, down)
    for place in range(2 * (rank + 1)):
        stage, whole = (down if place % 2 else up), place <= rank
        row.add(Kind.B if whole else Kind.I, stage)
        if not whole:
            late.append(stage)
    for _ in range(behind):
        row.add(Kind.W, late.pop(0))
        row.add(Kind.I, down)
        late.append(down)
    for stage in late:
        row.add(Kind.W, stage)
    return existing(row.ops, microbatches)


def existing(ops: list[Op], microbatches: int) -> list[Op]:
    """The ops of the first `microbatches`; half of an overlapped pair stands alone."""
    kept: list[Op] = []
    for place, op in enumerate(ops):
        if op.microbatch is not None and op.microbatch < microbatches:
            beside = ops[place + 1].microbatch if op.overlaps_next else None
            kept.append(replace(op, overlaps_next=beside is not None and beside < microbatches))
    return kept
