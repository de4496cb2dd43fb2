"""Which layers each pipeline stage holds: the same number each, a user's list, or balanced by cost.

The embedding before the first layer and the head behind the last count as slots of their own cost; no torch here.
"""

import itertools
import math
from collections.abc import Callable, Sequence

from megalite.errors import UserError


def split_layers(
    layers: int,
    stages: int,
    *,
    counts: Sequence[int] | None = None,
    costs: Sequence[float] | None = None,
    embedding: float = 0.0,
    head: float = 0.0,
) -> list[range]:
    """The layers of each stage: contiguous, in order, at least one each; listed, the first and last may have none.

    `counts`: layers of each stage, as a user lists them. Otherwise the slowest stage is as fast as can be, and the
    stages as equal as that allows: `costs` of the layers (1 each by default, any unit) with those of `embedding` on the
    first stage and `head` on the last. Raises UserError for what a user can set, ValueError for costs that fit nothing.
    """
    if counts is not None:
        return _listed(layers, stages, counts)
    if stages > layers:
        raise UserError(
            f"parallel.pp: {stages} stages (pp x parallel.chunks) for model.layers {layers}; at most {layers} stages"
        )
    slots = [1.0] * layers if costs is None else list(costs)
    if len(slots) != layers or min([*slots, embedding, head]) < 0:
        raise ValueError(f"{len(slots)} costs for {layers} layers; one each, none below 0")
    slots[0] += embedding
    slots[-1] += head
    return _balanced(slots, stages)


def _listed(layers: int, stages: int, counts: Sequence[int]) -> list[range]:
    problems = []
    if len(counts) != stages:
        problems.append(f"parallel.layers: lists {len(counts)} stages; pp x parallel.chunks is {stages}; list {stages}")
    if min(counts) < 0 or 0 in counts[1:-1]:  # an end without layers has the embedding or the head
        problems.append("parallel.layers: at least 1 a stage; 0 only in the first and the last")
    if sum(counts) != layers:
        problems.append(
            f"parallel.layers: lists {sum(counts)} layers; model.layers is {layers}; their sum must be that"
        )
    if problems:
        raise UserError(*problems)
    ends = list(itertools.accumulate(counts))
    return [range(end - count, end) for end, count in zip(ends, counts, strict=True)]


def _balanced(slots: Sequence[float], stages: int) -> list[range]:
    """The contiguous split with the smallest maximum, of those the smallest sum of squares, of those the later layers.

    The last because a rank early in the pipeline keeps the activations of more microbatches.
    """
    sums = list(itertools.accumulate(slots, initial=0.0))
    slowest, _ = _best(sums, stages, max, math.inf)
    _, cuts = _best(sums, stages, lambda before, cost: before + cost * cost, slowest)
    return [range(start, end) for start, end in itertools.pairwise([0, *cuts])]


def _best(
    sums: Sequence[float], stages: int, joined: Callable[[float, float], float], most: float
) -> tuple[float, list[int]]:
    """The split with the least value, joined stage by stage from their costs, none above `most`; the stages' ends."""
    layers = len(sums) - 1
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for stage in range(1, stages + 1):
        found: dict[int, tuple[float, list[int]]] = {}
        for end in range(stage, layers - (stages - stage) + 1):
            options = [
                (round(joined(value, cost), 9), [*ends, end])
                for start, (value, ends) in best.items()
                if start < end and (cost := round(sums[end] - sums[start], 9)) <= most
            ]
            if options:
                found[end] = min(options)
        best = found
    return best[layers]
