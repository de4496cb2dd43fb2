"""List scheduling: each rank runs what is ready, and puts weight gradients where it would otherwise stand still.

Follows the greedy search of Qi et al. 2024, "Zero Bubble Pipeline Parallelism" (appendix on automatic scheduling), in
spirit: a weight gradient runs when memory is full or nothing else is ready.
"""

from collections import deque
from collections.abc import Sequence

from megalite.pipeline.schedule.ops import Done, Kind, Op, gives, needs
from megalite.pipeline.schedule.simulate import Durations


class Filler:
    """Writes rows for stages on `placement`. `queues[rank]` holds F and I in order, the queue to prefer first.

    `limit`: activations, one a stage and microbatch, that a rank may keep from F until W. `ahead[rank]`: the same from
    F until I. `patient`: a rank would rather stand still than keep an op that is known to arrive waiting for a W.
    """

    def __init__(
        self, placement: Sequence[int], queues: Sequence[Sequence[Sequence[Op]]], durations: Durations,
        limit: int, ahead: Sequence[int], patient: bool,
    ) -> None:  # fmt: skip
        self.placement, self.durations = placement, durations
        self.limit, self.ahead, self.patient = limit, ahead, patient
        self.queues = [[deque(queue) for queue in of_rank] for of_rank in queues]
        self.rows: list[list[Op]] = [[] for _ in queues]
        self._waiting: list[deque[Op]] = [deque() for _ in queues]
        self._clock = [0.0] * len(queues)
        self._kept, self._in_flight = [0] * len(queues), [0] * len(queues)
        self._done: dict[Done, float] = {}

    def run(self) -> list[list[Op]]:
        """The rows. Raises ValueError when the limit lets no rank go on."""
        awake = set(range(len(self.rows)))
        while awake:
            rank = min(awake, key=lambda rank: (self._clock[rank], rank))
            if self._advance(rank):
                awake = {rank for rank in range(len(self.rows)) if any(self.queues[rank]) or self._waiting[rank]}
            else:
                awake.discard(rank)
        if any(any(queues) for queues in self.queues):
            raise ValueError(f"a limit of {self.limit} activations a rank lets no rank go on")
        return self.rows

    def _advance(self, rank: int) -> bool:
        """Runs one op on the rank or moves its clock to the next arrival; False when it waits for other ranks."""
        now = self._clock[rank]
        heads = [queue for queue in self.queues[rank] if queue and self._fits(rank, queue[0])]
        arrivals = [self._arrival(queue[0]) for queue in heads]
        for queue, arrival in zip(heads, arrivals, strict=True):
            if arrival is not None and arrival <= now:
                self._start(rank, queue.popleft())
                return True
        known = min((arrival for arrival in arrivals if arrival is not None), default=None)
        waiting = self._waiting[rank]
        if waiting and not (self.patient and known is not None and known < now + self.durations.of(waiting[0])):
            self._start(rank, waiting.popleft())
            return True
        if known is None:
            return False
        self._clock[rank] = known
        return True

    def _fits(self, rank: int, op: Op) -> bool:
        full = self._kept[rank] >= self.limit or self._in_flight[rank] >= self.ahead[rank]
        return op.kind != Kind.F or not full

    def _arrival(self, op: Op) -> float | None:
        """When everything that the op needs is on its rank; None: not known yet."""
        rank, latest = self.placement[op.stage], 0.0
        for need in needs(op, len(self.placement)):
            if need not in self._done:
                return None
            transfer = self.durations.transfer if self.placement[need[1]] != rank else 0.0
            latest = max(latest, self._done[need] + transfer)
        return latest

    def _start(self, rank: int, op: Op) -> None:
        self._clock[rank] += self.durations.of(op)
        self._done[gives(op)] = self._clock[rank]
        self.rows[rank].append(op)
        self._kept[rank] += (op.kind == Kind.F) - (op.kind == Kind.W)
        self._in_flight[rank] += (op.kind == Kind.F) - (op.kind == Kind.I)
        if op.kind == Kind.I:
            self._waiting[rank].append(Op(Kind.W, op.stage, op.microbatch))
