"""Hugging Face folders (config.json and safetensors) read as StoredModel and written from one. No transformers here."""

import json
import math
import shutil
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from megalite.checkpoint.huggingface.families import SPECIAL_TOKENS
from megalite.checkpoint.huggingface.names import COPIES, IGNORED, PREFIXES, TABLES, copies_for, rules_for
from megalite.checkpoint.huggingface.quantized import Dequantized
from megalite.checkpoint.huggingface.read import read_config
from megalite.checkpoint.huggingface.rule import Rule, Shape
from megalite.checkpoint.huggingface.write import write_config
from megalite.checkpoint.stored_model import StoredModel, parameter_shapes, refuse_impossible
from megalite.checkpoint.tensor_folder import SHARD_BYTES, TensorFolder, new_folder, read_json, safe_file, write_tensors
from megalite.errors import UserError

COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "added_tokens.json",
    "chat_template.jinja",
)
"""Files that travel with a model unchanged."""
OF_TRAINING = (".router.last_load",)
"""Endings of states that only a training uses."""
Shapes = Mapping[str, Shape]


def open_huggingface(folder: Path) -> StoredModel:
    """The model in a Hugging Face folder. UserError, in one line, when a tensor is missing, left over or mis-shaped."""
    document = read_json(safe_file(folder, "config.json"))
    config = read_config(document, str(folder / "config.json"))
    assert config.vocab is not None and config.max_positions is not None
    raw = TensorFolder(folder)
    refuse_impossible(config, config.vocab, config.max_positions, raw, folder / "config.json")
    stored = Dequantized(raw, document.get("quantization_config"))
    notes = stored.notes
    if config.mtp and not any(name.startswith(f"model.layers.{config.layers}.") for name in stored):
        notes += (f"its config.json speaks of {config.mtp} multi-token modules, which are not in the folder",)
        config.mtp = 0
    shapes = parameter_shapes(config, config.vocab, config.max_positions)
    prefix = PREFIXES[config.family]
    forms = (rules_for(config, shapes, form) for form in range(len(TABLES[config.family])))
    rules = min(forms, key=lambda rules: sum(stored_name(rule.theirs, stored, prefix) not in stored for rule in rules))
    _check(folder, rules, shapes, stored, prefix)
    places: dict[str, list[tuple[Rule, int]]] = {}
    for rule in rules:
        for position, name in enumerate(rule.ours):
            places.setdefault(name, []).append((rule, position))

    def tensor(name: str) -> Tensor:
        parts = [
            rule.split(stored[stored_name(rule.theirs, stored, prefix)], [shapes[ours] for ours in rule.ours])[position]
            for rule, position in places[name]
        ]
        return parts[0] if places[name][0][0].expert is None else torch.stack(parts)

    return StoredModel(
        config=config,
        vocab=config.vocab,
        max_positions=config.max_positions,
        dtype=tensor("embedding.weight").dtype,
        tensor=tensor,
        folder=folder,
        special_tokens={key: document[key] for key in SPECIAL_TOKENS if document.get(key) is not None},
        notes=notes,
    )


def export_huggingface(model: StoredModel, output: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write `model` as a folder that transformers loads; tensors keep their dtype. The folder appears whole or not."""
    document = write_config(model.config, model.vocab, model.max_positions)
    shapes = model.shapes()
    rules = {rule.theirs: rule for rule in [*rules_for(model.config, shapes), *copies_for(model.config)]}
    document |= dict.fromkeys(SPECIAL_TOKENS) | dict(model.special_tokens)
    document |= {"torch_dtype": str(model.dtype).removeprefix("torch."), "use_cache": True}
    unwritten = set(shapes) - {name for rule in rules.values() for name in rule.ours}
    assert all(name.endswith(OF_TRAINING) for name in unwritten), f"no Hugging Face name for {unwritten}"
    sizes = {
        theirs: math.prod(rule.shape([shapes[name] for name in rule.ours])) * model.dtype.itemsize
        for theirs, rule in rules.items()
    }
    read = lru_cache(maxsize=2)(model.tensor)  # the rules of an expert come one after another

    def tensor(theirs: str) -> Tensor:
        whole = rules[theirs].join([read(name) for name in rules[theirs].ours])
        return whole.clone() if theirs.endswith(tuple(COPIES)) else whole  # safetensors refuses shared memory

    with new_folder(output) as folder:
        (folder / "config.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        write_tensors(folder, sizes, tensor, shard_bytes)
        copy_companions(model.folder, folder)


def copy_companions(source: Path, target: Path) -> None:
    for name in COMPANIONS:
        if (source / name).exists():
            shutil.copyfile(safe_file(source, name), target / name)


def stored_name(theirs: str, stored: Iterable[str], prefix: str) -> str:
    """The name in the folder: folders saved from a headless model lack the prefix."""
    short = theirs.removeprefix(prefix)
    return short if theirs not in stored and short in stored else theirs


def _check(folder: Path, rules: list[Rule], shapes: Shapes, stored: Dequantized, prefix: str) -> None:
    """Every tensor that the rules ask for is there in its shape, and nothing else."""
    missing, misshaped = [], []
    expected = set()
    for rule in rules:
        name = stored_name(rule.theirs, stored, prefix)
        expected.add(name)
        wanted = rule.shape([shapes[ours] for ours in rule.ours])
        if name not in stored:
            missing.append(name)
        elif stored.shapes[name] != wanted:
            misshaped.append(f"{name} {list(stored.shapes[name])} instead of {list(wanted)}")
    unexpected = [name for name in stored if name not in expected and not name.endswith(IGNORED)]
    unexpected = [name for name in unexpected if not _is_copy(stored, name, rules, prefix)]
    problems = [
        f"{what} {_some(names)}"
        for what, names in (("missing", missing), ("mis-shaped", misshaped), ("unexpected", unexpected))
        if names
    ]
    if problems:
        raise UserError(f"{folder}: tensors do not fit its config.json: {'; '.join(problems)}; fetch the folder again")


def _is_copy(stored: Dequantized, name: str, rules: list[Rule], prefix: str) -> bool:
    """Whether `name` is a tied head or what a multi-token module shares, stored a second time."""
    first = {"lm_head.weight": "embedding.weight"} | COPIES
    ours = next((first[theirs] for theirs in first if name.endswith(theirs)), None)
    held = {rule.ours[0]: rule.theirs for rule in rules if len(rule.ours) == 1}
    if ours is None:
        return False
    original = stored_name(held.get(ours, held["embedding.weight"]), stored, prefix)
    return original in stored and torch.equal(stored[name], stored[original])


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
