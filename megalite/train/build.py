"""Assembling a run: process settings, mesh, data, model. Everything the trainer holds is made here, in this order."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from megalite_kernels import explain, tune_allocator
from torch import nn

from megalite.comm import Communicator
from megalite.config.rules import Job
from megalite.config.schema import Config
from megalite.config.validate import validate
from megalite.data.bundle import DataBundle, prepare_data
from megalite.errors import UserError
from megalite.mesh import Mesh
from megalite.model.experts import Experts
from megalite.model.parallelize import fp8_weights, parallelize
from megalite.model.size import flops_per_token, parameter_counts, query_dim, value_dim
from megalite.model.transformer import Transformer
from megalite.optim.optimizer import Optimizer
from megalite.parallel.data import Gradients
from megalite.parallel.parameter import declaration, materialize, placement
from megalite.pipeline import schedule
from megalite.pipeline.schedule import Kind, lower
from megalite.pipeline.schedule.check import communicates
from megalite.pipeline.schedule.measure import peak
from megalite.pipeline.split import split_layers
from megalite.precision import Precision
from megalite.train.memory import Share, predict
from megalite.train.peak import measured_matmul_peak
from megalite.train.precision_table import fp8_lines
from megalite.train.stage_costs import measured_costs
from megalite.world import World, usable_cores


def settle_process(config: Config, world: World) -> list[str]:
    """Threads, determinism and the allocator of this process; returns a line for each thing set without being asked."""
    lines = []
    cores = usable_cores()
    threads = config.train.threads or max(1, cores // world.local_size)
    if world.device.type == "cpu":
        torch.set_num_threads(threads)
        if config.train.threads == 0:
            lines.append(f"{threads} threads: {cores} cores over {world.local_size} local processes (train.threads)")
        lines.append(tune_allocator())
    if config.train.deterministic != "false":
        if config.train.compile:
            torch.use_deterministic_algorithms(True)
        else:  # the same, but for the compiler's own setting, whose import takes 140 MB and a second and a half
            torch._C._set_deterministic_algorithms(True, warn_only=False)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return lines


def make_mesh(config: Config, world: World) -> Mesh:
    """UserError when this configuration is not one for so many processes (also where it was checked without them)."""
    validate(config, world.size)
    parallel, job = config.parallel, Job(config, world.size)
    sizes = {"pp": parallel.pp, "dp": job.dp, "cp": parallel.cp, "tp": parallel.tp}
    return Mesh(
        sizes, world.rank, ulysses=job.ulysses, order=job.order, shard_ranks=parallel.shard_ranks,
        ep=parallel.ep, etp=parallel.etp,
    )  # fmt: skip


def make_data(config: Config, comm: Communicator) -> DataBundle:
    """Rank 0 builds what is not cached, then every rank opens it."""
    # Steps that rewinds skip, at most; part of the order of the data.
    skipped = (config.train.spike_rewinds or 0) * (config.checkpoint.every or 0)
    samples = (config.train.steps + skipped) * config.train.global_batch
    made: list[DataBundle] = []

    def prepare() -> None:
        made.append(prepare_data(config, samples))
        vocab, needed = config.model.vocab, made[0].tokenizer.vocab
        if vocab is not None and vocab < needed:
            raise UserError(
                f"model.vocab: {vocab} is smaller than the tokenizer's {needed}; set model.vocab={needed} or null"
            )

    comm.on_rank_zero(prepare)
    return made[0] if made else prepare_data(config, samples)


def make_schedule(config: Config, mesh: Mesh) -> schedule.Schedule:
    """The pipeline schedule, lowered to what the engine executes; one rank takes every microbatch there and back."""
    parallel, train = config.parallel, config.train
    microbatches = train.global_batch // (train.micro_batch * mesh.size("dp"))
    group, limit = parallel.group_size or None, parallel.in_flight or None
    shape = (parallel.pp, parallel.chunks, microbatches)
    made = schedule.make_schedule(parallel.schedule, *shape, group=group, limit=limit)
    return made if communicates(made) else lower(made)  # a file may say itself when to send


def make_stages(
    config: Config, comm: Communicator, vocab: int, placement: Sequence[int], precision: Precision, device: torch.device
) -> list[Transformer]:
    """Built without storage, spread, then filled: initial weights depend on the seed and parameters' names alone."""
    with torch.device("meta"):
        model = Transformer(config.model, vocab, config.model.max_positions or config.data.sequence_length)
    layers = layers_of_stages(config, comm, vocab, len(placement), precision, device)
    stages = parallelize(model, comm, config, layers, placement)
    if shards_weights(config, comm.mesh):
        from megalite.parallel.fully_sharded import shard_fully  # FSDP2 takes two seconds to import

        for stage in stages:
            # Statistics hold products against those of whole weights, which codes are not.
            in_codes = precision.compute != torch.float16 and not config.log.statistics
            products = fp8_weights(stage) if in_codes else None
            shard_fully(stage, gathered_alone(stage), comm, device, config.train.seed, precision, products)
    else:
        materialize(stages, device, config.train.seed, precision.compute)
    return stages


def gathered_alone(stage: Transformer) -> list[tuple[nn.Module, str]]:
    """What of a stage ZeRO 3 gathers for itself: experts, and blocks and multi-token modules without them; with the
    mesh axis of each."""
    units: list[tuple[nn.Module, str]] = []
    for block in (*stage.blocks.values(), *stage.mtp.values()):
        units += [(module, "edp") for module in block.modules() if isinstance(module, Experts)]
        units.append((block, "shard"))
    return units


def shards_weights(config: Config, mesh: Mesh) -> bool:
    """Whether the replicas share out the weights; one alone, or each with a copy of its own, has nothing to share."""
    return config.parallel.zero == 3 and config.parallel.engine == "megalite" and mesh.size("shard") > 1


