"""A run of elements of a tensor as rectangular boxes, which is what a checkpoint can name and slice."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes, a number a dimension."""


def boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """Elements `start`..`stop` (row-major) of a tensor as boxes, in order: at most 2n-1 for n dimensions."""
    if start >= stop:
        return
    if not shape:
        yield (), ()
        return
    row = prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows
    if first > last:
        yield from _inside(shape, last, start - last * row, stop - last * row)
        return
    yield from _inside(shape, first - 1, start - (first - 1) * row, row if start < first * row else 0)
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    yield from _inside(shape, last, 0, stop - last * row)


def _inside(shape: Sequence[int], index: int, start: int, stop: int) -> Iterator[Box]:
    """Boxes of a part of one row."""
    for offsets, sizes in boxes(shape[1:], start, stop):
        yield (index, *offsets), (1, *sizes)


@dataclass(frozen=True)
class Held:
    """What this rank holds of a logical tensor of `shape`: `parts`, boxes of it and the live values in them.

    `stores`: these parts are this rank's to write into a checkpoint (perhaps together with its replicas). `borrowed`:
    further boxes that it holds, which another rank writes.
    """

    shape: tuple[int, ...]
    parts: tuple[tuple[Box, torch.Tensor], ...]
    stores: bool = True
    borrowed: tuple[tuple[Box, torch.Tensor], ...] = ()

    @property
    def read(self) -> tuple[tuple[Box, torch.Tensor], ...]:
        """All boxes that a checkpoint fills."""
        return self.parts + self.borrowed

    @classmethod
    def whole(cls, tensor: torch.Tensor) -> "Held":
        shape = tuple(tensor.shape)
        return cls(shape, ((((0,) * len(shape), shape), tensor),))

    @classmethod
    def run(cls, shape: tuple[int, ...], box: Box, values: torch.Tensor, start: int, stop: int, stores: bool) -> "Held":
        """Elements `start`..`stop` of the box `box` of a tensor of `shape`; `values` holds them, contiguous."""
        flat, parts, taken = values.view(-1), [], 0
        for offsets, sizes in boxes(box[1], start, stop):
            count = prod(sizes)
            placed = tuple(a + b for a, b in zip(box[0], offsets, strict=True))
            parts.append(((placed, sizes), flat[taken : taken + count].view(sizes)))
            taken += count
        return cls(shape, tuple(parts), stores)

    @property
    def dtype(self) -> torch.dtype:
        return self.read[0][1].dtype

    @property
    def bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for _, tensor in self.parts)
