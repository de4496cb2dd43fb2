"""What the attention kernels share: who sees whom, tiles in memory, scores, and the sizes of tiles.

A query sees an interval of keys [low, high), and both ends never fall along a row: causal, windowed, packed documents
and parts of a ring are all this one mask. So a key is seen by an interval of queries too. Tiles outside are skipped,
tiles that every row sees whole are not masked, and only those at the edges compare. Without documents the interval is
a diagonal band: low = s + shift_low and high = s + shift_high, cut to the keys, and no array is read.

Letters: B batch, S queries, T keys, H query heads, K key heads, D size of queries and keys, E of values.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from megalite_kernels.gpu.chips import Chip

LOG2E = tl.constexpr(1.4426950408889634)
FAR = 1 << 30
"""A shift that no row is long enough to feel."""


@dataclass(frozen=True)
class Mask:
    """Row s sees [s + shift_low, s + shift_high), or what the int32 arrays low, high [B, S] say, cut to the columns."""

    shift_low: int
    shift_high: int
    low: Tensor | None = None
    high: Tensor | None = None

    @property
    def starts_late(self) -> bool:
        """Whether a row may fail to see the first columns."""
        return self.low is not None or self.shift_low > -FAR

    def transposed(self, columns: int) -> "Mask":
        """Which rows see a column: [B, columns] from [B, rows], or the mirrored band."""
        if self.low is None or self.high is None:
            return Mask(1 - self.shift_high, 1 - self.shift_low)
        column = torch.arange(columns, dtype=torch.int32, device=self.low.device).expand(self.low.shape[0], columns)
        first, last = (torch.searchsorted(end, column.contiguous(), right=True) for end in (self.high, self.low))
        return Mask(0, 0, first.to(torch.int32), last.to(torch.int32))


def band(queries: int, keys: int, causal: bool, window: int | None) -> Mask:
    """The mask without documents, aligned at the bottom right; see `reference.visible`."""
    offset = keys - queries
    return Mask(-FAR if window is None else offset - window + 1, offset + 1 if causal else FAR)


def padded(width: int) -> int:
    """Columns of a tile that holds `width`: products need a power of two, at least 16."""
    return max(16, triton.next_power_of_2(width))


def operand(x_BNHD: Tensor, rows: int, descriptors: bool) -> Any:
    """A contiguous tensor that a kernel walks along: a pointer, or a descriptor of its tiles of `rows`.

    The tile that stays is loaded by pointers in either case: what descriptors load once, the compiler of sm_90 then
    keeps in registers.
    """
    if not descriptors:
        return x_BNHD
    block = [1, rows, 1, padded(x_BNHD.shape[3])]
    return TensorDescriptor(x_BNHD, list(x_BNHD.shape), list(x_BNHD.stride()), block)


def describable(chip: Chip, *tensors: Tensor) -> bool:
    """Whether blocks of these tensors are to move through descriptors: of half precision (float32 is multiplied from
    registers, not from shared memory), aligned to 16 bytes row by row, and not empty."""
    return chip.descriptors and all(
        x.element_size() == 2 and x.numel() > 0 and x.data_ptr() % 16 == 0 and x.shape[-1] * x.element_size() % 16 == 0
        for x in tensors
    )


@triton.jit
def interval(
    rows, batch, length, columns, low_ptr, high_ptr, shift_low, shift_high, SPANS: tl.constexpr,
):  # fmt: skip
    """(low, high) of rows that may lie beyond `length`; those see nothing."""
    inside = rows < length
    if SPANS:
        place = batch.to(tl.int64) * length + rows
        low = tl.load(low_ptr + place, mask=inside, other=0)
        high = tl.load(high_ptr + place, mask=inside, other=0)
    else:
        low = tl.minimum(tl.maximum(rows + shift_low, 0), columns)
        high = tl.where(inside, tl.minimum(tl.maximum(rows + shift_high, 0), columns), 0)
    return low, high


@triton.jit
def borders(rows, length, columns, low, high, BLOCK: tl.constexpr, STARTS_LATE: tl.constexpr):
    """(start, full, rest, stop): columns [start, full) and [rest, stop) need the mask, [full, rest) do not, and nobody
    sees any other. start, full and rest are multiples of BLOCK."""
    inside = rows < length
    stop = tl.max(tl.where(low < high, high, 0), axis=0)
    if STARTS_LATE:
        start = tl.min(tl.where(low < high, low, columns), axis=0) // BLOCK * BLOCK
        latest = tl.max(tl.where(inside, low, 0), axis=0)
        full = tl.maximum(start, (tl.minimum(latest, stop) + BLOCK - 1) // BLOCK * BLOCK)
    else:
        start = 0
        full = 0
    rest = tl.maximum(full, tl.min(tl.where(inside, high, columns), axis=0) // BLOCK * BLOCK)
    return start, full, rest, tl.maximum(stop, rest)


@triton.jit
def walk(start, full, rest, stop, MASKED: tl.constexpr):
    """(begin, end) of a loop over the tiles that need the mask, which `unfold` places, or over those that do not."""
    if MASKED:
        begin = start
        end = full + stop - rest
    else:
        begin = full
        end = rest
    return begin, end


@triton.jit
def unfold(at, full, rest, MASKED: tl.constexpr):
    """The first column of the tile at place `at` of such a loop: the tiles before `full`, then those from `rest`."""
    if MASKED:
        first = tl.where(at < full, at, at - full + rest)
    else:
        first = at
    return first


@triton.jit
def tile(
    x, batch, first, head, length, heads,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Rows first, first + 1, … of x[batch, :, head] as [ROWS, BLOCK], 0 outside. WHOLE: all of the rows exist."""
    if DESCRIPTORS:
        values = x.load([batch, first, head, 0]).reshape(ROWS, BLOCK)
    else:
        row = tl.arange(0, ROWS)
        column = tl.arange(0, BLOCK)
        # int64 once a tile, int32 within it
        start = x + ((batch.to(tl.int64) * length + first) * heads + head) * WIDTH
        place = row[:, None] * (heads * WIDTH) + column[None, :]
        if WHOLE:
            if WIDTH == BLOCK:
                values = tl.load(start + place)
            else:
                values = tl.load(start + place, mask=column[None, :] < WIDTH, other=0.0)
        elif WIDTH == BLOCK:
            values = tl.load(start + place, mask=(row + first)[:, None] < length, other=0.0)
        else:
            inside = ((row + first)[:, None] < length) & (column[None, :] < WIDTH)
            values = tl.load(start + place, mask=inside, other=0.0)
    return values