def backends(config: Config, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Which kernels this run takes, and why not others. UserError where `train.kernels` cannot do it."""
    model = config.model
    asked = {
        "dims": (query_dim(model), value_dim(model)),
        "softcap": model.attention_softcap is not None,
        "window": model.window is not None,
        "sinks": model.attention_sinks,
        "documents": config.data.packing == "documents",
    }
    try:
        return explain(device, dtype, config.train.compile, config.train.kernels, asked)
    except ValueError as error:
        raise UserError(f"train.kernels={config.train.kernels}: {error}; auto takes what can") from None


def layers_of_stages(
    config: Config, comm: Communicator, vocab: int, stages: int, precision: Precision, device: torch.device
) -> list[range]:
    """Which layers each stage has: as listed, by cost measured once for all ranks, or as even as can be."""
    if config.parallel.layers != "auto":
        counts = Job(config, comm.mesh.world_size).stage_layers
        return split_layers(config.model.layers, stages, counts=counts)
    embedding, costs, head = comm.on_rank_zero(lambda: list(measured_costs(config, vocab, precision, device)))
    return split_layers(config.model.layers, stages, costs=costs, embedding=embedding, head=head)


def make_gradients(
    config: Config, comm: Communicator, stages: Sequence[Transformer], precision: Precision
) -> Gradients:
    zero, bucket_bytes = config.parallel.zero, config.parallel.bucket_mb * 2**20
    if config.parallel.engine == "deepspeed":
        from megalite.train.deepspeed_engine import DeepSpeedGradients

        return DeepSpeedGradients(stages[0], comm, config, precision)
    if shards_weights(config, comm.mesh):
        from megalite.parallel.fully_sharded import ShardedGradients

        return ShardedGradients(stages, comm, precision, bucket_bytes)
    kept = 0 if zero == 3 else zero
    return Gradients(stages, comm, precision.accumulate, bucket_bytes, kept, precision.communicate)


def rank_share(config: Config, mesh: Mesh, stages: Sequence[Transformer], made: schedule.Schedule) -> Share:
    """What this rank has of the job, for the prediction of its memory."""
    parameters = {p: math.prod(placement(p).shape) for stage in stages for p in stage.parameters()}
    layers = sum(len(stage.layers) for stage in stages) / len(stages)
    in_flight = peak(made.rows[mesh.index("pp")], Kind.W)
    experts = sum(size for p, size in parameters.items() if "ep" in declaration(p).shard)
    last, replicas = any(s.last for s in stages), mesh.size("dp", "cp")
    held, kept_layers, microbatches = sum(parameters.values()), layers * in_flight, made.microbatches
    return Share(held, kept_layers, last, replicas, experts, mesh.size("edp"), microbatches)


def describe_layout(config: Config, mesh: Mesh, made: schedule.Schedule) -> str:
    """The axes that are more than one rank, and how each is used."""
    parallel = config.parallel
    notes = {
        "pp": f" ({parallel.schedule}, {made.chunks} x {mesh.size('pp')} stages, {made.microbatches} microbatches)",
        "cp": f" ({parallel.cp_kind})",
        "tp": " with sp" if parallel.sp else "",
        "dp": "",
    }
    axes = [f"{axis} {size}{notes[axis]}" for axis, size in mesh.sizes.items() if size > 1]
    sharing = [f"zero {parallel.zero}"] if parallel.zero else []
    return " ".join(axes + sharing) or "one process"


def make_optimizer(
    config: Config, stages: Sequence[Transformer], gradients: Gradients, precision: Precision
) -> Optimizer:
    if config.parallel.engine == "deepspeed":
        from megalite.train.deepspeed_engine import DeepSpeedGradients, DeepSpeedOptimizer

        assert isinstance(gradients, DeepSpeedGradients)
        return DeepSpeedOptimizer(gradients, config.optim, config.train.steps)
    return Optimizer(stages, gradients, config.optim, config.train.steps, precision, config.train.seed)


def run_facts(
    config: Config, world: World, mesh: Mesh, data: DataBundle, vocab: int, precision: Precision,
    stages: Sequence[Transformer], made: schedule.Schedule,
) -> dict[str, Any]:  # fmt: skip
    """What the header shows and environment.json keeps; keys are listed in `header.py`."""
    train, sequence = config.train, config.data.sequence_length
    counts = parameter_counts(config.model, vocab, config.model.max_positions or sequence)
    threads = torch.get_num_threads()
    return {
        "model": config.model.name,
        "family": config.model.family,
        "parameters": counts.total,
        "embedding_parameters": counts.embedding,
        "layers": config.model.layers,
        "hidden": config.model.hidden,
        "layout": describe_layout(config, mesh, made),
        "world_size": world.size,
        "device": str(world.device),
        "threads": threads,
        "precision": str(precision),
        "precision_notes": fp8_lines(config, precision, world.device),
        "micro_batch": train.micro_batch,
        "accumulation": train.global_batch // (train.micro_batch * mesh.size("dp")),
        "global_batch": train.global_batch,
        "sequence_length": sequence,
        "steps": train.steps,
        "data": ", ".join(config.data.blend) or config.data.path,
        "tokenizer": config.data.tokenizer,
        "data_notes": data.notes,
        "vocab": vocab,
        "backends": backends(config, world.device, precision.compute),
        "peak_flops": measured_matmul_peak(world.device, precision.compute, threads),
        "flops_per_token": flops_per_token(config.model, vocab, sequence),
        "predicted_memory_gb": predict(
            config, vocab, precision, world.device.type, rank_share(config, mesh, stages, made)
        ).total
        / 1e9,
    }
