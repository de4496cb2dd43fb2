"""V-Half: half the activations of 1F1B at half its bubble, in a V placement.

Method of Qi et al. 2024, "Pipeline Parallelism with Controllable Memory". The six ops of one microbatch on every rank
are a building block, repeated every six units of time (F, I and W of a stage take one). Memory follows from how long a
microbatch stays: its four passes take 1, 2, 1 and 2 units from rank to rank, where 3 each gives the memory of 1F1B. The
gaps at the turns are the best of all that never put two ops of a rank at one time.
"""

from megalite.pipeline.schedule.fill import Filler
from megalite.pipeline.schedule.ops import Kind, Op, v_placement
from megalite.pipeline.schedule.simulate import Durations

INTERVAL = 6
STEPS = (1, 2, 1, 2)
"""Units from rank to rank: forward down, forward up, input gradient down, input gradient up."""


def v_half_limit(pp: int) -> int:
    """Activations, of one stage and microbatch, that a rank keeps at most: half of 1F1B's 2 pp, and 1 or 2 more."""
    return pp + 1 if pp % 2 else pp + 2


def v_half(pp: int, microbatches: int, durations: Durations) -> list[list[Op]]:
    """Rows in the order of the building blocks; the weight gradients go where the durations leave room."""
    queues = [[_order(rank, pp, microbatches)] for rank in range(pp)]
    unlimited = [2 * microbatches] * pp
    limit = v_half_limit(pp)
    return Filler(v_placement(pp, 2), queues, durations, limit, unlimited, patient=True).run()


def _order(rank: int, pp: int, microbatches: int) -> list[Op]:
    """F and I of both stages of the rank, by the time that repeated blocks give them."""
    forward_turn, loss, backward_turn = (1, 1, 2) if pp % 2 else (4, 2, 4)
    behind, last = pp - 1 - rank, pp - 1
    top = STEPS[0] * last + forward_turn
    bottom = top + STEPS[1] * last + loss
    down, up = rank, 2 * pp - 1 - rank
    times = {
        (Kind.F, down): STEPS[0] * rank,
        (Kind.F, up): top + STEPS[1] * behind,
        (Kind.I, up): bottom + STEPS[2] * rank,
        (Kind.I, down): bottom + STEPS[2] * last + backward_turn + STEPS[3] * behind,
    }
    slots = [
        (time + INTERVAL * microbatch, Op(kind, stage, microbatch))
        for (kind, stage), time in times.items()
        for microbatch in range(microbatches)
    ]
    return [op for _, op in sorted(slots, key=lambda slot: slot[0])]
