"""The schedules by name: which sizes each takes, who writes its rows, and the memory that it keeps within."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass

from megalite.errors import UserError
from megalite.pipeline.schedule import fused, wave
from megalite.pipeline.schedule.auto import zb_auto
from megalite.pipeline.schedule.ops import Op, Schedule, loop_placement, v_placement
from megalite.pipeline.schedule.simulate import Durations
from megalite.pipeline.schedule.text import load_csv
from megalite.pipeline.schedule.v_half import v_half, v_half_limit
from megalite.pipeline.schedule.zero_bubble import handcrafted


@dataclass(frozen=True)
class Request:
    """What is asked of a schedule; the last three only of those that take them."""

    pp: int
    chunks: int
    microbatches: int
    group: int | None = None
    limit: int | None = None
    durations: Durations | None = None

    @property
    def groups(self) -> list[int]:
        """Sizes of the groups of microbatches in which interleaved schedules go through a rank's stages."""
        return fused.microbatch_groups(self.pp, self.microbatches, self.group)

    @property
    def memory(self) -> int:
        """Microbatches of activations that zb_auto may keep on a rank; by default enough for no bubble, twice 1F1B."""
        return 2 * self.pp if self.limit is None else self.limit

    @property
    def times(self) -> Durations:
        return self.durations or Durations.even(self.pp, self.chunks)

    def each(self, write: Callable[[int], list[Op]]) -> list[list[Op]]:
        """A row of each rank."""
        return [write(rank) for rank in range(self.pp)]


@dataclass(frozen=True)
class Recipe:
    """`bound`: the most activations that a rank keeps until their weight gradient, in microbatches on all stages."""

    chunks: tuple[int, int]  # fewest and most
    rows: Callable[[Request], list[list[Op]]]
    bound: Callable[[Request], float]
    placement: Callable[[int, int], tuple[int, ...]] = loop_placement
    options: tuple[str, ...] = ()


def _all(asked: Request) -> float:
    return asked.microbatches


def _breadth_first(asked: Request) -> list[list[Op]]:
    return asked.each(lambda rank: fused.breadth_first(rank, asked.pp, asked.chunks, asked.microbatches))


def _handcrafted(depth: int) -> Callable[[Request], list[list[Op]]]:
    return lambda asked: asked.each(lambda rank: handcrafted(rank, asked.pp, asked.chunks, asked.groups, depth))


def _chunked(asked: Request, hops: int) -> float:
    """Forwards of all chunks but the last for a group, and `hops` more, in microbatches on all stages of a rank."""
    return ((asked.chunks - 1) * max(asked.groups) + hops) / asked.chunks


ONE, TWO, SEVERAL, ANY = (1, 1), (2, 2), (2, 10**6), (1, 10**6)

RECIPES: dict[str, Recipe] = {
    "gpipe": Recipe(ONE, _breadth_first, _all),
    "1f1b": Recipe(
        ONE,
        lambda asked: asked.each(lambda rank: fused.one_forward_one_backward(rank, asked.pp, asked.microbatches)),
        lambda asked: asked.pp,
    ),
    "interleaved": Recipe(
        SEVERAL,
        lambda asked: asked.each(lambda rank: fused.interleaved(rank, asked.pp, asked.chunks, asked.groups)),
        lambda asked: _chunked(asked, 2 * asked.pp - 1),
        options=("group",),
    ),
    "looped_bfs": Recipe(SEVERAL, _breadth_first, _all),
    "zb_h1": Recipe(ANY, _handcrafted(1), lambda asked: _chunked(asked, asked.pp), options=("group",)),
    "zb_h2": Recipe(ONE, _handcrafted(2), lambda asked: 2 * asked.pp - 1),
    "zb_auto": Recipe(
        ONE,
        lambda asked: zb_auto(asked.pp, asked.microbatches, asked.memory, asked.times),
        lambda asked: asked.memory,
        options=("limit", "durations"),
    ),
    "zbv": Recipe(
        TWO,
        lambda asked: asked.each(lambda rank: wave.zbv(rank, asked.pp, asked.microbatches)),
        lambda asked: asked.pp,
        v_placement,
    ),
    "v_half": Recipe(
        TWO,
        lambda asked: v_half(asked.pp, asked.microbatches, asked.times),
        lambda asked: v_half_limit(asked.pp) / 2,
        v_placement,
        ("durations",),
    ),
    "dualpipev": Recipe(
        TWO,
        lambda asked: asked.each(lambda rank: wave.dualpipev(rank, asked.pp, asked.microbatches)),
        lambda asked: asked.pp + 0.5,
        v_placement,
    ),
}


