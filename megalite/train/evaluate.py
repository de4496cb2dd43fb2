"""Validation: every target of a set exactly once, shared out over the data-parallel ranks."""

import math
from typing import Any, NamedTuple

import torch
from torch import nn

from megalite.comm import Communicator
from megalite.parallel.data import REPLICATED_OVER


class Evaluation(NamedTuple):
    """`loss`: nats a token. `bits_per_byte`: the same per UTF-8 byte of text (None: the tokenizer has no bytes)."""

    name: str
    loss: float
    bits_per_byte: float | None
    tokens: int


@torch.no_grad()
def evaluate(
    model: nn.Module,
    validation: Any,
    token_bytes: torch.Tensor,
    comm: Communicator,
    micro_batch: int,
    device: torch.device,
    max_samples: int = 0,
) -> Evaluation:
    """Loss of `model` on a validation set, or on its first `max_samples` sequences, whatever the layout."""
    ranks, rank = comm.mesh.size(*REPLICATED_OVER), comm.mesh.index(*REPLICATED_OVER)
    stride = micro_batch * ranks
    end = min(validation.n_samples, max_samples or validation.n_samples)
    totals = torch.zeros(3, dtype=torch.float64)
    for start in range(rank * micro_batch, end, stride):
        batch = validation.batch(range(start, min(start + micro_batch, end))).to(device)
        losses = model.loss(batch.tokens, batch.targets, batch.documents)  # type: ignore[operator]
        targets = batch.targets[batch.targets >= 0].cpu()
        counts = [losses.nll_sum.item(), targets.numel(), token_bytes[targets].sum().item()]
        totals += torch.tensor(counts, dtype=torch.float64)
    comm.all_reduce(totals, *REPLICATED_OVER)
    nll, tokens, text_bytes = totals.tolist()
    bits_per_byte = nll / math.log(2) / text_bytes if text_bytes else None
    return Evaluation(validation.name, nll / max(tokens, 1), bits_per_byte, int(tokens))
