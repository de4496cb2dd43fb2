"""Tokens sorted by expert and back: a counting sort, copies of rows, and weighted sums of them.

The sort is stable and without atomics: each block of slots counts its experts, the counts of all blocks before it are
where its own begin, and within the block a slot follows the earlier ones of its expert. `_spread` reads a token's row
once and writes it to the places of its slots; `_collect` adds them up again. Each is the other's way back.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megalite_kernels.custom_op import custom_op
from megalite_kernels.gpu.chips import Chip, chip_of
from megalite_kernels.gpu.launch import launch
from megalite_kernels.moe_gradients import there_and_back
from megalite_kernels.reference.moe import sorted_rows

SLOTS = 128
"""Slots of a block of the sort."""
STEP = 32
"""Slots that are compared with a whole block, or with all experts, at a time."""


def config(chip: Chip, width: int) -> dict[str, int]:
    """Columns of a tile of one row, and warps: 8 elements, or 16 bytes of half precision, a thread at a time."""
    block = max(16, min(2048, triton.next_power_of_2(width)))
    return {"BLOCK": block, "num_warps": max(1, min(8, block // (8 * chip.warp)))}


@triton.jit
def _experts(indices_ptr, slot, slots, experts):
    """int32 experts of the slots, -1 where an index is no expert's."""
    index = tl.load(indices_ptr + slot, mask=slot < slots, other=-1)
    return tl.where((index >= 0) & (index < experts), index, -1).to(tl.int32)


@triton.jit
def _count(indices_ptr, counts_ptr, slots, experts, SLOTS: tl.constexpr, STEP: tl.constexpr, EXPERTS: tl.constexpr):
    block = tl.program_id(0)
    expert = tl.arange(0, EXPERTS)
    counts = tl.zeros([EXPERTS], tl.int32)
    for first in range(block * SLOTS, block * SLOTS + SLOTS, STEP):
        slot = first + tl.arange(0, STEP)
        index = _experts(indices_ptr, slot, slots, experts)
        counts += tl.sum((index[:, None] == expert[None, :]).to(tl.int32), axis=0)
    tl.store(counts_ptr + block.to(tl.int64) * experts + expert, counts, mask=expert < experts)


@triton.jit
def _place(indices_ptr, starts_ptr, inverse_ptr, slots, experts, SLOTS: tl.constexpr, STEP: tl.constexpr):
    block = tl.program_id(0)
    slot = block * SLOTS + tl.arange(0, SLOTS)
    index = _experts(indices_ptr, slot, slots, experts)
    earlier = tl.zeros([SLOTS], tl.int32)  # slots of the same expert in this block
    for first in range(block * SLOTS, block * SLOTS + SLOTS, STEP):
        other = first + tl.arange(0, STEP)
        others = _experts(indices_ptr, other, slots, experts)
        same = (index[:, None] == others[None, :]) & (other[None, :] < slot[:, None])
        earlier += tl.sum(same.to(tl.int32), axis=1)
    start = tl.load(starts_ptr + block.to(tl.int64) * experts + index, mask=index >= 0, other=0)
    tl.store(inverse_ptr + slot, tl.where(index >= 0, start + earlier, -1), mask=slot < slots)


