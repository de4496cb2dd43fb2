"""Schedules with a whole backward: GPipe, 1F1B, interleaved 1F1B and looped breadth-first.

Sources: GPipe (Huang et al. 2019), 1F1B (PipeDream-flush; Narayanan et al. 2021, with interleaving), breadth-first
(Lamy-Poirier 2023).
"""

from collections.abc import Sequence

from megalite.pipeline.schedule.ops import Kind, Op, Row


def breadth_first(rank: int, pp: int, chunks: int, microbatches: int) -> list[Op]:
    """All microbatches through a stage before the rank's next one; with one chunk this is GPipe."""
    row = Row()
    stages = range(rank, pp * chunks, pp)
    for stage in stages:
        for _ in range(microbatches):
            row.add(Kind.F, stage)
    for stage in reversed(stages):
        for _ in range(microbatches):
            row.add(Kind.B, stage)
    return row.ops


def one_forward_one_backward(rank: int, pp: int, microbatches: int) -> list[Op]:
    """As many forwards ahead as there are ranks behind, then a forward and a backward in turn."""
    row = Row()
    ahead = min(pp - 1 - rank, microbatches)
    for _ in range(ahead):
        row.add(Kind.F, rank)
    for _ in range(microbatches - ahead):
        row.add(Kind.F, rank)
        row.add(Kind.B, rank)
    for _ in range(ahead):
        row.add(Kind.B, rank)
    return row.ops


def interleaved(rank: int, pp: int, chunks: int, groups: Sequence[int]) -> list[Op]:
    """1F1B over chunks: a group of microbatches goes through all of the rank's stages before the next group starts."""
    row = Row()
    stages = range(rank, pp * chunks, pp)
    forward, backward = chunk_order(stages, groups), chunk_order(stages[::-1], groups)
    ahead = min((chunks - 1) * groups[0] + 2 * (pp - 1 - rank), len(forward))
    for stage in forward[:ahead]:
        row.add(Kind.F, stage)
    for stage, back in zip(forward[ahead:], backward, strict=False):
        row.add(Kind.F, stage)
        row.add(Kind.B, back)
    for stage in backward[len(forward) - ahead :]:
        row.add(Kind.B, stage)
    return row.ops


def chunk_order(stages: Sequence[int], groups: Sequence[int]) -> list[int]:
    """The stage of each forward (or backward) in turn: a group through the first stage, the same through the next."""
    return [stage for group in groups for stage in stages for _ in range(group)]


def microbatch_groups(pp: int, microbatches: int, group: int | None = None) -> list[int]:
    """Group sizes of interleaved schedules: `group` and a smaller rest; by default at least pp, as even as can be."""
    if group is None:
        rounds = max(1, microbatches // pp)
        return [microbatches // rounds + (place < microbatches % rounds) for place in range(rounds)]
    return [min(group, microbatches - start) for start in range(0, microbatches, group)]
