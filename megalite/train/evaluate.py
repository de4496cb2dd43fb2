"""Validation: every target of a set exactly once, shared out over the data-parallel ranks."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from megalite.comm import Communicator
from megalite.data.batch import NOT_COUNTED, Batch
from megalite.mesh import AXES
from megalite.model.transformer import Losses
from megalite.progress import Progress
from megalite.train.interrupt import Stopped


class Evaluation(NamedTuple):
    """`loss`: nats a token. `bits_per_byte`: the same per UTF-8 byte of text (None: the tokenizer has no bytes)."""

    name: str
    loss: float
    bits_per_byte: float | None
    tokens: int


@torch.no_grad()
def evaluate(
    losses_of: Callable[[Batch], Losses],
    validation: Any,
    token_bytes: torch.Tensor,
    comm: Communicator,
    micro_batch: int,
    device: torch.device,
    max_samples: int = 0,
    asked_to_stop: Callable[[], bool] | None = None,
    show: bool = False,
) -> Evaluation:
    """Loss on a validation set, or on its first `max_samples` sequences, whatever the layout.

    Raises Stopped as soon as `asked_to_stop` says so on any rank; they agree before every batch. `show`: rank 0 says
    how far it is.

    `losses_of` gives this rank's term of a batch's sums: a pipeline's last stage has them, cp ranks have parts.
    """
    mesh = comm.mesh
    stride = micro_batch * mesh.size("dp")
    end = min(validation.n_samples, max_samples or validation.n_samples)
    speaks, counts = mesh.index("tp") == 0, mesh.index("pp", "cp", "tp") == 0
    totals = torch.zeros(3, dtype=torch.float64)
    with Progress(f"evaluating {validation.name}", end, "samples", show=show and mesh.rank == 0) as bar:
        for first in range(0, end, stride):
            if asked_to_stop is not None and _any(asked_to_stop(), comm):
                raise Stopped
            start = first + mesh.index("dp") * micro_batch
            # Whole batches, the last filled up with what is not counted: sequence parallelism divides a batch's tokens.
            # A rank without samples left computes too: with sharded weights every forward pass is a collective.
            batch = validation.batch([min(sample, end - 1) for sample in range(start, start + micro_batch)])
            batch.targets[max(0, end - start) :] = NOT_COUNTED
            nll = losses_of(batch.to(device)).nll_sum.item()
            targets = batch.targets[batch.targets >= 0]
            seen = [nll * speaks, targets.numel() * counts, token_bytes[targets].sum().item() * counts]
            totals += torch.tensor(seen, dtype=torch.float64)
            bar.advance(min(stride, end - first))
    comm.all_reduce(totals, *AXES)
    nll, tokens, text_bytes = totals.tolist()
    bits_per_byte = nll / math.log(2) / text_bytes if text_bytes else None
    return Evaluation(validation.name, nll / max(tokens, 1), bits_per_byte, int(tokens))


def _any(mine: bool, comm: Communicator) -> bool:
    flag = torch.tensor([float(mine)])
    comm.all_reduce(flag, *AXES)
    return bool(flag.item())
