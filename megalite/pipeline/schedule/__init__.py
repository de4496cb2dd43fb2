"""Pipeline schedules by name: `make_schedule` writes the rows, `lower` makes them executable.

No torch here: the configuration's rules and the command line read schedules too.
"""

from megalite.errors import UserError
from megalite.pipeline.schedule import fused, wave, zero_bubble
from megalite.pipeline.schedule.lower import lower
from megalite.pipeline.schedule.ops import Kind, Op, Schedule, loop_placement, v_placement

__all__ = ["NAMES", "Kind", "Op", "Schedule", "default_chunks", "lower", "make_schedule", "schedule_problems"]

NAMES = ("gpipe", "1f1b", "interleaved", "looped_bfs", "zb_h1", "zb_h2", "zbv", "dualpipev")
"""What parallel.schedule may be."""
ONE_CHUNK = ("gpipe", "1f1b", "zb_h2")
TWO_CHUNKS = ("zbv", "dualpipev")


def default_chunks(name: str) -> int:
    """Stages a rank where the user says nothing: the fewest that the schedule takes."""
    return 1 if name in ONE_CHUNK else 2


def schedule_problems(name: str, pp: int, chunks: int, microbatches: int) -> list[str]:
    """A line for each reason why this schedule cannot be made; each names its key and the nearest legal values."""
    problems = []
    if name not in NAMES:
        problems.append(f"parallel.schedule={name}: unknown schedule; legal: {', '.join(NAMES)}")
    if pp < 1:
        problems.append(f"parallel.pp={pp}: at least 1")
    if microbatches < 1:
        problems.append(f"train.global_batch: {microbatches} microbatches a step; at least 1 (train.micro_batch x dp)")
    if name in ONE_CHUNK and chunks != 1:
        problems.append(f"parallel.chunks={chunks}: {name} has one stage a rank; set 1, or schedule interleaved")
    if name in TWO_CHUNKS and chunks != 2:
        problems.append(f"parallel.chunks={chunks}: {name} has two stages a rank; set 2")
    if name in ("interleaved", "looped_bfs") and chunks < 2:
        plain = "1f1b" if name == "interleaved" else "gpipe"
        problems.append(f"parallel.chunks={chunks}: {name} needs at least 2; set 2, or parallel.schedule={plain}")
    return problems


def make_schedule(name: str, pp: int, chunks: int, microbatches: int, *, group: int | None = None) -> Schedule:
    """The computation of a named schedule: pp ranks, `chunks` stages a rank, `microbatches` a step.

    `group`: microbatches that interleaved schedules take through a stage before the next stage. Raises UserError.
    """
    problems = schedule_problems(name, pp, chunks, microbatches)
    if problems:
        raise UserError(*problems)
    if name in TWO_CHUNKS:
        write = {"zbv": wave.zbv, "dualpipev": wave.dualpipev}[name]
        rows = [write(rank, pp, microbatches) for rank in range(pp)]
    elif name in ("gpipe", "looped_bfs"):
        rows = [fused.breadth_first(rank, pp, chunks, microbatches) for rank in range(pp)]
    elif name == "1f1b":
        rows = [fused.one_forward_one_backward(rank, pp, microbatches) for rank in range(pp)]
    else:
        groups = _groups(pp, microbatches, group)
        if name == "interleaved":
            rows = [fused.interleaved(rank, pp, chunks, groups) for rank in range(pp)]
        else:
            depth = 1 if name == "zb_h1" else 2
            rows = [zero_bubble.handcrafted(rank, pp, chunks, groups, depth) for rank in range(pp)]
    placement = (v_placement if name in TWO_CHUNKS else loop_placement)(pp, chunks)
    return Schedule(name, pp, chunks, microbatches, placement, tuple(map(tuple, rows)))


def _groups(pp: int, microbatches: int, group: int | None) -> list[int]:
    groups = fused.microbatch_groups(pp, microbatches, group)
    if min(groups) < min(pp, microbatches):
        raise UserError(
            f"group={group}: leaves a group of {min(groups)} of {microbatches} microbatches, smaller than pp {pp}:"
            " ranks could wait for each other forever; leave group out for groups as even as can be"
        )
    return groups
