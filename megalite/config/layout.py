"""Rules of the layout: ranks over axes, the model and the batch over ranks, and what goes with what.

All are checked before any process group starts. Pipelines have theirs in `stages.py`.
"""

import math
from collections.abc import Iterator
from typing import Any

from megalite.config.rules import Job, Rules, around, divisors, divisors_near, nearest_numbers
from megalite.pipeline.split import split_layers

RULES = Rules()
AXES = ("pp", "dp", "cp", "tp")
INNER = ("parallel.pp", "parallel.cp", "parallel.tp")


@RULES.reads("parallel.dp", *INNER)
def layout_fills_the_world(job: Job) -> Iterator[str]:
    parallel, world, inner = job.config.parallel, job.world_size, job.inner
    if parallel.dp == 0 or parallel.dp < -1:
        yield f"parallel.dp={parallel.dp}: counts ranks; at least 1, or -1 for what the other axes leave"
    elif world is not None and world % inner:
        axis, value = max(((axis, getattr(parallel, axis)) for axis in ("tp", "cp", "pp")), key=lambda pair: pair[1])
        others = inner // value
        legal = f"nearest: {divisors_near(value, world // others)}" if world % others == 0 else "set smaller axes"
        start = around(world, inner) if parallel.dp == -1 else str(job.dp * inner)
        yield (
            f"parallel.{axis}={value}: pp {parallel.pp} x cp {parallel.cp} x tp {parallel.tp} is {inner} ranks a"
            f" replica, which do not divide this job's {world}; {legal}; or start {start} processes"
        )
    elif world is not None and job.dp * inner != world:
        yield (
            f"parallel.dp={parallel.dp}: dp {job.dp} x pp {parallel.pp} x cp {parallel.cp} x tp {parallel.tp} is"
            f" {job.dp * inner} ranks, but this job has {world}; set parallel.dp={world // inner} or -1; or start"
            f" {job.dp * inner} processes"
        )


@RULES.reads("parallel.order")
def order_names_each_axis_once(job: Job) -> Iterator[str]:
    if sorted(job.order) != sorted(AXES):
        yield f"parallel.order={job.config.parallel.order}: names each axis once; such as {','.join(AXES)}"


@RULES.reads("train.global_batch", "train.micro_batch", "parallel.dp", *INNER)
def global_batch_divides(job: Job) -> Iterator[str]:
    train = job.config.train
    if not job.knows_dp:
        return
    step = train.micro_batch * job.dp
    if train.global_batch % step:
        line = (
            f"train.global_batch={train.global_batch}: must be a multiple of train.micro_batch {train.micro_batch} x dp"
            f" {job.dp} = {step}; nearest: {around(train.global_batch, step)}"
        )
        if train.global_batch % job.dp == 0:
            line += f"; or train.micro_batch={divisors_near(train.micro_batch, train.global_batch // job.dp)}"
        yield line


@RULES.reads(
    "parallel.tp", "model.hidden", "model.heads", "model.kv_heads", "model.head_dim", "model.ffn", "model.vocab"
)
def tensor_parallel_divides_the_model(job: Job) -> Iterator[str]:
    """The vocabulary needs no division: its shards may be uneven."""
    tp, heads = job.config.parallel.tp, job.config.model.heads
    reasons = _against_tp(job, tp)
    if reasons:
        legal = [n for n in divisors(heads) if not _against_tp(job, n)]
        yield f"parallel.tp={tp}: {' and '.join(reasons)}; nearest: {nearest_numbers(tp, legal)}"


def _against_tp(job: Job, tp: int) -> list[str]:
    """Why so many tensor-parallel ranks cannot share the model."""
    model, kv = job.config.model, job.kv_heads
    reasons = []
    if model.heads % tp:
        reasons.append(f"does not divide model.heads {model.heads}")
    elif kv % tp and tp % kv:
        reasons.append(f"neither divides model.kv_heads {kv} nor is a multiple of it")
    elif kv * job.head_dim % tp:
        reasons.append(f"does not divide the {kv * job.head_dim} rows of keys (model.kv_heads x head_dim)")
    if model.ffn % tp:
        reasons.append(f"does not divide model.ffn {model.ffn}")
    if model.vocab is not None and tp > model.vocab:
        reasons.append(f"is more than the {model.vocab} rows of the embedding (model.vocab)")
    return reasons


