"""Starting a run from the weights of a model folder: an import, an export, an upcycled model."""

from pathlib import Path
from typing import TYPE_CHECKING

from megalite.checkpoint.huggingface.write import normal_form
from megalite.checkpoint.model_folder import open_model
from megalite.checkpoint.stored_model import StoredModel
from megalite.errors import UserError

if TYPE_CHECKING:
    from megalite.train.trainer import Trainer

FREE = ("family", "vocab", "max_positions", "init_std")
"""Settings that may differ: a label, what tokenizer and data decide, what only matters before there are weights."""


def start_from(trainer: "Trainer", folder: Path) -> None:
    """Fill the trainer's main weights from a model folder; the optimizer begins. Every rank reads what it holds. States
    that the folder does not have (the load that a balancing loss remembers) keep their first values."""
    stored = open_model(folder)
    trainer.comm.on_rank_zero(lambda: check_same_model(trainer, folder, stored))
    known = stored.shapes()
    tensors = trainer.optimizer.state_tensors()
    for key, held in tensors.items():
        kind, _, name = key.partition(".")
        if kind == "model" and name in known:
            whole = stored.tensor(name)
            for (offsets, sizes), values in held.parts:
                values.copy_(whole[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))])
    trainer.optimizer.load_state_tensors(tensors)


def check_same_model(trainer: "Trainer", folder: Path, stored: StoredModel) -> None:
    """UserError, a line for each difference, when the run's model is another than the folder's."""
    ours, theirs = normal_form(trainer.config.model), normal_form(stored.config)
    problems = [
        f"model.{key}: {value}, but {folder} is a model with {theirs[key]}; set it so (megalite checkpoint inspect)"
        for key, value in ours.items()
        if key not in FREE and value != theirs[key]
    ]
    if trainer.vocab != stored.vocab:
        problems.append(
            f"model.vocab: {trainer.vocab}, but {folder} has {stored.vocab} rows; set model.vocab={stored.vocab}"
        )
    positions = trainer.stages[0].max_positions
    if trainer.config.model.position == "learned" and positions != stored.max_positions:
        problems.append(f"model.max_positions: {positions}, but {folder} has {stored.max_positions}; set it so")
    if problems:
        raise UserError(*problems)
