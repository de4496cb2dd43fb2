"""Model folders: `model.yaml` and safetensors under our own names; and the one way to load a model from any folder."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from megalite.checkpoint.huggingface.folder import copy_companions, open_huggingface
from megalite.checkpoint.stored_model import StoredModel, empty_model, refuse_impossible
from megalite.checkpoint.tensor_folder import SHARD_BYTES, TensorFolder, new_folder, safe_file, write_tensors
from megalite.config.build import build
from megalite.config.schema import Config, ModelConfig, key
from megalite.config.tree import leaves, value_at
from megalite.errors import UserError
from megalite.model.size import parameter_counts
from megalite.model.transformer import Transformer
from megalite.parallel.parameter import attach, declaration, dtype_of, placement

DESCRIPTION = "model.yaml"


@dataclasses.dataclass
class Description:
    """The content of model.yaml."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    vocab: int = key(1, "Rows of the embedding.", minimum=1)
    max_positions: int = key(1, "Longest sequence.", minimum=1)


def is_model(folder: Path) -> bool:
    """Whether `folder` is one of ours or of Hugging Face's."""
    return (folder / DESCRIPTION).exists() or (folder / "config.json").exists()


def open_model(path: str | Path) -> StoredModel:
    """The model in a folder of ours or of Hugging Face's, in a checkpoint or run; tensors are read later."""
    folder = Path(path)
    if (folder / DESCRIPTION).exists():
        return _open_native(folder)
    if (folder / "config.json").exists():
        return open_huggingface(folder)
    from megalite.checkpoint.training import is_training, open_training  # torch's checkpoints: a second of imports

    if is_training(folder):
        return open_training(folder)
    raise UserError(
        f"{folder}: no model, Hugging Face folder, run or checkpoint (no {DESCRIPTION}, config.json or checkpoints/);"
        " give the folder of one"
    )


def describe_model(path: Path) -> str:
    """What `megalite checkpoint inspect` prints of a model folder, with the words that train it."""
    stored = open_model(path)
    config = dataclasses.replace(stored.config, vocab=stored.vocab, max_positions=stored.max_positions)
    counts = parameter_counts(config, stored.vocab, stored.max_positions)
    values, plain = Config(model=config), Config()
    words = [
        word
        for name in leaves(Config)
        if name.startswith("model.") and value_at(values, name) != value_at(plain, name)
        for word in _words(name, value_at(values, name))
    ]
    active = counts.total - counts.experts + counts.active_experts
    met = f", {active:,} of them a token" if counts.experts else ""
    lines = [f"{path}", f"{config.family}, {counts.total:,} parameters{met}, {stored.dtype}", *stored.notes]
    return "\n".join([*lines, " ".join([f"checkpoint.resume={path}", *words])])


def _words(name: str, value: Any) -> Iterator[str]:
    """What sets a key to `value` on the command line; a mapping takes a word an entry."""
    if isinstance(value, dict):
        for entry, held in value.items():
            yield from _words(f"{name}.{entry}", held)
    else:
        yield f"{name}={'null' if value is None else value}"


def load_model(
    path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> tuple[Transformer, StoredModel]:
    """The model with its weights on `device`, in `dtype` (default: as stored), and what is known of it."""
    stored = open_model(path)
    model = empty_model(stored.config, stored.vocab, stored.max_positions)
    for owner_name, owner in model.named_modules():
        for name, parameter in list(owner._parameters.items()):
            if parameter is not None:
                declared = declaration(parameter)
                wanted = dtype_of(declared, dtype or stored.dtype)
                tensor = stored.tensor(f"{owner_name}.{name}").to(device, wanted).contiguous()
                owner._parameters[name] = attach(tensor, declared, placement(parameter))
    return model, stored


def save_model(stored: StoredModel, output: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write a model folder of ours. It appears whole or not at all."""
    sizes = {name: torch.Size(shape).numel() * stored.dtype.itemsize for name, shape in stored.shapes().items()}
    description = dataclasses.asdict(Description(stored.config, stored.vocab, stored.max_positions))
    description["special_tokens"] = dict(stored.special_tokens)
    with new_folder(output) as folder:
        (folder / DESCRIPTION).write_text(yaml.safe_dump(description, sort_keys=False), encoding="utf-8")
        write_tensors(folder, sizes, stored.tensor, shard_bytes)
        copy_companions(stored.folder, folder)


def _open_native(folder: Path) -> StoredModel:
    path = safe_file(folder, DESCRIPTION)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError):
        values = None
    if not isinstance(values, dict):
        raise UserError(f"{path}: not YAML of a model; import the model again")
    special_tokens = values.pop("special_tokens", None) or {}
    described = build(Description, values)
    tensors = TensorFolder(folder)
    refuse_impossible(described.model, described.vocab, described.max_positions, tensors, path)
    stored = StoredModel(
        config=described.model,
        vocab=described.vocab,
        max_positions=described.max_positions,
        dtype=tensors["embedding.weight"].dtype if "embedding.weight" in tensors else torch.float32,
        tensor=tensors.__getitem__,
        folder=folder,
        special_tokens=special_tokens,
    )
    expected = stored.shapes()
    wrong = sorted(name for name in expected.keys() | tensors.keys() if tensors.shapes.get(name) != expected.get(name))
    if wrong:
        raise UserError(f"{folder}: tensors do not fit {DESCRIPTION}: {', '.join(wrong[:3])}; import the model again")
    return stored
