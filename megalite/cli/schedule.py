"""`megalite schedule`: draw, check and simulate a pipeline schedule, by name or from a CSV."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megalite.config import schema
from megalite.config.options import parse_options
from megalite.disk import replace_bytes, replace_text
from megalite.errors import UserError
from megalite.pipeline.schedule import NAMES, Schedule, default_chunks, lower, make_schedule, memory_bound
from megalite.pipeline.schedule.check import problems
from megalite.pipeline.schedule.measure import Cost, cost_of
from megalite.pipeline.schedule.ops import SENDS
from megalite.pipeline.schedule.picture import chrome_trace, paint, svg
from megalite.pipeline.schedule.png import png
from megalite.pipeline.schedule.simulate import Durations, Event, simulate
from megalite.pipeline.schedule.text import load_csv, write_csv

USAGE = """Usage: megalite schedule NAME|FILE.csv [key=value ...]

Simulates a pipeline schedule: bubble, activations in flight on each rank; checks that it runs without a deadlock.
Times are those of a rank's whole share of the layers, for one microbatch. FILE.csv: the text form of
torch.distributed.pipelining, a line a rank.
Example: megalite schedule zbv pp=4 microbatches=8 out=zbv.svg"""


@dataclass(kw_only=True)
class ScheduleOptions:
    name: str = schema.key("1f1b", f"{', '.join(NAMES)}, or a FILE.csv.")
    file: str | None = schema.key(None, "A schedule as CSV; in place of a name.")
    pp: int | None = schema.key(None, "Pipeline ranks; null: 4, or what the file has.", minimum=1)
    chunks: int | None = schema.key(None, "Stages a rank; null: the fewest that the schedule takes.", minimum=1)
    microbatches: int | None = schema.key(None, "Microbatches a step; null: 8, or what the file has.", minimum=1)
    F: float = schema.key(1.0, "Time of a forward.")
    I: float = schema.key(1.0, "Time of an input gradient.")  # noqa: E741
    W: float = schema.key(1.0, "Time of a weight gradient.")
    transfer: float = schema.key(0.0, "Time of a transfer to another rank.", minimum=0)
    group: int | None = schema.key(None, "interleaved, zb_h1: microbatches through a stage before the next.", minimum=1)
    limit: int | None = schema.key(None, "zb_auto: microbatches of activations a rank may keep; null: 2 pp.", minimum=1)
    out: str | None = schema.key(None, "Also write PATH.svg, .png, .json (Chrome trace) or .csv.")
    lowered: bool = schema.key(False, "out=PATH.csv: with sends, receives, reductions and the optimizer's step.")


def run(arguments: list[str]) -> int:
    options = parse_options(ScheduleOptions, arguments, USAGE, positional=("name",))
    for key in ("F", "I", "W"):
        if not 0 < getattr(options, key) < float("inf"):
            raise UserError(f"{key}={getattr(options, key):g}: a time; above 0")
    suffixes = (".svg", ".png", ".json", ".csv")
    if options.out is not None and Path(options.out).suffix not in suffixes:
        raise UserError(f"out={options.out}: unknown kind of file; end it in {', '.join(suffixes)}")
    schedule, durations = _asked(options)
    events = simulate(schedule, durations)
    cost = cost_of(schedule, events, durations)
    lowered = lower(schedule, durations=durations)
    found = problems(lowered)
    assert not found, found
    if options.out is not None:
        _write(Path(options.out), schedule, lowered if options.lowered else schedule, events, cost)
    print(*_lines(schedule, lowered, cost, options), sep="\n")
    return 0


def _write(path: Path, schedule: Schedule, rows: Schedule, events: Sequence[Event], cost: Cost) -> None:
    if path.suffix == ".csv":
        replace_text(path, write_csv(rows))
    elif path.suffix == ".json":
        replace_text(path, chrome_trace(schedule, events))
    elif path.suffix == ".svg":
        replace_text(path, svg(paint(schedule, events, cost)))
    else:
        replace_bytes(path, png(paint(schedule, events, cost)))


def _asked(options: ScheduleOptions) -> tuple[Schedule, Durations]:
    """The schedule, and the durations of its stages."""
    name = options.file or options.name
    if name.endswith(".csv") or options.file:
        schedule = load_csv(name)
        pp, chunks, microbatches = schedule.pp, schedule.chunks, schedule.microbatches
        for key, legal in (("pp", pp), ("chunks", chunks), ("microbatches", microbatches)):
            if getattr(options, key) not in (None, legal):
                raise UserError(f"{key}={getattr(options, key)}: {name} is written for {legal}; leave it out")
        return schedule, Durations.even(pp, chunks, options.F, options.I, options.W, options.transfer)
    pp, microbatches = options.pp or 4, options.microbatches or 8
    chunks = options.chunks or default_chunks(name)
    durations = Durations.even(pp, chunks, options.F, options.I, options.W, options.transfer)
    try:
        made = make_schedule(
            name, pp, chunks, microbatches, group=options.group, limit=options.limit, durations=durations
        )
    except UserError as error:
        lines = (line.replace("parallel.schedule", "name").replace("parallel.", "") for line in error.lines)
        raise UserError(*lines) from None
    return made, durations


def _lines(schedule: Schedule, lowered: Schedule, cost: Cost, options: ScheduleOptions) -> list[str]:
    """What is printed: sizes, bubble, a table of the ranks, what was checked."""
    sends = sum(op.kind in SENDS for row in lowered.rows for op in row)
    stages = "1 stage" if schedule.chunks == 1 else f"{schedule.chunks} stages"
    size = f"{schedule.pp} ranks, {stages} a rank, {schedule.microbatches} microbatches"
    span = f"longest from a rank's first op to its last {max(cost.spans):g}"
    to_work = f"{cost.bubble_to_ideal:.2%} of the work (Narayanan et al. 2021)"
    to_makespan = f"{cost.bubble_to_makespan:.2%} of the makespan (Qi et al. 2024)"
    lines = [
        f"{schedule.name}: {size}; F={options.F:g} I={options.I:g} W={options.W:g}",
        f"makespan {cost.makespan:g}, of work {cost.ideal:g}; {span}",
        f"bubble {to_work}, {to_makespan}",
        "",
        "activations in flight at the peak, in microbatches on all stages of a rank",
        "rank  stages        until I  until W",
    ]
    for rank in range(schedule.pp):
        own = ",".join(map(str, schedule.stages_of(rank)))
        lines.append(f"{rank:<5} {own:<12} {cost.in_flight[rank]:>8g} {cost.until_weights[rank]:>8g}")
    if schedule.name in NAMES:
        bound = memory_bound(
            schedule.name, schedule.pp, schedule.chunks, schedule.microbatches, group=options.group, limit=options.limit
        )
        lines.append(f"promised at most       {bound:>13g}")
    lines += ["", f"valid: everything once and in order, no deadlock even if each of {sends} sends blocks"]
    return lines if options.out is None else [*lines, f"written: {options.out}"]
