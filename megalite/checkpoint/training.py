"""A training checkpoint, or the run folder around it, read as a model at rest."""

from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megalite.checkpoint.dcp import load_tensors, read_metadata
from megalite.checkpoint.store import MANIFEST, complete_steps, verify
from megalite.checkpoint.stored_model import StoredModel
from megalite.config.build import build
from megalite.config.schema import Config
from megalite.data.tokenizer import load_tokenizer
from megalite.errors import UserError
from megalite.parallel.boxes import Held


def is_training(path: Path) -> bool:
    """Whether `path` is a checkpoint of a run, or a run folder."""
    return (path / MANIFEST).is_file() or (path / "checkpoints").is_dir()


def find_checkpoint(path: Path, name: str = "") -> Path:
    """`path` itself when it is a checkpoint, else run `path`'s checkpoint `name` (empty: the newest complete one)."""
    if (path / MANIFEST).is_file():
        return path
    folder = path / "checkpoints"
    if name and not (folder / name / MANIFEST).is_file():
        names = ", ".join(step.name for step in complete_steps(folder)) or "none"
        raise UserError(f"checkpoint: {folder} holds no {name}; it has {names}")
    found = [folder / name] if name else complete_steps(folder)
    if not found:
        raise UserError(f"{path}: neither a checkpoint nor a run folder with one; give runs/NAME or .../step_…")
    return found[-1]


def open_training(path: Path) -> StoredModel:
    """The main weights of a checkpoint (of a run: its newest). Digests are verified before anything is read."""
    checkpoint = find_checkpoint(path)
    counters = verify(checkpoint)
    config = build(Config, counters["config"])
    entries = {
        name.removeprefix("model."): entry
        for name, entry in read_metadata(checkpoint).state_dict_metadata.items()
        if name.startswith("model.") and isinstance(entry, TensorStorageMetadata)
    }

    def tensor(name: str) -> Tensor:
        wanted = torch.empty(entries[name].size, dtype=entries[name].properties.dtype)
        load_tensors(checkpoint, {f"model.{name}": Held.whole(wanted)}, also_stored=("model.", "optim."))
        return wanted

    tokenizer = checkpoint.parent.parent / "tokenizer.json"
    end = load_tokenizer(str(tokenizer)).eod if tokenizer.is_file() else None
    return StoredModel(
        config=config.model,
        vocab=counters["vocab"],
        max_positions=counters["max_positions"],
        dtype=next(iter(entries.values())).properties.dtype,
        tensor=tensor,
        folder=checkpoint.parent.parent,
        special_tokens={} if end is None else {"bos_token_id": end, "eos_token_id": end},
    )


def describe(path: Path) -> str:
    """What `megalite checkpoint inspect` prints: counters, layout, tensors by kind, bytes."""
    checkpoint = find_checkpoint(path)
    counters = verify(checkpoint)
    entries = read_metadata(checkpoint).state_dict_metadata
    lines = [
        f"{checkpoint}",
        f"step {counters['step']}, {counters['samples']} samples, seed {counters['seed']}",
        "saved on " + ", ".join(f"{axis} {size}" for axis, size in counters["layout"].items()),
    ]
    for kind in ("model", "optim", "rng"):
        found = [e for n, e in entries.items() if n.startswith(f"{kind}.") and isinstance(e, TensorStorageMetadata)]
        elements = sum(entry.size.numel() for entry in found)
        size = sum(entry.size.numel() * entry.properties.dtype.itemsize for entry in found) if found else 0
        lines.append(f"{kind:<6} {len(found)} tensors, {elements:,} elements, {size / 1e6:,.1f} MB")
    return "\n".join(lines)
