"""Evaluation of a run's checkpoint without a trainer, on any layout."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megalite.checkpoint.dcp import load_tensors, read_metadata
from megalite.checkpoint.store import CheckpointStore, read_trainer
from megalite.checkpoint.training import find_checkpoint
from megalite.comm import Communicator
from megalite.config.build import build
from megalite.config.schema import Config, ParallelConfig
from megalite.errors import UserError
from megalite.model.transformer import Transformer
from megalite.parallel.boxes import Held
from megalite.parallel.parameter import declared_parameters, placement
from megalite.pipeline.forward import Forward
from megalite.precision import choose_precision
from megalite.train.build import make_data, make_mesh, make_schedule, make_stages, settle_process
from megalite.train.evaluate import Evaluation, evaluate
from megalite.train.fp8_steps import Fp8Steps
from megalite.world import world_from_environment


def evaluate_run(run_dir: Path, name: str, batches: int, parallel: ParallelConfig) -> list[Evaluation]:
    """Every validation set of a run, with its checkpoint `name` (empty: the newest), in the run's own precision."""
    if parallel.zero or parallel.engine != "megalite":
        key, value = ("zero", parallel.zero) if parallel.zero else ("engine", parallel.engine)
        raise UserError(f"parallel.{key}={value}: is for training; spread weights over tp, pp or ep instead")
    checkpoint, world = find_checkpoint(run_dir, name), world_from_environment()
    config = build(Config, read_trainer(checkpoint)["config"])
    config.parallel = parallel
    settle_process(config, world)
    comm = Communicator(make_mesh(config, world))
    counters = CheckpointStore(checkpoint.parent, comm, keep=0).verify(checkpoint)
    data, precision = make_data(config, comm), choose_precision(config.precision, world.device)
    schedule = make_schedule(config, comm.mesh)
    stages = make_stages(config, comm, counters["vocab"], schedule.placement, precision, world.device)
    load_weights(checkpoint, stages, comm)
    Fp8Steps(stages, comm, whole=False).begin()
    numbered = dict(zip(schedule.stages_of(comm.mesh.index("pp")), stages, strict=True))
    forward = Forward(numbered, schedule, comm, precision.compute)
    token_bytes = torch.as_tensor(data.token_bytes)
    samples = batches * config.train.global_batch
    where = (comm, config.train.micro_batch, world.device, samples)
    return [evaluate(forward.losses, each, token_bytes, *where, show=True) for each in data.validation]


@torch.no_grad()
def load_weights(checkpoint: Path, stages: Sequence[Transformer], comm: Communicator) -> None:
    """Fill what this rank holds of the model from a verified checkpoint's main weights."""
    stored = read_metadata(checkpoint).state_dict_metadata
    tensors: dict[str, Held] = {}
    parameters = {f"model.{name}": (parameter, declared) for name, parameter, declared in declared_parameters(stages)}
    for name, (parameter, declared) in parameters.items():
        placed, entry = placement(parameter), stored[name]
        assert isinstance(entry, TensorStorageMetadata)
        kept = torch.empty(placed.shape, dtype=entry.properties.dtype, device=parameter.device)
        tensors[name] = Held(declared.shape, (((placed.offsets, placed.shape), kept),))
    load_tensors(checkpoint, tensors, comm, also_stored=("model.", "optim."))
    for name, (parameter, _) in parameters.items():
        parameter.copy_(tensors[name].parts[0][1])
