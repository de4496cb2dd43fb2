"""What a checkpoint holds beyond weights and moments, and how a run takes it up again: bit for bit where it stopped."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megalite.checkpoint.dcp import load_tensors, read_metadata
from megalite.checkpoint.store import complete_steps, verify
from megalite.config.load import as_values
from megalite.errors import UserError
from megalite.mesh import AXES

if TYPE_CHECKING:
    from megalite.train.trainer import Trainer


def training_state(trainer: "Trainer") -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors (weights, moments, every rank's random state) and counters of this instant."""
    tensors = trainer.optimizer.state_tensors()
    tensors[f"rng.{trainer.mesh.rank}"] = torch.get_rng_state()
    counters = {
        "step": trainer.step,
        "samples": trainer.step * trainer.config.train.global_batch,
        "seed": trainer.config.train.seed,
        "skipped_in_a_row": trainer.skipped_in_a_row,
        "layout": trainer.mesh.sizes,
        "vocab": trainer.model.vocab,
        "max_positions": trainer.model.max_positions,
        "config": as_values(trainer.config),
    }
    return tensors, counters


def resume(trainer: "Trainer") -> Path | None:
    """Load the checkpoint that checkpoint.resume names into `trainer`; its folder, or None for a fresh start."""
    chosen = trainer.comm.on_rank_zero(lambda: choose_checkpoint(trainer))
    if chosen is None:
        return None
    path, counters = Path(chosen["path"]), chosen["counters"]
    tensors = trainer.optimizer.state_tensors()
    random_state = f"rng.{trainer.mesh.rank}"
    if random_state in read_metadata(path).state_dict_metadata:
        tensors[random_state] = torch.get_rng_state()
    load_tensors(path, tensors, trainer.mesh.group(*AXES))
    if random_state in tensors:
        torch.set_rng_state(tensors.pop(random_state))
    trainer.optimizer.load_state_tensors(tensors)
    trainer.step, trainer.skipped_in_a_row = counters["step"], counters["skipped_in_a_row"]
    return path


def choose_checkpoint(trainer: "Trainer") -> dict[str, Any] | None:
    """The checkpoint to resume from, verified, with its counters; None for a fresh start. Run by rank 0."""
    wanted, config = trainer.config.checkpoint.resume, trainer.config
    if wanted == "none":
        return None
    if wanted == "auto":
        found = complete_steps(trainer.store.folder)
        if not found:
            return None
        path = found[-1]
    else:
        path = Path(wanted)
        if not path.is_dir():
            raise UserError(f"checkpoint.resume: no folder {path}; give auto, none or the path of a step_… folder")
    counters = verify(path)
    for name, saved, now in (
        ("train.seed", counters["seed"], config.train.seed),
        ("train.global_batch", counters["config"]["train"]["global_batch"], config.train.global_batch),
    ):
        if saved != now:
            raise UserError(
                f"{name}: {now}, but {path} was trained with {saved}; set {name}={saved} or another run.name"
            )
    if counters["step"] > config.train.steps:
        raise UserError(f"train.steps: {config.train.steps}, but {path} already has {counters['step']} steps")
    return {"path": str(path), "counters": {key: counters[key] for key in ("step", "skipped_in_a_row")}}