@triton.jit
def _spread(
    x_ptr, inverse_ptr, probs_ptr, y_ptr, out_ptr, used_ptr, grad_probs_ptr, width,
    K: tl.constexpr, K_BLOCK: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[row of slot] = [probability ·] x[token]; and the probability's gradient x[token] · y[row]."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, K_BLOCK)
    row = tl.load(inverse_ptr + token * K + slot, mask=slot < K, other=-1).to(tl.int64)
    here = row >= 0
    tl.store(used_ptr + row, tl.full([K_BLOCK], 1, tl.int8), mask=here)
    grad = tl.zeros([K_BLOCK], tl.float32)
    prob = tl.zeros([K_BLOCK], tl.float32)
    if WEIGHTED:
        prob = tl.load(probs_ptr + token * K + slot, mask=slot < K, other=0.0).to(tl.float32)
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = here[:, None] & (column < width)[None, :]
        place = row[:, None] * width + column[None, :]
        x = tl.load(x_ptr + token * width + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
        copies = x + tl.zeros([K_BLOCK, BLOCK], tl.float32)
        if WEIGHTED:
            grad += tl.sum(x * tl.load(y_ptr + place, mask=inside, other=0.0).to(tl.float32), axis=1)
            copies = x * prob[:, None]
        tl.store(out_ptr + place, copies.to(out_ptr.dtype.element_ty), mask=inside)
    if WEIGHTED:
        tl.store(grad_probs_ptr + token * K + slot, grad.to(grad_probs_ptr.dtype.element_ty), mask=slot < K)


@triton.jit
def _clear(used_ptr, out_ptr, rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Zeros in the rows that no slot has."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    free = tl.load(used_ptr + row, mask=row < rows, other=1) == 0
    if tl.sum(free.to(tl.int32), axis=0) > 0:
        for first in range(0, width, BLOCK):
            column = first + tl.arange(0, BLOCK)
            zeros = tl.zeros([ROWS, BLOCK], out_ptr.dtype.element_ty)
            inside = free[:, None] & (column < width)[None, :]
            tl.store(out_ptr + row[:, None] * width + column[None, :], zeros, mask=inside)


@triton.jit
def _collect(
    y_ptr, inverse_ptr, probs_ptr, out_ptr, width, K: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for j in range(K):  # in this order always: sums round
        row = tl.load(inverse_ptr + token * K + j).to(tl.int64)
        y = tl.load(y_ptr + row * width + column, mask=(row >= 0) & (column < width), other=0.0).to(tl.float32)
        if WEIGHTED:
            y *= tl.load(probs_ptr + token * K + j).to(tl.float32)
        total += y
    tl.store(out_ptr + token * width + column, total.to(out_ptr.dtype.element_ty), mask=column < width)


def places(indices_NK: Tensor, experts: int, pad_to: int) -> tuple[Tensor, Tensor]:
    """(offsets, inverse) of contiguous indices."""
    slots = indices_NK.numel()
    blocks = triton.cdiv(slots, SLOTS)
    counts = indices_NK.new_empty((blocks, experts), dtype=torch.int32)
    inverse = torch.empty_like(indices_NK, dtype=torch.int32)
    width = max(2, triton.next_power_of_2(experts))
    launch(_count, (blocks,), indices_NK, counts, slots, experts, SLOTS=SLOTS, STEP=STEP, EXPERTS=width)
    ends = counts.cumsum(0, dtype=torch.int32)  # [blocks, E]
    totals = counts.sum(0, dtype=torch.int32)
    offsets = counts.new_zeros(experts + 1)
    offsets[1:] = ((totals + (pad_to - 1)) // pad_to * pad_to).cumsum(0)
    starts = ends - counts + offsets[:-1]
    launch(_place, (blocks,), indices_NK, starts, inverse, slots, experts, SLOTS=SLOTS, STEP=STEP)
    return offsets, inverse


def spread(
    x_ND: Tensor, inverse_NK: Tensor, rows: int, probs_NK: Tensor | None = None, y_MD: Tensor | None = None,
    chip: Chip | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(a copy of its token's row, times its probability, for every slot [M, D]; gradient of the probabilities)."""
    tokens, width = x_ND.shape
    k = inverse_NK.shape[1]
    out = x_ND.new_empty((rows, width))
    used = x_ND.new_zeros(rows, dtype=torch.int8)
    grad_probs = x_ND.new_empty(0) if probs_NK is None else torch.empty_like(probs_NK)
    slots = max(2, triton.next_power_of_2(k))
    options = config(chip or chip_of(x_ND.device), width)
    block = max(16, options["BLOCK"] // slots)
    launch(
        _spread, (tokens,), x_ND, inverse_NK, probs_NK, y_MD, out, used, grad_probs, width, K=k, K_BLOCK=slots,
        WEIGHTED=probs_NK is not None, **options | {"BLOCK": block},
    )  # fmt: skip
    launch(_clear, (triton.cdiv(rows, 16),), used, out, rows, width, ROWS=16, BLOCK=128)
    return out, grad_probs


def collect(y_MD: Tensor, inverse_NK: Tensor, probs_NK: Tensor | None, chip: Chip | None = None) -> Tensor:
    """Σ of each token's rows, times their probabilities."""
    (tokens, k), width = inverse_NK.shape, y_MD.shape[1]
    out = y_MD.new_empty((tokens, width))
    options = config(chip or chip_of(y_MD.device), width)
    grid = (tokens, triton.cdiv(width, options["BLOCK"]))
    launch(_collect, grid, y_MD, inverse_NK, probs_NK, out, width, K=k, WEIGHTED=probs_NK is not None, **options)
    return out


@custom_op("megalite::triton_moe_permute", mutates_args=())
def permute(x_ND: Tensor, indices_NK: Tensor, experts: int, pad_to: int) -> tuple[Tensor, Tensor, Tensor]:
    """(rows sorted by expert, offsets, inverse), differentiable; pad_to 1: no padding."""
    offsets, inverse = places(indices_NK.contiguous(), experts, pad_to)
    rows = sorted_rows(indices_NK.numel(), experts, pad_to)
    return spread(x_ND.contiguous(), inverse, rows)[0], offsets, inverse


@custom_op("megalite::triton_moe_unpermute", mutates_args=())
def unpermute(y_MD: Tensor, inverse_NK: Tensor, probs_NK: Tensor | None) -> Tensor:
    """`collect`, differentiable."""
    probs = None if probs_NK is None else probs_NK.contiguous()
    return collect(y_MD.contiguous(), inverse_NK.contiguous(), probs)


@custom_op("megalite::triton_moe_unpermute_backward", mutates_args=())
def unpermute_backward(
    grad_ND: Tensor, inverse_NK: Tensor, rows: int, probs_NK: Tensor | None, y_MD: Tensor | None
) -> tuple[Tensor, Tensor]:
    probs, y = (None if t is None else t.contiguous() for t in (probs_NK, y_MD))
    return spread(grad_ND.contiguous(), inverse_NK.contiguous(), rows, probs, y)


there_and_back(permute, unpermute, unpermute_backward)
