"""Zero-bubble schedules in a loop placement: the weight gradient waits, so that other ranks get their input sooner.

Source: Qi et al. 2024, "Zero Bubble Pipeline Parallelism" (ZB-H1, ZB-H2).
"""

from collections.abc import Sequence

from megalite.pipeline.schedule.fused import chunk_order
from megalite.pipeline.schedule.ops import Kind, Op, Row


def handcrafted(rank: int, pp: int, chunks: int, groups: Sequence[int], depth: int) -> list[Op]:
    """1F1B with each rank's weight gradients `depth` x rank behind its input gradients.

    Depth 1 is ZB-H1 (with chunks: interleaved), which keeps the memory of 1F1B; depth 2 is ZB-H2, which starts twice
    as many forwards ahead and has no bubble where F, I and W take the same time.
    """
    row = Row()
    stages = range(rank, pp * chunks, pp)
    forward, backward = chunk_order(stages, groups), chunk_order(stages[::-1], groups)
    ahead = min((chunks - 1) * groups[0] + depth * (pp - 1 - rank), len(forward))
    for stage in forward[:ahead]:
        row.add(Kind.F, stage)
    for place, stage in enumerate(backward):
        if ahead + place < len(forward):
            row.add(Kind.F, forward[ahead + place])
        row.add(Kind.I, stage)
        if place >= depth * rank:
            row.add(Kind.W, backward[place - depth * rank])
    for stage in backward[max(0, len(backward) - depth * rank) :]:
        row.add(Kind.W, stage)
    return row.ops
