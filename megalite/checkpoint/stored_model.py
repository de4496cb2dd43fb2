"""A model at rest, wherever it lies: what it is, and its logical tensors by our names, read when asked for."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from megalite.checkpoint.tensor_folder import TensorFolder
from megalite.config.schema import Config, ModelConfig
from megalite.config.validate import violations
from megalite.errors import UserError
from megalite.model.size import parameter_counts
from megalite.model.transformer import Transformer
from megalite.parallel.parameter import declared_parameters

LARGEST = 10**15
"""Parameters; a description with more is damaged, and its sizes would overflow."""
MOST_A_NUMBER = 2
"""Weights that one stored number can hold (a byte, two of four bits)."""


@dataclass(frozen=True)
class StoredModel:
    """`tensor(name)` reads one logical tensor [declared shape] to the CPU; `dtype` is the one most of them are in.

    `special_tokens`: bos_token_id and the like, as Hugging Face's config.json has them. `folder`: where tokenizer
    files may lie. `notes`: what people should know of how it was read.
    """

    config: ModelConfig
    vocab: int
    max_positions: int
    dtype: torch.dtype
    tensor: Callable[[str], Tensor]
    folder: Path
    special_tokens: Mapping[str, int | list[int]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def tokenizer(self) -> Path | None:
        """The tokenizer.json beside the model, when there is one."""
        path = self.folder / "tokenizer.json"
        return path if path.is_file() else None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return parameter_shapes(self.config, self.vocab, self.max_positions)


def refuse_impossible(config: ModelConfig, vocab: int, max_positions: int, tensors: TensorFolder, where: Path) -> None:
    """UserError when a file describes a model that cannot be, before anything is built from it.

    The rules are those of the command line's `model.*`, and that the folder with `tensors` can hold as much.
    """
    described = dataclasses.replace(config, vocab=vocab, max_positions=max_positions)
    problems = [line for line in violations(Config(model=described), trains=False) if line.startswith("model.")]
    if not problems and config.layers > len(tensors):
        problems = [f"model.layers={config.layers}: the folder has {len(tensors)} tensors"]
    if not problems and config.rope.theta <= 1:
        problems = [f"model.rope.theta={config.rope.theta}: must be above 1"]
    if not problems and parameter_counts(config, vocab, max_positions).total > LARGEST:
        problems = ["more parameters than any model has"]
    held = MOST_A_NUMBER * sum(math.prod(shape) for shape in tensors.shapes.values())
    if not problems and config.moe.experts and parameter_counts(config, vocab, max_positions).experts > held:
        problems = [f"model.moe.experts={config.moe.experts}: more than the folder's tensors can hold"]
    if problems:
        raise UserError(f"{where}: describes no possible model: {'; '.join(problems)}. Fetch the folder again")


def empty_model(config: ModelConfig, vocab: int, max_positions: int) -> Transformer:
    """The model on the meta device: shapes and declarations, no storage."""
    with torch.device("meta"):
        return Transformer(config, vocab, max_positions)


def parameter_shapes(config: ModelConfig, vocab: int, max_positions: int) -> dict[str, tuple[int, ...]]:
    """Logical name -> shape of every parameter, in definition order."""
    model = empty_model(config, vocab, max_positions)
    return {name: declared.shape for name, _, declared in declared_parameters(model)}
