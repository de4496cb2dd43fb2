"""The choice of experts: scores, bias, groups, top k, probabilities and tokens of each expert, in one pass over logits.

A tile of rows lies in registers with a column an expert, groups filled up to powers of two. Values and column numbers
are packed into int64s, so that one maximum finds the best expert and settles ties. A fixed number of programs share
the rows and each counts its own choices; the counts are added afterwards, so no atomics.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megalite_kernels.custom_op import custom_op
from megalite_kernels.gpu.chips import Chip, chip_of
from megalite_kernels.gpu.launch import launch

PARTS = 1024
"""Programs at most: several for every multiprocessor of any chip."""
MOST_EXPERTS = 512
"""Columns of a row, with its groups filled up: more would not fit in registers beside the int64s."""
MOST_CHOSEN = 16
TILE = 2048

OUT = tl.constexpr(-(2**63) + 1)
"""Below every packed value."""
TINY = tl.constexpr(1e-20)  # as in the reference


def columns(experts: int, groups: int) -> tuple[int, int]:
    """(groups, experts of a group), each filled up to a power of two."""
    return triton.next_power_of_2(groups), triton.next_power_of_2(experts // groups)


def config(chip: Chip, width: int) -> dict[str, int]:
    """Rows of a tile of so many columns, and warps: 8 to 16 elements a thread."""
    rows = max(1, min(64, TILE // width))
    return {"ROWS": rows, "num_warps": max(1, min(4, rows * width // (8 * chip.warp)))}


@triton.jit
def _packed(value, number):
    """int64s that rank as the values do, NaN above all; of equal values the lower number ranks higher."""
    value = tl.where(value == 0.0, 0.0, value)  # -0 equals 0
    bits = value.to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # a float's bits rank as it does once those of negative ones are turned
    bits = tl.where(value != value, 0x7FFFFFFF, bits)
    return (bits.to(tl.int64) << 32) | (number ^ 0x7FFFFFFF).to(tl.int64)


@triton.jit
def _without_other_groups(
    packed, value, GROUPS: tl.constexpr, SIZE: tl.constexpr, TOP_GROUPS: tl.constexpr,
    ROWS: tl.constexpr, GROUP_BLOCK: tl.constexpr, SIZE_BLOCK: tl.constexpr,
):  # fmt: skip
    """`packed` [ROWS, columns] with OUT in all but the best groups, which are those of the largest two values' sum."""
    members = tl.reshape(packed, [ROWS, GROUP_BLOCK, SIZE_BLOCK])
    values = tl.reshape(value, [ROWS, GROUP_BLOCK, SIZE_BLOCK])
    hit = members == tl.max(members, axis=2)[:, :, None]
    total = tl.sum(tl.where(hit, values, 0.0), axis=2)  # [ROWS, GROUP_BLOCK]
    if SIZE > 1:
        left = tl.where(hit, OUT, members)
        total += tl.sum(tl.where(left == tl.max(left, axis=2)[:, :, None], values, 0.0), axis=2)
    group = tl.arange(0, GROUP_BLOCK)[None, :] + tl.zeros([ROWS, GROUP_BLOCK], tl.int32)
    ranked = tl.where(group < GROUPS, _packed(total, group), OUT)
    for _ in range(TOP_GROUPS):
        ranked = tl.where(ranked == tl.max(ranked, axis=1)[:, None], OUT, ranked)
    chosen = tl.broadcast_to((ranked == OUT)[:, :, None], [ROWS, GROUP_BLOCK, SIZE_BLOCK])
    return tl.reshape(tl.where(chosen, members, OUT), [ROWS, GROUP_BLOCK * SIZE_BLOCK])


