"""Evaluation of a run's checkpoint without a trainer, on however many processes run now."""

import json
from pathlib import Path

import torch

from megalite.checkpoint.model_folder import load_model
from megalite.checkpoint.training import find_checkpoint
from megalite.comm import Communicator
from megalite.config.build import build
from megalite.config.schema import Config, ParallelConfig
from megalite.train.build import make_data, make_mesh
from megalite.train.evaluate import Evaluation, evaluate
from megalite.world import world_from_environment


def evaluate_run(run_dir: Path, name: str = "", batches: int = 0) -> list[Evaluation]:
    """Every validation set of a run, with its checkpoint `name` (empty: the newest)."""
    checkpoint = find_checkpoint(run_dir, name)
    world = world_from_environment()
    model, _ = load_model(checkpoint, world.device)
    config = build(Config, json.loads((checkpoint / "trainer.json").read_text())["config"])
    config.parallel = ParallelConfig()  # every rank holds the whole model and reads its share
    comm = Communicator(make_mesh(config, world))
    data = make_data(config, comm)
    token_bytes = torch.as_tensor(data.token_bytes)
    where = (comm, config.train.micro_batch, world.device)
    return [
        evaluate(
            lambda batch: model.loss(batch.tokens, batch.targets, batch.documents),
            validation,
            token_bytes,
            *where,
            batches * config.train.global_batch,
        )
        for validation in data.validation
    ]