@triton.jit
def store_tile(
    x_ptr, values, batch, first, head, length, heads, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    start = x_ptr + ((batch.to(tl.int64) * length + first) * heads + head) * WIDTH
    inside = ((row + first)[:, None] < length) & (column[None, :] < WIDTH)
    tl.store(start + row[:, None] * (heads * WIDTH) + column[None, :], values.to(x_ptr.dtype.element_ty), mask=inside)


@triton.jit
def tanh(x):
    """Near 0 its series, where 1 - 2 / (e²ˣ + 1) would lose digits."""
    y = x * x
    series = x * (1.0 + y * (-1.0 / 3 + y * (2.0 / 15 + y * (-17.0 / 315 + y * (62.0 / 2835)))))
    return tl.where(tl.abs(x) < 0.25, series, 1.0 - 2.0 / (tl.exp2(2.8853900817779268 * x) + 1.0))


@triton.jit
def logits(products, factor, cap, SOFTCAP: tl.constexpr):
    """Scores in units of ln 2, so that exp2 serves: products · factor, or cap · tanh(products · factor)."""
    scores = products * factor
    if SOFTCAP:
        scores = cap * tanh(scores)
    return scores


def factors(scale: float, softcap: float) -> tuple[float, float]:
    """(factor, cap) for `logits`; softcap 0: none."""
    return (scale / softcap, softcap * LOG2E.value) if softcap > 0 else (scale * LOG2E.value, 0.0)