@RULES.reads(
    "parallel.sp", "parallel.overlap", "parallel.tp", "parallel.cp", "train.micro_batch", "data.sequence_length"
)
def sequence_parallel_divides_the_tokens(job: Job) -> Iterator[str]:
    parallel, train, length = job.config.parallel, job.config.train, job.config.data.sequence_length
    tokens = train.micro_batch * length // parallel.cp
    if parallel.sp and parallel.tp == 1:
        yield "parallel.sp=true: spreads the sequence over tp ranks, and parallel.tp is 1; set false, or parallel.tp=2"
    elif parallel.sp and tokens % parallel.tp and length % _pieces(parallel.cp) == 0:
        step = math.lcm(_pieces(parallel.cp), parallel.cp * parallel.tp // math.gcd(parallel.tp, train.micro_batch))
        yield (
            f"parallel.sp=true: parallel.tp {parallel.tp} does not divide the {tokens} tokens of a microbatch"
            f" (train.micro_batch {train.micro_batch} x data.sequence_length {length} / parallel.cp {parallel.cp});"
            f" nearest: data.sequence_length={around(length, step)}; or set false"
        )
    if parallel.overlap and not parallel.sp:
        yield "parallel.overlap=true: overlaps the gather of parallel.sp, which is false; set that true, or this false"


@RULES.reads("parallel.cp", "data.sequence_length")
def context_parallel_divides_the_sequence(job: Job) -> Iterator[str]:
    cp, length = job.config.parallel.cp, job.config.data.sequence_length
    if length % _pieces(cp):
        legal = [n for n in divisors(length) if length % _pieces(n) == 0]
        yield (
            f"data.sequence_length={length}: must be a multiple of 2 x parallel.cp {cp} = {2 * cp}; nearest:"
            f" {around(length, 2 * cp)}; or parallel.cp={nearest_numbers(cp, legal)}"
        )


@RULES.reads("parallel.cp", "parallel.cp_kind", "parallel.ulysses", "parallel.tp", "model.heads")
def ulysses_divides_cp_and_heads(job: Job) -> Iterator[str]:
    parallel, heads = job.config.parallel, job.config.model.heads
    if parallel.ulysses and parallel.cp_kind != "hybrid":
        yield f"parallel.ulysses={parallel.ulysses}: only of parallel.cp_kind=hybrid (now {parallel.cp_kind}); set 0"
    elif heads % parallel.tp == 0:
        local, key = heads // parallel.tp, "parallel.ulysses" if parallel.ulysses else "parallel.cp"
        legal = nearest_numbers(
            job.ulysses, [n for n in divisors(local) if key == "parallel.cp" or parallel.cp % n == 0]
        )
        if parallel.ulysses and parallel.cp % parallel.ulysses:
            yield f"{key}={job.ulysses}: does not divide parallel.cp {parallel.cp}; nearest: {legal}"
        elif local % job.ulysses:
            yield (
                f"{key}={job.ulysses}: does not divide the {local} heads of a tp rank (model.heads {heads} /"
                f" parallel.tp {parallel.tp}) that {parallel.cp_kind} spreads; nearest: {legal}; or cp_kind=ring"
            )


@RULES.reads("parallel.zero", "parallel.engine", "optim.name", "train.deterministic")
def zero_3_meets_what_it_can(job: Job) -> Iterator[str]:
    config = job.config
    if config.parallel.zero != 3 or config.parallel.engine != "megalite":
        return
    if config.optim.name == "muon":
        yield "parallel.zero=3: not built for optim=muon, which needs whole matrices; legal: 0, 1, 2; or optim=adamw"
    if config.train.deterministic == "layout":
        yield "parallel.zero=3: not with train.deterministic=layout, it adds in its own order; legal: 0, 1, 2; or true"


@RULES.reads("parallel.shard_ranks", "parallel.zero", "parallel.dp", *INNER)
def copies_divide_the_replicas(job: Job) -> Iterator[str]:
    parallel, size = job.config.parallel, job.config.parallel.shard_ranks
    if size and (parallel.zero != 3 or parallel.engine != "megalite"):
        yield f"parallel.shard_ranks={size}: has no effect without parallel.zero=3 and parallel.engine=megalite; set 0"
    elif size and job.counts_ranks and job.knows_dp and job.dp * parallel.cp % size:
        yield (
            f"parallel.shard_ranks={size}: does not divide the {job.dp * parallel.cp} ranks of dp {job.dp} x cp"
            f" {parallel.cp}; nearest: {divisors_near(size, job.dp * parallel.cp)}; or 0 for all"
        )


@RULES.reads(
    *("parallel.engine", "parallel.offload", "parallel.zero", "train.deterministic", "precision.name", "optim.name"),
    *INNER,
)
def deepspeed_spreads_data_alone(job: Job) -> Iterator[str]:
    parallel = job.config.parallel
    if parallel.engine == "deepspeed":
        for axis in ("pp", "cp", "tp"):
            value = getattr(parallel, axis)
            if value > 1:
                yield f"parallel.{axis}={value}: parallel.engine=deepspeed spreads data alone; legal: 1"
        if job.config.train.deterministic == "layout":
            yield "train.deterministic=layout: not with parallel.engine=deepspeed, it adds in its own order; set true"
        if parallel.zero == 0:
            yield "parallel.zero=0: parallel.engine=deepspeed shards at least the optimizer; legal: 1, 2, 3"
        if (name := job.config.precision.name) not in ("auto", "fp32", "bf16"):
            legal = "legal: fp32, bf16; or parallel.engine=megalite"
            yield f"precision={name}: parallel.engine=deepspeed has none; {legal}"
        if job.config.optim.name == "muon":
            yield "optim.name=muon: not with parallel.engine=deepspeed; legal: adamw, sgd; or parallel.engine=megalite"
    if parallel.offload and (parallel.engine != "deepspeed" or parallel.zero == 0):
        yield "parallel.offload=true: needs parallel.engine=deepspeed and parallel.zero=1, 2 or 3; or set false"


@RULES.reads("recompute.mode", "recompute.layers", "model.layers")
def recompute_reaches_a_layer(job: Job) -> Iterator[str]:
    recompute, layers = job.config.recompute, job.config.model.layers
    if recompute.layers > layers:
        yield f"recompute.layers={recompute.layers}: the model has {layers} layers (model.layers); at most that"
    elif recompute.layers > 1 and recompute.mode == "none":
        yield f"recompute.layers={recompute.layers}: has no effect with recompute=none; set 1, or recompute=full"


def _pieces(cp: int) -> int:
    """Pieces of a sequence over cp ranks: each holds an early and a late one, so that causal attention is even work."""
    return 2 * cp if cp > 1 else 1


def derived(job: Job) -> dict[str, Any]:
    """What -1, 0 and null of the layout stand for: key -> value in force. Only for a valid configuration."""
    parallel = job.config.parallel
    values: dict[str, Any] = {}
    if parallel.dp == -1 and job.counts_ranks:
        values["parallel.dp"] = job.dp
    if parallel.cp_kind == "hybrid" and parallel.ulysses == 0:
        values["parallel.ulysses"] = job.ulysses
    if job.stages > 1 and parallel.layers is None:
        values["parallel.layers"] = ",".join(
            str(len(stage)) for stage in split_layers(job.config.model.layers, job.stages)
        )
    if parallel.zero == 3 and parallel.shard_ranks == 0 and job.counts_ranks:
        values["parallel.shard_ranks"] = job.shard_ranks
    return values
