"""Cross-entropy of rows of logits, whole or a shard of the vocabulary, and its gradient written over them.

A program owns a row and walks it in blocks: once for the log-sum-exp, of which every lane keeps its own running maximum
and sum until the end, and once more for the gradient. Rows to be ignored are not read.

Arrays: N rows of V logits in any float dtype (columns `first` … of the vocabulary), N targets.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megalite_kernels.gpu.chips import Chip, chip_of
from megalite_kernels.gpu.launch import launch

BLOCK = 8192
"""Logits that a program holds at a time, at most."""
LARGEST = tl.constexpr(3.4028234663852886e38)


def config(chip: Chip, width: int) -> dict[str, int]:
    """Columns of a block, and warps: 16 elements a thread."""
    block = min(BLOCK, max(16, triton.next_power_of_2(width)))
    return {"BLOCK": block, "num_warps": max(1, block // (16 * chip.warp))}


@triton.jit
def _capped(x, softcap, CAP: tl.constexpr):
    """(softcap · tanh(x / softcap), its slope); x and 1 without a cap."""
    slope = tl.full(x.shape, 1.0, tl.float32)
    if CAP:
        t = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * (x / softcap)))
        x, slope = softcap * t, 1.0 - t * t
    return x, slope


@triton.jit
def _sums(row_ptr, target, first, width, vocab, softcap, CAP: tl.constexpr, BLOCK: tl.constexpr):
    """(log-sum-exp of the row, logit of the target or 0 if it lies in another shard, NaN if in none)."""
    held = (target >= first) & (target < first + width)
    chosen = tl.load(row_ptr + (target - first), mask=held, other=0.0).to(tl.float32)
    chosen, _slope_there = _capped(chosen, softcap, CAP)
    elsewhere = tl.where((target >= 0) & (target < vocab), 0.0, float("nan"))
    top = tl.full([BLOCK], -LARGEST, tl.float32)  # finite: what is −inf adds exp(−inf) to it, and no NaN
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(row_ptr + column, mask=column < width, other=0.0).to(tl.float32)
        x, _slope = _capped(x, softcap, CAP)
        x = tl.where(column < width, x, -float("inf"))
        smaller = tl.exp(-tl.abs(x - top))  # one exponential for both: the smaller against the larger
        total = tl.where(x > top, total * smaller + 1.0, total + smaller)
        top = tl.where(x > top, x, top)
    peak = tl.minimum(tl.max(top, axis=0), LARGEST)
    return peak + tl.log(tl.sum(total * tl.exp(top - peak), axis=0)), tl.where(held, chosen, elsewhere)


@triton.jit
def _write_gradient(
    row_ptr, weights_ptr, counted, target, first, width, lse, softcap, CAP: tl.constexpr, BLOCK: tl.constexpr
):
    """d(weights[0] · nll + weights[1] · lse²) over the logits before the cap; 0 where not counted."""
    pull = tl.load(weights_ptr).to(tl.float32)
    factor = pull + 2.0 * tl.load(weights_ptr + 1).to(tl.float32) * lse
    read = tl.where(counted, width, 0)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(row_ptr + column, mask=column < read, other=0.0).to(tl.float32)
        x, slope = _capped(x, softcap, CAP)
        grad = (tl.exp(x - lse) * factor - tl.where(column == target - first, pull, 0.0)) * slope
        tl.store(row_ptr + column, tl.where(column < read, grad, 0.0).to(row_ptr.dtype.element_ty), mask=column < width)


@triton.jit
def _whole(
    logits_ptr, targets_ptr, weights_ptr, nll_ptr, lse_ptr, width, row_stride, ignore_index, softcap,
    CAP: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # rows · width may pass 2³¹
    row_ptr = logits_ptr + row * row_stride
    target = tl.load(targets_ptr + row)
    counted = target != ignore_index
    lse, chosen = 0.0, 0.0
    if counted:
        lse, chosen = _sums(row_ptr, target, 0, width, width, softcap, CAP, BLOCK)
    tl.store(nll_ptr + row, lse - chosen)
    tl.store(lse_ptr + row, lse)
    if GRADIENT:
        _write_gradient(row_ptr, weights_ptr, counted, target, 0, width, lse, softcap, CAP, BLOCK)


@triton.jit
def _shard_sums(
    logits_ptr, targets_ptr, lse_ptr, chosen_ptr, first, width, vocab, row_stride, ignore_index, softcap,
    CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    lse, chosen = 0.0, 0.0
    if target != ignore_index:
        lse, chosen = _sums(logits_ptr + row * row_stride, target, first, width, vocab, softcap, CAP, BLOCK)
    tl.store(lse_ptr + row, lse)
    tl.store(chosen_ptr + row, chosen)


@triton.jit
def _shard_gradient(
    logits_ptr, targets_ptr, weights_ptr, lse_ptr, first, width, row_stride, ignore_index, softcap,
    CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    lse = tl.load(lse_ptr + row)
    row_ptr = logits_ptr + row * row_stride
    _write_gradient(row_ptr, weights_ptr, target != ignore_index, target, first, width, lse, softcap, CAP, BLOCK)


def whole(
    logits_NV: Tensor, targets_N: Tensor, weights: Tensor | None, softcap: float, ignore_index: int,
    chip: Chip | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(nll, lse) a row in float32, 0 where ignored, NaN where the target is no column.

    With `weights` [2] the logits become the gradient of weights[0] · nll + weights[1] · lse² by them, before the cap.
    They lie on the device and are never read here.
    """
    rows, width = logits_NV.shape
    nll, lse = (logits_NV.new_empty(rows, dtype=torch.float32) for _ in range(2))
    launch(
        _whole, (rows,), logits_NV, targets_N, weights, nll, lse, width, logits_NV.stride(0), ignore_index, softcap,
        CAP=softcap > 0, GRADIENT=weights is not None, **config(chip or chip_of(logits_NV.device), width),
    )  # fmt: skip
    return nll, lse


def shard_sums(
    logits_NV: Tensor, targets_N: Tensor, first: int, vocab: int, softcap: float, ignore_index: int,
    chip: Chip | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(lse of this shard's logits, logit of the target or 0 if another shard has it) a row; both 0 where ignored."""
    rows, width = logits_NV.shape
    lse, chosen = (logits_NV.new_empty(rows, dtype=torch.float32) for _ in range(2))
    launch(
        _shard_sums, (rows,), logits_NV, targets_N, lse, chosen, first, width, vocab, logits_NV.stride(0),
        ignore_index, softcap, CAP=softcap > 0, **config(chip or chip_of(logits_NV.device), width),
    )  # fmt: skip
    return lse, chosen


def shard_gradient(
    logits_NV: Tensor, targets_N: Tensor, weights: Tensor, lse_N: Tensor, first: int, softcap: float,
    ignore_index: int, chip: Chip | None = None,
) -> None:  # fmt: skip
    """The logits become the gradient by them, as in `whole`, given the lse of the whole vocabulary."""
    rows, width = logits_NV.shape
    launch(
        _shard_gradient, (rows,), logits_NV, targets_N, weights, lse_N, first, width, logits_NV.stride(0),
        ignore_index, softcap, CAP=softcap > 0, **config(chip or chip_of(logits_NV.device), width),
    )  # fmt: skip
