"""A trained model taken out of its run folder: for evaluation, sampling and export, without a trainer."""

from pathlib import Path
from typing import Any

import torch

from megalite.checkpoint.dcp import load_tensors, read_metadata
from megalite.checkpoint.model_folder import load_model
from megalite.checkpoint.store import complete_steps, verify
from megalite.comm import Communicator
from megalite.config.build import build
from megalite.config.schema import Config
from megalite.errors import UserError
from megalite.model.transformer import Transformer
from megalite.parallel.parameter import materialize
from megalite.train.build import make_data, make_mesh
from megalite.train.evaluate import Evaluation, evaluate
from megalite.world import world_from_environment


def find_checkpoint(path: Path, name: str = "") -> Path:
    """`path` itself when it is a checkpoint, else the checkpoint `name` (empty: the newest complete one) of run `path`."""
    if (path / "manifest.json").is_file():
        return path
    folder = path / "checkpoints"
    if name:
        if not (folder / name / "manifest.json").is_file():
            names = ", ".join(step.name for step in complete_steps(folder)) or "none"
            raise UserError(f"checkpoint: {folder} holds no {name}; it has {names}")
        return folder / name
    found = complete_steps(folder)
    if not found:
        raise UserError(f"{path}: neither a checkpoint nor a run folder with one; give runs/NAME or .../step_…")
    return found[-1]


def load_checkpoint_model(checkpoint: Path) -> tuple[Transformer, dict[str, Any]]:
    """The model with its main weights, on the CPU, and trainer.json. Verified before it is read."""
    counters = verify(checkpoint)
    config = build(Config, counters["config"])
    with torch.device("meta"):
        model = Transformer(config.model, counters["vocab"], counters["max_positions"])
    dtype = next(
        entry.properties.dtype  # type: ignore[union-attr]
        for name, entry in read_metadata(checkpoint).state_dict_metadata.items()
        if name.startswith("model.")
    )
    materialize(model, torch.device("cpu"), seed=0, dtype=dtype)
    weights = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    load_tensors(checkpoint, weights, None, also_stored=("optim.",))
    return model, counters


def load_trained(path: Path) -> tuple[Transformer, Path | None]:
    """The model in a run folder, a checkpoint or a model folder, on the CPU, and the tokenizer.json saved with it."""
    if not (path / "manifest.json").is_file() and not (path / "checkpoints").is_dir():
        model, stored = load_model(path)
        return model, stored.tokenizer
    checkpoint = find_checkpoint(path)
    model, _ = load_checkpoint_model(checkpoint)
    tokenizer = checkpoint.parent.parent / "tokenizer.json"
    return model, tokenizer if tokenizer.is_file() else None


def evaluate_run(run_dir: Path, name: str = "", batches: int = 0) -> list[Evaluation]:
    """Every validation set of a run, with one of its checkpoints, on however many processes run now."""
    model, counters = load_checkpoint_model(find_checkpoint(run_dir, name))
    config = build(Config, counters["config"])
    config.parallel.dp = -1
    world = world_from_environment()
    comm = Communicator(make_mesh(config, world))
    data = make_data(config, comm)
    token_bytes = torch.as_tensor(data.token_bytes)
    return [
        evaluate(model.to(world.device), v, token_bytes, comm, config.train.micro_batch, world.device, batches)
        for v in data.validation
    ]
