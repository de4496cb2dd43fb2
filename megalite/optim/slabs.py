"""What a rank updates of a logical tensor, as slabs of its rows, and the blocks of each row that share a scale.

Blocks begin with every row of the logical tensor, whatever part of it a rank holds: so all layouts have the same ones.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from megalite_kernels.reference import MOMENT_BLOCK
from torch import Tensor

from megalite.parallel.boxes import Box, Held, boxes
from megalite.parallel.data import Piece

CHUNK = 2**20
"""Elements updated at once, which bounds what is held in float32; of cut blocks all rows are (`Moments._agreed`)."""


def grid(shape: Sequence[int]) -> tuple[int, ...]:
    """Blocks of a logical tensor: as it, but for the last dim."""
    return (*shape[:-1], -(-shape[-1] // MOMENT_BLOCK))


@dataclass(frozen=True, eq=False)
class Slab:
    """`rows` of a logical tensor of `shape`, which are the box `box` of it: elements `start`.. of a piece, row by row;
    their scales are `scales`.. of the piece's."""

    shape: tuple[int, ...]
    box: Box
    start: int
    scales: int

    @property
    def rows(self) -> int:
        return prod(self.box[1][:-1])

    @property
    def columns(self) -> int:
        return self.box[1][-1]

    @property
    def skip(self) -> int:
        """Elements of its first block that lie before it."""
        return self.box[0][-1] % MOMENT_BLOCK

    @property
    def blocks(self) -> int:
        """Of a row, in whole or in part."""
        return -(-(self.skip + self.columns) // MOMENT_BLOCK)

    def of(self, values: Tensor) -> Tensor:
        """This slab's [rows, columns] of a piece's flat `values`, live."""
        return values[self.start : self.start + self.rows * self.columns].view(self.rows, self.columns)

    def of_scales(self, scales: Tensor) -> Tensor:
        """This slab's [rows, blocks] of a piece's scales, live."""
        return scales[self.scales : self.scales + self.rows * self.blocks].view(self.rows, self.blocks)

    def row_numbers(self, rows: slice = slice(None), device: torch.device | None = None) -> Tensor:
        """Of the logical tensor seen as a matrix, int64 [rows]."""
        start, stop, _ = rows.indices(self.rows)
        left = torch.arange(start, stop, device=device)
        numbers, stride = torch.zeros_like(left), 1
        for offset, size, whole in reversed(list(zip(*(dims[:-1] for dims in (*self.box, self.shape)), strict=True))):
            numbers += (left % size + offset) * stride
            left, stride = left // size, stride * whole
        return numbers

    def index(self, rows: slice, device: torch.device) -> Tensor:
        """Where the elements of some rows are in the flattened logical tensor, int64 [rows, columns]."""
        first, width = self.box[0][-1], self.shape[-1]
        columns = torch.arange(first, first + self.columns, device=device)
        return self.row_numbers(rows, device)[:, None] * width + columns

    def chunks(self) -> Iterator[slice]:
        """Its rows, a few at a time."""
        each = max(1, CHUNK // self.columns)
        return (slice(row, row + each) for row in range(0, self.rows, each))

    def cut(self) -> list[tuple[int, slice]]:
        """(block, columns) of blocks that other ranks hold the rest of."""
        found = {0: self.skip > 0}
        end = self.box[0][-1] + self.columns
        found[self.blocks - 1] = found.get(self.blocks - 1, False) or (end % MOMENT_BLOCK > 0 and end < self.shape[-1])
        columns = {n: (max(0, n * MOMENT_BLOCK - self.skip), (n + 1) * MOMENT_BLOCK - self.skip) for n in found}
        return [(n, slice(*columns[n])) for n, yes in found.items() if yes]


def slabs(piece: Piece) -> list[Slab]:
    """The slabs of a piece, in the order of its elements."""
    placed, shape = piece.slot.placed, piece.slot.declared.shape
    found: list[Slab] = []
    elements = scales = 0
    for offsets, sizes in boxes(placed.shape, piece.start, piece.stop):
        box = tuple(a + b for a, b in zip(placed.offsets, offsets, strict=True)), sizes
        found.append(Slab(shape, box, elements, scales))
        elements += prod(sizes)
        scales += found[-1].rows * found[-1].blocks
    return found


def held_scales(piece: Piece, scales: Tensor) -> Held:
    """A piece's scales among those of the logical tensor; a block's is stored by who holds its first element."""
    stored: list[tuple[Box, Tensor]] = []
    borrowed: list[tuple[Box, Tensor]] = []
    for slab in slabs(piece):
        offsets, sizes = slab.box
        first = offsets[-1] // MOMENT_BLOCK
        values = slab.of_scales(scales).view(*sizes[:-1], slab.blocks)
        own = int(slab.skip > 0)
        for start, stop, into in ((0, own, borrowed), (own, slab.blocks, stored)):
            if start < stop:
                box = (*offsets[:-1], first + start), (*sizes[:-1], stop - start)
                into.append((box, values[..., start:stop]))
    counted = piece.slot.placed.counted
    return Held(grid(piece.slot.declared.shape), tuple(stored), counted, tuple(borrowed))
