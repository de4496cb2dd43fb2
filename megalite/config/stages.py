"""Rules of pipelines: layers over stages, and what a schedule takes: its sizes, its options, its own file."""

from collections.abc import Iterator

from megalite.config.rules import Job, Rules, nearest_numbers
from megalite.errors import UserError
from megalite.pipeline.schedule.named import RECIPES, schedule_problems
from megalite.pipeline.schedule.ops import Kind
from megalite.pipeline.schedule.text import load_csv

RULES = Rules()
MICROBATCHES = (
    "train.global_batch", "train.micro_batch", "parallel.dp", "parallel.pp", "parallel.cp", "parallel.tp",
)  # fmt: skip
SPLIT_BACKWARD = ("zb_h1", "zb_h2", "zb_auto", "zbv", "v_half", "dualpipev")
"""Schedules that compute the gradients of weights in an op of their own."""

NOT_OF_A_FILE = {
    Kind.GATHER: "parallel.zero=3 gathers weights layer by layer on its own",
    Kind.RESHARD: "parallel.zero=3 shards weights again on its own",
    Kind.RECOMPUTE: "recompute.mode computes again inside a backward",
}
"""Ops that `megalite schedule` draws and the engine does not take from a file: who does it instead."""


@RULES.reads("parallel.pp", "parallel.chunks", "parallel.layers", "model.layers")
def stages_share_the_layers(job: Job) -> Iterator[str]:
    parallel, layers, stages = job.config.parallel, job.config.model.layers, job.stages
    shape = f"parallel.pp {parallel.pp} x parallel.chunks {parallel.chunks}"
    try:
        listed = job.stage_layers
    except ValueError:
        yield f"parallel.layers={parallel.layers}: expects auto, null, or {stages} numbers, one a stage ({shape})"
        return
    if listed is None:
        if stages > layers:
            axis, others = ("pp", parallel.chunks) if parallel.pp >= parallel.chunks else ("chunks", parallel.pp)
            most = f"at most {layers // others}" if others <= layers else "both smaller"
            yield (
                f"parallel.{axis}={getattr(parallel, axis)}: {shape} is {stages} stages for {layers} layers"
                f" (model.layers); {most}"
            )
    elif len(listed) != stages:
        yield f"parallel.layers={parallel.layers}: lists {len(listed)} stages; expects {stages} ({shape})"
    elif sum(listed) != layers:
        yield f"parallel.layers={parallel.layers}: sums to {sum(listed)}; expects model.layers {layers}"
    elif min(listed) < 0 or 0 in listed[1:-1]:
        yield f"parallel.layers={parallel.layers}: at least 1 a stage; 0 only where embedding or head is a stage alone"


@RULES.reads("parallel.schedule", "parallel.chunks", *MICROBATCHES)
def schedule_takes_the_shape(job: Job) -> Iterator[str]:
    parallel = job.config.parallel
    name = parallel.schedule
    microbatches = job.accumulation if job.batch_divides else None
    if not name.endswith(".csv"):
        yield from schedule_problems(name, parallel.pp, parallel.chunks, microbatches or 1)
        return
    try:
        rows = load_csv(name)
    except UserError as error:
        yield from (f"parallel.schedule={line}" for line in error.lines)
        return
    for kind, how in NOT_OF_A_FILE.items():
        if found := next((op for row in rows.rows for op in row if op.kind == kind), None):
            yield f"parallel.schedule={name}: has {found}; {how}, so leave {kind} out"
    sizes = {
        "parallel.pp": (parallel.pp, rows.pp),
        "parallel.chunks": (parallel.chunks, rows.chunks),
        "microbatches (train.global_batch / train.micro_batch / dp)": (microbatches, rows.microbatches),
    }
    for size, (asked, written) in sizes.items():
        if asked not in (None, written):
            yield f"parallel.schedule={name}: is written for {written} {size}, but this job has {asked}; change either"


@RULES.reads("parallel.schedule", "parallel.group_size", "parallel.in_flight")
def schedule_has_the_option(job: Job) -> Iterator[str]:
    name = job.config.parallel.schedule
    for key, option in (("group_size", "group"), ("in_flight", "limit")):
        value = getattr(job.config.parallel, key)
        if value and not _takes(name, option):
            takers = " and ".join(other for other in RECIPES if _takes(other, option))
            yield f"parallel.{key}={value}: only of parallel.schedule {takers} (now {name}); set 0"


@RULES.reads("parallel.group_size", "parallel.schedule", *MICROBATCHES)
def groups_fill_the_pipeline(job: Job) -> Iterator[str]:
    parallel, size = job.config.parallel, job.config.parallel.group_size
    if size == 0 or not _takes(parallel.schedule, "group") or not job.batch_divides:
        return
    total = job.accumulation
    legal = [n for n in range(min(parallel.pp, total), total + 1) if total % n == 0 or total % n >= parallel.pp]
    if min(size, total) not in legal:
        yield (
            f"parallel.group_size={size}: cuts {total} microbatches into groups of {size} and a rest of {total % size};"
            f" each needs parallel.pp {parallel.pp}; nearest: {nearest_numbers(size, legal)}"
        )


@RULES.reads("parallel.zero", "parallel.engine", "parallel.schedule")
def zero_3_shards_within_a_backward(job: Job) -> Iterator[str]:
    parallel = job.config.parallel
    if parallel.zero == 3 and parallel.engine == "megalite" and _splits_backward(parallel.schedule):
        yield (
            f"parallel.zero=3: parallel.schedule {parallel.schedule} computes weight gradients apart from the backward"
            " that zero 3 shards them in; set parallel.zero=2, or a schedule such as 1f1b or interleaved"
        )


def _splits_backward(schedule: str) -> bool:
    """Whether an op of its own computes the gradients of weights; a file that cannot be read has its own line."""
    if not schedule.endswith(".csv"):
        return schedule in SPLIT_BACKWARD
    try:
        return any(op.kind == Kind.W for row in load_csv(schedule).rows for op in row)
    except UserError:
        return False


def _takes(schedule: str, option: str) -> bool:
    return schedule in RECIPES and option in RECIPES[schedule].options
