"""What a pipeline schedule is: rows of ops, one row a rank. Pure data; generators make it, the runtime executes it.

Stage s computes layers before those of stage s + 1; a rank holds `chunks` stages. A microbatch passes all stages
forward, then backward. Text form of an op: stage, kind, microbatch (`2F0`), as torch.distributed.pipelining writes it.
"""

from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """What an op does, for its stage and microbatch."""

    F = "F"  # forward
    B = "B"  # whole backward: I and W at once
    I = "I"  # noqa: E741  gradient of the stage's input
    W = "W"  # gradient of the stage's weights
    RECOMPUTE = "RECOMPUTE"  # forward again, from the kept input
    SEND_F = "SEND_F"  # the stage's output to the rank of stage + 1
    RECV_F = "RECV_F"  # the stage's input from the rank of stage - 1
    SEND_B = "SEND_B"  # the stage's input gradient to the rank of stage - 1
    RECV_B = "RECV_B"  # the stage's output gradient from the rank of stage + 1
    GATHER = "UNSHARD"  # the stage's weights become whole (zero 3)
    RESHARD = "RESHARD"  # and sharded again
    REDUCE_GRAD = "REDUCE_GRAD"  # the stage's gradients over data-parallel ranks
    OPTIMIZER = "OPTIMIZER"  # the step of all stages of the rank; names the first of them


COMPUTE = frozenset({Kind.F, Kind.B, Kind.I, Kind.W})
SENDS = frozenset({Kind.SEND_F, Kind.SEND_B})
RECEIVES = frozenset({Kind.RECV_F, Kind.RECV_B})
OF_A_STAGE = frozenset({Kind.GATHER, Kind.RESHARD, Kind.REDUCE_GRAD, Kind.OPTIMIZER})
"""Kinds without a microbatch."""


@dataclass(frozen=True, slots=True)
class Op:
    """One entry of a row. `overlaps_next`: this op and the next of the row may run at the same time (F, then B)."""

    kind: Kind
    stage: int
    microbatch: int | None = None
    overlaps_next: bool = False

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{'' if self.microbatch is None else self.microbatch}"


@dataclass(frozen=True)
class Schedule:
    """`placement[stage]` is the stage's rank; `rows[rank]` are the rank's ops in the order in which it starts them."""

    name: str
    pp: int
    chunks: int
    microbatches: int
    placement: tuple[int, ...]
    rows: tuple[tuple[Op, ...], ...]

    @property
    def stages(self) -> int:
        return len(self.placement)

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The rank's stages, in the order of the layers."""
        return tuple(stage for stage, place in enumerate(self.placement) if place == rank)

    def crosses(self, stage: int) -> bool:
        """Whether the output of `stage` goes to another rank. False for the last stage."""
        return stage + 1 < self.stages and self.placement[stage] != self.placement[stage + 1]


Done = tuple[Kind, int, int | None]
"""That an op is done, as others wait for it: (kind, stage, microbatch); B counts as I."""


def gives(op: Op) -> Done:
    """What is done once `op` has ended."""
    return (Kind.I if op.kind == Kind.B else op.kind), op.stage, op.microbatch


def needs(op: Op, stages: int) -> tuple[Done, ...]:
    """What must be done before `op` can compute, wherever it was computed."""
    s, m = op.stage, op.microbatch
    if op.kind == Kind.F:
        return ((Kind.F, s - 1, m),) if s > 0 else ()
    if op.kind in (Kind.I, Kind.B):
        return ((Kind.F, s, m), (Kind.I, s + 1, m)) if s + 1 < stages else ((Kind.F, s, m),)
    if op.kind == Kind.W:
        return ((Kind.I, s, m),)
    if op.kind in (Kind.RECOMPUTE, Kind.SEND_F):
        return ((Kind.F, s, m),)
    if op.kind == Kind.SEND_B:
        return ((Kind.I, s, m),)
    return ()


def loop_placement(pp: int, chunks: int) -> tuple[int, ...]:
    """Rank r holds stages r, r + pp, r + 2 pp, ..."""
    return tuple(stage % pp for stage in range(pp * chunks))


def v_placement(pp: int, chunks: int) -> tuple[int, ...]:
    """Down the ranks and back up, `chunks` legs: with two, rank r holds stages r and 2 pp - 1 - r."""
    return tuple(stage % pp if stage // pp % 2 == 0 else pp - 1 - stage % pp for stage in range(pp * chunks))


class Row:
    """A rank's row while a generator writes it: every kind of a stage takes the microbatches in ascending order.

    The sum of a stage's gradients has the same order in every schedule for that reason, and so the same bits.
    """

    def __init__(self) -> None:
        self.ops: list[Op] = []
        self._next: dict[tuple[Kind, int], int] = {}

    def add(self, kind: Kind, stage: int, overlaps_next: bool = False) -> None:
        """The stage's next microbatch of this kind; B is also its next I and W."""
        counted = (Kind.I, Kind.W) if kind == Kind.B else (kind,)
        microbatch = self.done(counted[0], stage)
        assert all(self.done(each, stage) == microbatch for each in counted), f"{kind} of stage {stage} out of order"
        for each in counted:
            self._next[each, stage] = microbatch + 1
        self.ops.append(Op(kind, stage, microbatch, overlaps_next))

    def done(self, kind: Kind, stage: int) -> int:
        """Microbatches of this kind so far."""
        return self._next.get((kind, stage), 0)
