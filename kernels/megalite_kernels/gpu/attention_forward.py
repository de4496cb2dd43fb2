"""Attention forward (arXiv:2307.08691): a program walks the keys that a tile of queries sees with a running
softmax.

Products accumulate in float32. Of every row the log-sum-exp is kept, which is all the way back needs: in base 2, as the
scores are, since a change of base would round it, and the way back takes e to the power of that error.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from megalite_kernels.gpu.attention_config import config
from megalite_kernels.gpu.attention_tiles import (
    LOG2E,
    Mask,
    borders,
    describable,
    factors,
    interval,
    logits,
    operand,
    padded,
    store_tile,
    tile,
    unfold,
    walk,
)
from megalite_kernels.gpu.chips import Chip, chip_of
from megalite_kernels.gpu.launch import launch
from megalite_kernels.tuning import part


@triton.jit
def _walk(
    acc, top, total, q, k, v, low, high, start, full, rest, stop, batch, key_head, keys, key_heads, factor, cap,
    D: tl.constexpr, E: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    SOFTCAP: tl.constexpr, MASKED: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Take keys in. top: largest logit so far; total: sum of exp2(logit - top); acc: of values with those weights."""
    begin, end = walk(start, full, rest, stop, MASKED)
    for at in tl.range(begin, end, N):
        first = unfold(at, full, rest, MASKED)
        k_ND = tile(k, batch, first, key_head, keys, key_heads, D, N, BLOCK_D, not MASKED, DESCRIPTORS)
        scores = logits(tl.dot(q, tl.trans(k_ND), input_precision="ieee"), factor, cap, SOFTCAP)
        if MASKED:
            key = first + tl.arange(0, N)
            seen = (key[None, :] >= low[:, None]) & (key[None, :] < high[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        pivot = tl.where(new_top == float("-inf"), 0.0, new_top)  # a row that has seen nothing yet
        weights = tl.exp2(scores - pivot[:, None])
        shrink = tl.exp2(top - pivot)
        total = total * shrink + tl.sum(weights, axis=1)
        v_NE = tile(v, batch, first, key_head, keys, key_heads, E, N, BLOCK_E, not MASKED, DESCRIPTORS)
        acc = tl.dot(weights.to(v_NE.dtype), v_NE, acc * shrink[:, None], input_precision="ieee")
        top = new_top
    return acc, top, total


@triton.jit
def _forward(
    q_ptr, k, v, sinks_ptr, low_ptr, high_ptr, out_ptr, lse_ptr, queries, keys, heads, key_heads, shift_low, shift_high,
    factor, cap, D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    SPANS: tl.constexpr, STARTS_LATE: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr,
    DESCRIPTORS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(queries, M)
    place = tl.program_id(0)
    first = (tiles - 1 - place % tiles) * M  # the last queries see most keys under a causal mask: they begin
    head = place // tiles % heads
    batch = place // tiles // heads
    key_head = head // (heads // key_heads)
    row = first + tl.arange(0, M)
    low, high = interval(row, batch, queries, keys, low_ptr, high_ptr, shift_low, shift_high, SPANS)
    start, full, rest, stop = borders(row, queries, keys, low, high, N, STARTS_LATE)

    q_MD = tile(q_ptr, batch, first, head, queries, heads, D, M, BLOCK_D, False, False)
    acc = tl.zeros([M, BLOCK_E], tl.float32)
    if SINKS:  # a logit without a value, seen by all
        top = tl.zeros([M], tl.float32) + tl.load(sinks_ptr + head).to(tl.float32) * LOG2E
        total = tl.where(top == float("-inf"), 0.0, 1.0)
    else:
        top = tl.full([M], float("-inf"), tl.float32)
        total = tl.zeros([M], tl.float32)
    acc, top, total = _walk(
        acc, top, total, q_MD, k, v, low, high, start, full, rest, stop, batch, key_head, keys, key_heads, factor, cap,
        D, E, N, BLOCK_D, BLOCK_E, SOFTCAP, True, DESCRIPTORS,
    )  # fmt: skip
    acc, top, total = _walk(
        acc, top, total, q_MD, k, v, low, high, start, full, rest, stop, batch, key_head, keys, key_heads, factor, cap,
        D, E, N, BLOCK_D, BLOCK_E, SOFTCAP, False, DESCRIPTORS,
    )  # fmt: skip
    blind = total == 0.0
    some = tl.where(blind, 1.0, total)
    store_tile(out_ptr, acc / some[:, None], batch, first, head, queries, heads, E, M, BLOCK_E)
    lse = tl.where(blind, float("-inf"), top + tl.log2(some))
    tl.store(lse_ptr + (batch.to(tl.int64) * heads + head) * queries + row, lse, mask=row < queries)


def forward(
    q: Tensor, k: Tensor, v: Tensor, sinks_H: Tensor | None, mask: Mask, scale: float, softcap: float,
    chip: Chip | None = None, tiles: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out [B, S, H, E], float32 log-sum-exp in base 2 [B, H, S]) of contiguous tensors; letters: attention_tiles."""
    batch, queries, heads, dim = q.shape
    keys, key_heads, value_dim = v.shape[1:]
    chip = chip or chip_of(q.device)
    options = part("attention", tiles, 0) or config(chip, q.dtype, dim, value_dim)
    out = q.new_empty((batch, queries, heads, value_dim))
    lse = q.new_empty((batch, heads, queries), dtype=torch.float32)
    descriptors = describable(chip, q, k, v)
    factor, cap = factors(scale, softcap)
    walked = [operand(x, options["N"], descriptors) for x in (k, v)]
    launch(
        _forward, (triton.cdiv(queries, options["M"]) * heads * batch,), q, *walked, sinks_H, mask.low, mask.high, out,
        lse, queries, keys, heads, key_heads, mask.shift_low, mask.shift_high, factor, cap, D=dim, E=value_dim,
        BLOCK_D=padded(dim), BLOCK_E=padded(value_dim), SPANS=mask.low is not None, STARTS_LATE=mask.starts_late,
        SOFTCAP=softcap > 0, SINKS=sinks_H is not None, DESCRIPTORS=descriptors, **options,
    )  # fmt: skip
    return out, lse
