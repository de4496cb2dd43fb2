"""Assembling a run: process settings, mesh, data, model. Everything the trainer holds is made here, in this order."""

from typing import Any

import torch
from megalite_kernels import explain, tune_allocator

from megalite.comm import Communicator
from megalite.config.schema import Config
from megalite.data.bundle import DataBundle, prepare_data
from megalite.errors import UserError
from megalite.mesh import Mesh
from megalite.model.apply import apply_compile, apply_recompute
from megalite.model.size import flops_per_token, parameter_counts
from megalite.model.transformer import Transformer
from megalite.parallel.parameter import materialize
from megalite.precision import Precision
from megalite.train.memory import predicted_memory
from megalite.train.peak import measured_matmul_peak
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
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return lines


def make_mesh(config: Config, world: World) -> Mesh:
    parallel = config.parallel
    inner = parallel.pp * parallel.cp * parallel.tp
    dp = world.size // inner if parallel.dp == -1 else parallel.dp
    if dp * inner != world.size or dp < 1:
        raise UserError(
            f"parallel.dp: dp {parallel.dp} x pp {parallel.pp} x cp {parallel.cp} x tp {parallel.tp} needs"
            f" {max(dp, 1) * inner} processes, {world.size} run; start torchrun --nproc-per-node {max(dp, 1) * inner}"
        )
    return Mesh({"pp": parallel.pp, "dp": dp, "cp": parallel.cp, "tp": parallel.tp}, world.rank)


def make_data(config: Config, comm: Communicator) -> DataBundle:
    """Rank 0 builds what is not cached, then every rank opens it."""
    samples = config.train.steps * config.train.global_batch
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


def make_model(config: Config, data: DataBundle, precision: Precision, device: torch.device) -> Transformer:
    """Built without storage, then filled: initial weights depend on the seed and the parameters' names alone."""
    max_positions = config.model.max_positions or config.data.sequence_length
    with torch.device("meta"):
        model = Transformer(config.model, config.model.vocab or data.tokenizer.vocab, max_positions)
    materialize(model, device, config.train.seed, precision.compute)
    apply_recompute(model, config.recompute.mode)
    if config.train.compile:
        apply_compile(model)
    return model


def run_facts(
    config: Config, world: World, mesh: Mesh, data: DataBundle, model: Transformer, precision: Precision
) -> dict[str, Any]:
    """What the header shows and environment.json keeps; keys are listed in `header.py`."""
    train, sequence = config.train, config.data.sequence_length
    counts = parameter_counts(config.model, model.vocab, model.max_positions)
    threads = torch.get_num_threads()
    return {
        "model": config.model.name,
        "family": config.model.family,
        "parameters": counts.total,
        "embedding_parameters": counts.embedding,
        "layers": config.model.layers,
        "hidden": config.model.hidden,
        "layout": " ".join(f"{axis} {size}" for axis, size in mesh.sizes.items() if size > 1) or "one process",
        "world_size": world.size,
        "device": str(world.device),
        "threads": threads,
        "precision": f"{precision.name} ({precision.reason})" if precision.reason else precision.name,
        "micro_batch": train.micro_batch,
        "accumulation": train.global_batch // (train.micro_batch * mesh.size("dp")),
        "global_batch": train.global_batch,
        "sequence_length": sequence,
        "steps": train.steps,
        "data": ", ".join(config.data.blend) or config.data.path,
        "tokenizer": config.data.tokenizer,
        "data_notes": data.notes,
        "vocab": model.vocab,
        "backends": explain(world.device, precision.compute, config.train.compile),
        "peak_flops": measured_matmul_peak(world.device, precision.compute, threads),
        "flops_per_token": flops_per_token(config.model, model.vocab, sequence),
        "predicted_memory_gb": predicted_memory(
            config, model.vocab, precision.compute, precision.main, world.device.type
        ),
    }
