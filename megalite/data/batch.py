"""What a training or validation set hands to the trainer, and the checks every batch passes on the way."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from megalite.errors import UserError

NOT_COUNTED = -100


@dataclass(frozen=True)
class Batch:
    """tokens, targets: int64 [batch, seq], target -100 is not counted. documents: int32 [batch, seq] number of the
    document inside its row, where attention stays inside documents and positions restart at each; else None."""

    tokens: Tensor
    targets: Tensor
    documents: Tensor | None

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on `device`."""
        documents = None if self.documents is None else self.documents.to(device)
        return Batch(self.tokens.to(device), self.targets.to(device), documents)


class TrainingSet(Protocol):
    """Sample n is the same whoever asks, in whatever order, before or after a restart."""

    n_samples: int

    def batch(self, samples: Sequence[int]) -> Batch: ...


def make_batch(tokens: np.ndarray, targets: np.ndarray, documents: np.ndarray | None) -> Batch:
    """Copy numpy arrays [batch, seq] into contiguous tensors."""
    return Batch(
        torch.from_numpy(np.ascontiguousarray(tokens)),
        torch.from_numpy(np.ascontiguousarray(targets)),
        None if documents is None else torch.from_numpy(np.ascontiguousarray(documents)),
    )


def check_ids(tokens: np.ndarray, vocab: int, prefix: str) -> None:
    """Refuse ids the tokenizer does not have: they mean a foreign tokenizer or a damaged file."""
    if tokens.size and (tokens.max() >= vocab or tokens.min() < 0):
        wrong = tokens.max() if tokens.max() >= vocab else tokens.min()
        raise UserError(
            f"{prefix}.bin: token id {wrong} is outside the tokenizer's vocabulary of {vocab};"
            " set data.tokenizer to the one it was built with"
        )
