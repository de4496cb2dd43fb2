"""Attention backward (arXiv:2307.08691), without atomics: probabilities are computed again from the log-sum-exp,
which is in base 2 throughout, as the scores are.

Three kernels. `_deltas`: of every row Σ out · grad out - grad lse, which is what the softmax takes from each gradient,
and the sinks' gradients. `_keys_and_values`: a program owns a tile of one key head and walks the queries that see it,
over all query heads of the group, so sums happen in one order. `_queries`: a program owns a tile of queries.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from megalite_kernels.gpu.attention_config import config_keys, config_queries
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

ROWS = 64
"""Queries of a program of `_deltas`."""


@triton.jit
def _deltas(
    out_ptr, grad_out_ptr, lse_ptr, grad_lse_ptr, sinks_ptr, delta_ptr, grad_sinks_ptr, queries, heads,
    E: tl.constexpr, BLOCK_E: tl.constexpr, GRAD_LSE: tl.constexpr, SINKS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(queries, ROWS)
    place = tl.program_id(0)
    first = place % tiles * ROWS
    head = place // tiles % heads
    batch = place // tiles // heads
    out = tile(out_ptr, batch, first, head, queries, heads, E, ROWS, BLOCK_E, False, False).to(tl.float32)
    grad = tile(grad_out_ptr, batch, first, head, queries, heads, E, ROWS, BLOCK_E, False, False).to(tl.float32)
    row = first + tl.arange(0, ROWS)
    inside = row < queries
    at = (batch.to(tl.int64) * heads + head) * queries + row
    delta = tl.sum(out * grad, axis=1)
    if GRAD_LSE:
        delta -= tl.load(grad_lse_ptr + at, mask=inside, other=0.0) * LOG2E
    tl.store(delta_ptr + at, delta, mask=inside)
    if SINKS:
        sink = tl.load(sinks_ptr + head).to(tl.float32)
        lse = tl.load(lse_ptr + at, mask=inside, other=float("inf"))
        weight = tl.exp2(sink * LOG2E - lse)
        tl.store(grad_sinks_ptr + place, -tl.sum(tl.where(inside, weight * delta, 0.0), axis=0))


@triton.jit
def _scores_gradient(
    products, grad_weights, lse, delta, seen, factor, cap, SOFTCAP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """(probabilities, gradients of products · scale) of a tile, whichever way it lies."""
    scores = logits(products, factor, cap, SOFTCAP)
    weights = tl.exp2(scores - lse)
    if MASKED:
        weights = tl.where(seen, weights, 0.0)
    grad = weights * (grad_weights - delta)
    if SOFTCAP:
        bent = scores / cap
        grad *= 1.0 - bent * bent
    if MASKED:
        grad = tl.where(seen, grad, 0.0)  # what is unseen may be infinite
    return weights, grad


@triton.jit
def _walk_queries(
    grad_k, grad_v, k, v, q, grad_out, lse_ptr, delta_ptr, low, high, start, full, rest, stop, batch, head, queries,
    heads, factor, cap, D: tl.constexpr, E: tl.constexpr, M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    SOFTCAP: tl.constexpr, MASKED: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Add what the queries of one head say. Tiles lie keys by queries, so no product needs the weights transposed."""
    of_head = (batch.to(tl.int64) * heads + head) * queries
    begin, end = walk(start, full, rest, stop, MASKED)
    for at in tl.range(begin, end, M):
        first = unfold(at, full, rest, MASKED)
        row = first + tl.arange(0, M)
        seen = (row[None, :] >= low[:, None]) & (row[None, :] < high[:, None])
        if MASKED:
            lse = tl.load(lse_ptr + of_head + row, mask=row < queries, other=0.0)
            delta = tl.load(delta_ptr + of_head + row, mask=row < queries, other=0.0)
        else:
            lse = tl.load(lse_ptr + of_head + row)
            delta = tl.load(delta_ptr + of_head + row)
        q_MD = tile(q, batch, first, head, queries, heads, D, M, BLOCK_D, not MASKED, DESCRIPTORS)
        grad_ME = tile(grad_out, batch, first, head, queries, heads, E, M, BLOCK_E, not MASKED, DESCRIPTORS)
        products = tl.dot(k, tl.trans(q_MD), input_precision="ieee")
        grad_weights = tl.dot(v, tl.trans(grad_ME), input_precision="ieee")
        weights, grad = _scores_gradient(
            products, grad_weights, lse[None, :], delta[None, :], seen, factor, cap, SOFTCAP, MASKED
        )
        grad_v = tl.dot(weights.to(grad_ME.dtype), grad_ME, grad_v, input_precision="ieee")
        grad_k = tl.dot(grad.to(q_MD.dtype), q_MD, grad_k, input_precision="ieee")
    return grad_k, grad_v