def schedule_problems(name: str, pp: int, chunks: int, microbatches: int) -> list[str]:
    """A line for each reason why this schedule cannot be made; each names its key and the nearest legal values."""
    if name.endswith(".csv"):
        return _file_problems(name, pp, chunks, microbatches)
    if name not in RECIPES:
        close = difflib.get_close_matches(name, RECIPES, 1, 0)[0]
        return [f"parallel.schedule={name}: unknown; nearest: {close}; legal: {', '.join(RECIPES)}, or a FILE.csv"]
    problems = []
    fewest, most = RECIPES[name].chunks
    if not fewest <= chunks <= most:
        others = [other for other, recipe in RECIPES.items() if recipe.chunks[0] <= chunks <= recipe.chunks[1]]
        legal = f"{fewest} or more stages" if fewest < most else "1 stage" if most == 1 else f"{most} stages"
        line = f"parallel.chunks={chunks}: {name} has {legal} a rank; set {fewest}"
        problems.append(line + (f", or parallel.schedule={' or '.join(others)}" if others else ""))
    if pp < 1:
        problems.append(f"parallel.pp={pp}: counts ranks; at least 1")
    if microbatches < 1:
        problems.append(f"train.global_batch: {microbatches} microbatches a step; at least 1 (train.micro_batch x dp)")
    return problems


def _file_problems(name: str, pp: int, chunks: int, microbatches: int) -> list[str]:
    try:
        written = load_csv(name)
    except UserError as error:
        return [f"parallel.schedule={line}" for line in error.lines]
    asked = {"parallel.pp": (pp, written.pp), "parallel.chunks": (chunks, written.chunks)}
    problems = [
        f"{key}={value}: parallel.schedule={name} is written for {legal}; set {legal}"
        for key, (value, legal) in asked.items()
        if value != legal
    ]
    if microbatches != written.microbatches:
        problems.append(
            f"train.global_batch: makes {microbatches} microbatches a step, parallel.schedule={name} is written for"
            f" {written.microbatches}; set train.global_batch to {written.microbatches} x train.micro_batch x dp"
        )
    return problems


def default_chunks(name: str) -> int:
    """Stages a rank where the user says nothing: the fewest that the schedule takes, or what its file has."""
    if name.endswith(".csv"):
        return load_csv(name).chunks
    return RECIPES[name].chunks[0] if name in RECIPES else 1


def make_schedule(
    name: str, pp: int, chunks: int, microbatches: int, *,
    group: int | None = None, limit: int | None = None, durations: Durations | None = None,
) -> Schedule:  # fmt: skip
    """The computation of a named schedule: `pp` ranks, `chunks` stages a rank, `microbatches` a step.

    `group`: microbatches that interleaved and zb_h1 take through a stage before the rank's next stage. `limit`:
    microbatches of activations that zb_auto may keep on a rank. `durations`: of the stages, for those that plan with
    them (zb_auto, v_half; others ignore them). A name that ends with .csv is a file. Raises UserError.
    """
    if name.endswith(".csv"):
        problems = schedule_problems(name, pp, chunks, microbatches)
        if problems:
            raise UserError(*problems)
        return load_csv(name)
    asked = _request(name, pp, chunks, microbatches, group, limit, durations)
    rows = tuple(map(tuple, RECIPES[name].rows(asked)))
    return Schedule(name, pp, chunks, microbatches, RECIPES[name].placement(pp, chunks), rows)


def memory_bound(
    name: str, pp: int, chunks: int, microbatches: int, *, group: int | None = None, limit: int | None = None
) -> float:
    """The most that a rank keeps at once, from F until W: in activations of one microbatch on all its stages."""
    asked = _request(name, pp, chunks, microbatches, group, limit, None)
    return min(RECIPES[name].bound(asked), float(microbatches))


def _request(
    name: str, pp: int, chunks: int, microbatches: int,
    group: int | None, limit: int | None, durations: Durations | None,
) -> Request:  # fmt: skip
    problems = schedule_problems(name, pp, chunks, microbatches)
    for key, value in (("group", group), ("limit", limit)):
        if value is not None and name in RECIPES and key not in RECIPES[name].options:
            takers = " and ".join(other for other, recipe in RECIPES.items() if key in recipe.options)
            problems.append(f"{key}={value}: {name} has none; only {takers}; leave it out")
        elif value is not None and value < 1:
            problems.append(f"{key}={value}: counts microbatches; at least 1")
    asked = Request(pp, chunks, microbatches, group, limit, durations)
    if not problems and min(asked.groups) < min(pp, microbatches):
        problems.append(
            f"group={group}: leaves a group of {min(asked.groups)} of {microbatches} microbatches, smaller than pp"
            f" {pp}: ranks could wait for each other forever; leave group out for groups as even as can be"
        )
    if problems:
        raise UserError(*problems)
    return asked
