"""Arithmetic between tensors of two dtypes, a few rows at a time.

On a CPU PyTorch first converts such an operand, or last the result, as a whole: a copy in the wider dtype, of which a
gradient as large as the embedding's makes the peak of a step.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

ELEMENTS = 2**18
"""Converted at once: 1 MiB of float32, which stays in a core's cache."""


def accumulate(into: Tensor, values: Tensor) -> None:
    """into += values, [rows, ...] both."""
    for total, part in _rows(into, values):
        total.add_(part)


def scaled(values: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """values [rows, ...] times a scalar, rounded once."""
    result = torch.empty_like(values, dtype=dtype)
    for part, given in _rows(result, values):
        torch.mul(given, factor, out=part)
    return result


def _rows(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    first = tensors[0]
    if first.device.type != "cpu" or len({tensor.dtype for tensor in tensors}) == 1 or first.numel() <= ELEMENTS:
        return iter((tensors,))
    rows = max(1, ELEMENTS * len(first) // first.numel())
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)