@triton.jit
def _forward(
    logits_ptr, bias_ptr, indices_ptr, probs_ptr, counts_ptr, rows, rows_of_part, scale,
    EXPERTS: tl.constexpr, K: tl.constexpr, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, SIGMOID: tl.constexpr,
    NORMALIZE: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, GROUP_BLOCK: tl.constexpr,
    SIZE_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr,
):  # fmt: skip
    BLOCK: tl.constexpr = GROUP_BLOCK * SIZE_BLOCK
    SIZE: tl.constexpr = EXPERTS // GROUPS
    part = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    expert = column // SIZE_BLOCK * SIZE + column % SIZE_BLOCK  # [BLOCK], rising where real
    real = (column // SIZE_BLOCK < GROUPS) & (column % SIZE_BLOCK < SIZE)
    slot = tl.arange(0, K_BLOCK)
    counts = tl.zeros([BLOCK], tl.int32)
    last = tl.minimum((part + 1) * rows_of_part, rows)
    for first in range(part * rows_of_part, last, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < last)[:, None] & real[None, :]
        logits = tl.load(logits_ptr + row[:, None] * EXPERTS + expert[None, :], mask=inside, other=0.0).to(tl.float32)
        logits = tl.where(real[None, :], logits, float("-inf"))  # [ROWS, BLOCK]
        if SIGMOID:
            score = tl.sigmoid(logits)
        else:
            score = tl.exp(logits - tl.max(logits, axis=1)[:, None])
            score = score / tl.sum(score, axis=1)[:, None]
        ranked = logits
        if BIAS or TOP_GROUPS < GROUPS:
            ranked = score
        if BIAS:
            ranked += tl.load(bias_ptr + expert, mask=real, other=0.0).to(tl.float32)[None, :]
        value = logits if NORMALIZE and not SIGMOID else score
        packed = tl.where(real[None, :], _packed(ranked, expert[None, :]), OUT)
        if TOP_GROUPS < GROUPS:
            ranked = tl.where(real[None, :], ranked, 0.0)
            packed = _without_other_groups(packed, ranked, GROUPS, SIZE, TOP_GROUPS, ROWS, GROUP_BLOCK, SIZE_BLOCK)
        indices = tl.zeros([ROWS, K_BLOCK], tl.int64)
        values = tl.full([ROWS, K_BLOCK], float("-inf"), tl.float32)
        for j in range(K):
            best = tl.max(packed, axis=1)
            hit = packed == best[:, None]
            picked = tl.sum(tl.where(hit, value, 0.0), axis=1)
            indices = tl.where((slot == j)[None, :], ((best & 0x7FFFFFFF) ^ 0x7FFFFFFF)[:, None], indices)
            values = tl.where((slot == j)[None, :], picked[:, None], values)
            packed = tl.where(hit, OUT, packed)
            counts += tl.sum((hit & inside).to(tl.int32), axis=0)
        probs = values
        if NORMALIZE and SIGMOID:
            probs = values / (tl.sum(tl.where((slot < K)[None, :], values, 0.0), axis=1) + TINY)[:, None]
        elif NORMALIZE:
            probs = tl.exp(values - tl.max(values, axis=1)[:, None])
            probs = probs / tl.sum(probs, axis=1)[:, None]
        place = row[:, None] * K + slot[None, :]
        kept = (row < last)[:, None] & (slot < K)[None, :]
        tl.store(indices_ptr + place, indices, mask=kept)
        tl.store(probs_ptr + place, probs * scale, mask=kept)
    tl.store(counts_ptr + part * EXPERTS + expert, counts, mask=real)


@triton.jit
def _backward(
    logits_ptr, indices_ptr, grad_probs_ptr, grad_logits_ptr, rows, scale,
    EXPERTS: tl.constexpr, K: tl.constexpr, SIGMOID: tl.constexpr, NORMALIZE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    expert = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (expert < EXPERTS)[None, :]
    place = row[:, None] * EXPERTS + expert[None, :]
    logits = tl.load(logits_ptr + place, mask=inside, other=0.0).to(tl.float32)
    grad = tl.zeros([ROWS, BLOCK], tl.float32)  # of the chosen experts' probabilities
    chosen = tl.zeros([ROWS, BLOCK], tl.int32)
    for j in range(K):
        index = tl.load(indices_ptr + row * K + j, mask=row < rows, other=-1)
        hit = expert[None, :] == index[:, None]
        upstream = tl.load(grad_probs_ptr + row * K + j, mask=row < rows, other=0.0).to(tl.float32) * scale
        grad = tl.where(hit, upstream[:, None], grad)
        chosen = tl.where(hit, 1, chosen)
    taken = (chosen == 1) & inside
    if SIGMOID:
        score = tl.sigmoid(logits)
        if NORMALIZE:
            total = tl.sum(tl.where(taken, score, 0.0), axis=1) + TINY
            mean = tl.sum(tl.where(taken, grad * score, 0.0), axis=1) / total
            grad = (grad - mean[:, None]) / total[:, None]
        grad = grad * score * (1.0 - score)
    else:
        if not NORMALIZE:
            taken = inside  # the softmax is over all experts
        logits = tl.where(taken, logits, float("-inf"))
        score = tl.where(taken, tl.exp(logits - tl.max(logits, axis=1)[:, None]), 0.0)
        score = score / tl.sum(score, axis=1)[:, None]
        grad = score * (grad - tl.sum(tl.where(taken, score * grad, 0.0), axis=1)[:, None])
    grad = tl.where(taken, grad, 0.0)
    tl.store(grad_logits_ptr + place, grad.to(grad_logits_ptr.dtype.element_ty), mask=inside)


def forward(
    logits_NE: Tensor, bias_E: Tensor | None, k: int, sigmoid: bool, normalize: bool, groups: int, top_groups: int,
    scale: float, chip: Chip | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(indices, probabilities, counts) of contiguous rows."""
    rows, experts = logits_NE.shape
    if groups == top_groups:
        groups = top_groups = 1
    group_block, size_block = columns(experts, groups)
    options = config(chip or chip_of(logits_NE.device), group_block * size_block)
    rows_of_part = options["ROWS"] * max(1, triton.cdiv(triton.cdiv(rows, options["ROWS"]), PARTS))
    parts = triton.cdiv(rows, rows_of_part)
    indices = logits_NE.new_empty((rows, k), dtype=torch.int64)
    probs = logits_NE.new_empty((rows, k), dtype=torch.float32)
    counts = logits_NE.new_empty((parts, experts), dtype=torch.int32)
    launch(
        _forward, (parts,), logits_NE, bias_E, indices, probs, counts, rows, rows_of_part, scale,
        EXPERTS=experts, K=k, GROUPS=groups, TOP_GROUPS=top_groups, SIGMOID=sigmoid, NORMALIZE=normalize,
        BIAS=bias_E is not None, GROUP_BLOCK=group_block, SIZE_BLOCK=size_block,
        K_BLOCK=max(2, triton.next_power_of_2(k)), **options,
    )  # fmt: skip
    return indices, probs, counts.sum(0)


def backward(
    logits_NE: Tensor, indices_NK: Tensor, grad_probs_NK: Tensor, sigmoid: bool, normalize: bool, scale: float,
    chip: Chip | None = None,
) -> Tensor:  # fmt: skip
    rows, experts = logits_NE.shape
    block = max(2, triton.next_power_of_2(experts))
    options = config(chip or chip_of(logits_NE.device), block)
    grad_logits = torch.empty_like(logits_NE)
    launch(
        _backward, (triton.cdiv(rows, options["ROWS"]),), logits_NE, indices_NK, grad_probs_NK, grad_logits, rows,
        scale, EXPERTS=experts, K=indices_NK.shape[1], SIGMOID=sigmoid, NORMALIZE=normalize, BLOCK=block, **options,
    )  # fmt: skip
    return grad_logits


@custom_op("megalite::triton_moe_route", mutates_args=())
def route(
    logits_NE: Tensor, bias_E: Tensor | None, k: int, sigmoid: bool, normalize: bool, groups: int, top_groups: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`forward`; the probabilities are differentiable."""
    bias = None if bias_E is None else bias_E.contiguous()
    return forward(logits_NE.contiguous(), bias, k, sigmoid, normalize, groups, top_groups, scale)


@route.register_fake
def _(
    logits_NE: Tensor, bias_E: Tensor | None, k: int, sigmoid: bool, normalize: bool, groups: int, top_groups: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rows, experts = logits_NE.shape
    indices = logits_NE.new_empty((rows, k), dtype=torch.int64)
    return indices, logits_NE.new_empty((rows, k), dtype=torch.float32), indices.new_empty(experts)


@custom_op("megalite::triton_moe_route_backward", mutates_args=())
def route_backward(
    logits_NE: Tensor, indices_NK: Tensor, grad_probs_NK: Tensor, sigmoid: bool, normalize: bool, scale: float
) -> Tensor:
    return backward(logits_NE.contiguous(), indices_NK, grad_probs_NK.contiguous(), sigmoid, normalize, scale)


@route_backward.register_fake
def _(
    logits_NE: Tensor, indices_NK: Tensor, grad_probs_NK: Tensor, sigmoid: bool, normalize: bool, scale: float
) -> Tensor:
    return logits_NE.new_empty(logits_NE.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, _, _, ctx.sigmoid, ctx.normalize, _, _, ctx.scale = inputs
    ctx.save_for_backward(logits, output[0])


def _differentiate(ctx: Any, grad_indices: Any, grad_probs: Tensor, grad_counts: Any) -> tuple[Tensor | None, ...]:
    options = (ctx.sigmoid, ctx.normalize, ctx.scale)
    grad = torch.ops.megalite.triton_moe_route_backward(*ctx.saved_tensors, grad_probs, *options)
    return grad, *[None] * 7


route.register_autograd(_differentiate, setup_context=_save)