@triton.jit
def _keys_and_values(
    q, k_ptr, v_ptr, grad_out, lse_ptr, delta_ptr, low_ptr, high_ptr, grad_k_ptr, grad_v_ptr, queries, keys, heads,
    key_heads, shift_low, shift_high, scale, factor, cap,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    SPANS: tl.constexpr, STARTS_LATE: tl.constexpr, SOFTCAP: tl.constexpr, DESCRIPTORS: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """low, high and the shifts are the transposed mask's: of each key, the queries that see it."""
    tiles = tl.cdiv(keys, N)
    place = tl.program_id(0)
    first = place % tiles * N
    key_head = place // tiles % key_heads
    batch = place // tiles // key_heads
    group = heads // key_heads
    key = first + tl.arange(0, N)
    low, high = interval(key, batch, keys, queries, low_ptr, high_ptr, shift_low, shift_high, SPANS)
    start, full, rest, stop = borders(key, keys, queries, low, high, M, STARTS_LATE)

    k_ND = tile(k_ptr, batch, first, key_head, keys, key_heads, D, N, BLOCK_D, False, False)
    v_NE = tile(v_ptr, batch, first, key_head, keys, key_heads, E, N, BLOCK_E, False, False)
    grad_k = tl.zeros([N, BLOCK_D], tl.float32)
    grad_v = tl.zeros([N, BLOCK_E], tl.float32)
    for head in range(key_head * group, key_head * group + group):
        grad_k, grad_v = _walk_queries(
            grad_k, grad_v, k_ND, v_NE, q, grad_out, lse_ptr, delta_ptr, low, high, start, full, rest, stop, batch,
            head, queries, heads, factor, cap, D, E, M, BLOCK_D, BLOCK_E, SOFTCAP, True, DESCRIPTORS,
        )  # fmt: skip
        grad_k, grad_v = _walk_queries(
            grad_k, grad_v, k_ND, v_NE, q, grad_out, lse_ptr, delta_ptr, low, high, start, full, rest, stop, batch,
            head, queries, heads, factor, cap, D, E, M, BLOCK_D, BLOCK_E, SOFTCAP, False, DESCRIPTORS,
        )  # fmt: skip
    store_tile(grad_k_ptr, grad_k * scale, batch, first, key_head, keys, key_heads, D, N, BLOCK_D)
    store_tile(grad_v_ptr, grad_v, batch, first, key_head, keys, key_heads, E, N, BLOCK_E)


@triton.jit
def _walk_keys(
    grad_q, q, grad_out, k, v, lse, delta, low, high, start, full, rest, stop, batch, key_head, keys, key_heads, factor,
    cap, D: tl.constexpr, E: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    SOFTCAP: tl.constexpr, MASKED: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    begin, end = walk(start, full, rest, stop, MASKED)
    for at in tl.range(begin, end, N):
        first = unfold(at, full, rest, MASKED)
        key = first + tl.arange(0, N)
        seen = (key[None, :] >= low[:, None]) & (key[None, :] < high[:, None])
        k_ND = tile(k, batch, first, key_head, keys, key_heads, D, N, BLOCK_D, not MASKED, DESCRIPTORS)
        v_NE = tile(v, batch, first, key_head, keys, key_heads, E, N, BLOCK_E, not MASKED, DESCRIPTORS)
        products = tl.dot(q, tl.trans(k_ND), input_precision="ieee")
        grad_weights = tl.dot(grad_out, tl.trans(v_NE), input_precision="ieee")
        _, grad = _scores_gradient(
            products, grad_weights, lse[:, None], delta[:, None], seen, factor, cap, SOFTCAP, MASKED
        )
        grad_q = tl.dot(grad.to(k_ND.dtype), k_ND, grad_q, input_precision="ieee")
    return grad_q


@triton.jit
def _queries(
    q_ptr, k, v, grad_out_ptr, lse_ptr, delta_ptr, low_ptr, high_ptr, grad_q_ptr, queries, keys, heads, key_heads,
    shift_low, shift_high, scale, factor, cap,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    SPANS: tl.constexpr, STARTS_LATE: tl.constexpr, SOFTCAP: tl.constexpr, DESCRIPTORS: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(queries, M)
    place = tl.program_id(0)
    first = (tiles - 1 - place % tiles) * M
    head = place // tiles % heads
    batch = place // tiles // heads
    key_head = head // (heads // key_heads)
    row = first + tl.arange(0, M)
    low, high = interval(row, batch, queries, keys, low_ptr, high_ptr, shift_low, shift_high, SPANS)
    start, full, rest, stop = borders(row, queries, keys, low, high, N, STARTS_LATE)

    at = (batch.to(tl.int64) * heads + head) * queries + row
    lse = tl.load(lse_ptr + at, mask=row < queries, other=0.0)
    delta = tl.load(delta_ptr + at, mask=row < queries, other=0.0)
    q_MD = tile(q_ptr, batch, first, head, queries, heads, D, M, BLOCK_D, False, False)
    grad_ME = tile(grad_out_ptr, batch, first, head, queries, heads, E, M, BLOCK_E, False, False)
    grad_q = tl.zeros([M, BLOCK_D], tl.float32)
    grad_q = _walk_keys(
        grad_q, q_MD, grad_ME, k, v, lse, delta, low, high, start, full, rest, stop, batch, key_head, keys, key_heads,
        factor, cap, D, E, N, BLOCK_D, BLOCK_E, SOFTCAP, True, DESCRIPTORS,
    )  # fmt: skip
    grad_q = _walk_keys(
        grad_q, q_MD, grad_ME, k, v, lse, delta, low, high, start, full, rest, stop, batch, key_head, keys, key_heads,
        factor, cap, D, E, N, BLOCK_D, BLOCK_E, SOFTCAP, False, DESCRIPTORS,
    )  # fmt: skip
    store_tile(grad_q_ptr, grad_q * scale, batch, first, head, queries, heads, D, M, BLOCK_D)


def deltas(
    out: Tensor, grad_out: Tensor, lse_BHS: Tensor, grad_lse_BHS: Tensor | None, sinks_H: Tensor | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(Σ out · grad out - grad lse [B, H, S], the sinks' gradients)."""
    batch, queries, heads, value_dim = out.shape
    delta, tiles = torch.empty_like(lse_BHS), triton.cdiv(queries, ROWS)
    parts = None if sinks_H is None else lse_BHS.new_empty((batch, heads, tiles))
    launch(
        _deltas, (tiles * heads * batch,), out, grad_out, lse_BHS, grad_lse_BHS, sinks_H, delta, parts, queries, heads,
        E=value_dim, BLOCK_E=padded(value_dim), GRAD_LSE=grad_lse_BHS is not None, SINKS=sinks_H is not None, ROWS=ROWS,
    )  # fmt: skip
    return delta, None if parts is None or sinks_H is None else parts.sum((0, 2)).to(sinks_H.dtype)


def gradients(
    q: Tensor, k: Tensor, v: Tensor, lse_BHS: Tensor, delta_BHS: Tensor, grad_out: Tensor, mask: Mask, scale: float,
    softcap: float, chip: Chip | None = None, tiles: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v."""
    batch, queries, heads, dim = q.shape
    keys, key_heads, value_dim = v.shape[1:]
    chip = chip or chip_of(q.device)
    descriptors = describable(chip, q, k, v, grad_out)
    factor, cap = factors(scale, softcap)
    sizes = (queries, keys, heads, key_heads)
    shared = {
        "D": dim, "E": value_dim, "BLOCK_D": padded(dim), "BLOCK_E": padded(value_dim), "SPANS": mask.low is not None,
        "SOFTCAP": softcap > 0, "DESCRIPTORS": descriptors,
    }  # fmt: skip

    grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    options = part("attention", tiles, 1) or config_keys(chip, q.dtype, dim, value_dim)
    back = mask.transposed(keys)
    q_walked, grad_walked = (operand(x, options["M"], descriptors) for x in (q, grad_out))
    launch(
        _keys_and_values, (triton.cdiv(keys, options["N"]) * key_heads * batch,), q_walked, k, v, grad_walked, lse_BHS,
        delta_BHS, back.low, back.high, grad_k, grad_v, *sizes, back.shift_low, back.shift_high, scale, factor, cap,
        STARTS_LATE=back.starts_late, **shared, **options,
    )  # fmt: skip
    options = part("attention", tiles, 2) or config_queries(chip, q.dtype, dim, value_dim)
    walked = [operand(x, options["N"], descriptors) for x in (k, v)]
    launch(
        _queries, (triton.cdiv(queries, options["M"]) * heads * batch,), q, *walked, grad_out, lse_BHS, delta_BHS,
        mask.low, mask.high, grad_q, *sizes, mask.shift_low, mask.shift_high, scale, factor, cap,
        STARTS_LATE=mask.starts_late, **shared, **options,
    )  # fmt: skip
    return grad_q, grad_k, grad_v


def backward(
    q: Tensor, k: Tensor, v: Tensor, sinks_H: Tensor | None, out: Tensor, lse_BHS: Tensor, grad_out: Tensor,
    grad_lse_BHS: Tensor | None, mask: Mask, scale: float, softcap: float, chip: Chip | None = None,
    tiles: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of q, k, v and the sinks, from what `forward` got and gave. All contiguous; both of lse float32."""
    delta, grad_sinks = deltas(out, grad_out, lse_BHS, grad_lse_BHS, sinks_H)
    return *gradients(q, k, v, lse_BHS, delta, grad_out, mask, scale, softcap, chip, tiles), grad_sinks
