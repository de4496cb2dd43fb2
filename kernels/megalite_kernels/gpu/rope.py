"""Rotary positions: a program turns the heads of a few tokens, whose row of cos and sin it reads once.

The way back is the same kernel with the transposed rotation. Inputs may be slices of a larger projection: of each
tensor only the last dim must be contiguous.

Letters: B batch, S positions, H heads, D head size, R rotated dims (R ≤ D), P rows of a table.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megalite_kernels.custom_op import custom_op
from megalite_kernels.gpu.chips import Chip, chip_of
from megalite_kernels.gpu.launch import launch

TILE = 2048
"""Pairs that a program turns, where there are as many."""


def config(chip: Chip, heads: int, rotated: int, passed: int) -> dict[str, int]:
    """Tokens and heads of a program, and warps: about 16 pairs a thread."""
    pairs, rest = (max(1, triton.next_power_of_2(size)) for size in (rotated // 2, passed))
    width = max(pairs, rest)
    some = min(triton.next_power_of_2(heads), max(1, TILE // width))
    tokens = max(1, TILE // (width * some))
    warps = max(1, min(8, tokens * some * width // (16 * chip.warp)))
    return {"TOKENS": tokens, "HEADS": some, "PAIRS": pairs, "REST": rest, "num_warps": warps}


@triton.jit
def _rotate(
    x_ptr, cos_ptr, sin_ptr, positions_ptr, y_ptr, tokens, length, heads, rotated, dim, table_rows,
    x_batch, x_position, x_head, table_batch, table_row, positions_batch,
    POSITIONS: tl.constexpr, INTERLEAVED: tl.constexpr, BACK: tl.constexpr, PASSED: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)  # [TOKENS]; int64: its offsets pass 2³¹
    batch, position = token // length, token % length
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    pair = tl.arange(0, PAIRS)
    row, known = position, token < tokens
    if POSITIONS:
        row = tl.load(positions_ptr + batch * positions_batch + position, mask=known, other=0).to(tl.int64)
        known = known & (row >= 0) & (row < table_rows)
    # Both halves of the tables' columns: of a pair's first and second dim. A position that is in no table makes NaN.
    place = (batch * table_batch + row * table_row)[:, None] + pair[None, :]  # [TOKENS, PAIRS]
    inside = known[:, None] & (pair < rotated // 2)[None, :]
    half = rotated // 2
    cos_0 = tl.load(cos_ptr + place, mask=inside, other=float("nan")).to(tl.float32)[:, None, :]
    cos_1 = tl.load(cos_ptr + place + half, mask=inside, other=float("nan")).to(tl.float32)[:, None, :]
    sin_0 = tl.load(sin_ptr + place, mask=inside, other=float("nan")).to(tl.float32)[:, None, :]
    sin_1 = tl.load(sin_ptr + place + half, mask=inside, other=float("nan")).to(tl.float32)[:, None, :]

    there = (token < tokens)[:, None, None] & (head < heads)[None, :, None]  # [TOKENS, HEADS, 1]
    from_head = (batch * x_batch + position * x_position)[:, None, None] + head[None, :, None] * x_head
    to_head = (token[:, None, None] * heads + head[None, :, None]) * dim
    if INTERLEAVED:
        column = tl.arange(0, 2 * PAIRS)[None, None, :]
        both = there & (column < rotated)
        x = tl.load(x_ptr + from_head + column, mask=both, other=0.0).to(tl.float32)
        x_0, x_1 = tl.split(tl.reshape(x, [TOKENS, HEADS, PAIRS, 2]))
    else:
        column = pair[None, None, :]
        both = there & (column < half)
        x_0 = tl.load(x_ptr + from_head + column, mask=both, other=0.0).to(tl.float32)
        x_1 = tl.load(x_ptr + from_head + column + half, mask=both, other=0.0).to(tl.float32)
    if BACK:
        y_0, y_1 = x_0 * cos_0 + x_1 * sin_1, x_1 * cos_1 - x_0 * sin_0
    else:
        y_0, y_1 = x_0 * cos_0 - x_1 * sin_0, x_1 * cos_1 + x_0 * sin_1
    if INTERLEAVED:
        tl.store(y_ptr + to_head + column, tl.interleave(y_0, y_1).to(y_ptr.dtype.element_ty), mask=both)
    else:
        tl.store(y_ptr + to_head + column, y_0.to(y_ptr.dtype.element_ty), mask=both)
        tl.store(y_ptr + to_head + column + half, y_1.to(y_ptr.dtype.element_ty), mask=both)
    if PASSED:
        column = rotated + tl.arange(0, REST)[None, None, :]
        both = there & (column < dim)
        tl.store(y_ptr + to_head + column, tl.load(x_ptr + from_head + column, mask=both, other=0.0), mask=both)


def rotate(
    x_BSHD: Tensor, cos: Tensor, sin: Tensor, positions_BS: Tensor | None, interleaved: bool, back: bool,
    chip: Chip | None = None,
) -> Tensor:  # fmt: skip
    """x turned by the tables [B, S, R], or by rows of [P, R] at `positions`; `back`: by the transposed rotation.

    A position outside the table turns its token's rotated dims into NaN.
    """
    batch, length, heads, dim = x_BSHD.shape
    x = x_BSHD if x_BSHD.stride(-1) == 1 else x_BSHD.contiguous()
    if cos.stride() != sin.stride() or cos.stride(-1) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rotated, strides = cos.shape[-1], cos.stride()
    options = config(chip or chip_of(x.device), heads, rotated, dim - rotated)
    launch(
        _rotate, (triton.cdiv(batch * length, options["TOKENS"]), triton.cdiv(heads, options["HEADS"])),
        x, cos, sin, positions_BS, y, batch * length, length, heads, rotated, dim, cos.shape[0],
        *x.stride()[:3], 0 if positions_BS is not None else strides[0], strides[-2],
        0 if positions_BS is None else positions_BS.stride(0),
        POSITIONS=positions_BS is not None, INTERLEAVED=interleaved, BACK=back, PASSED=dim > rotated, **options,
    )  # fmt: skip
    return y


@custom_op("megalite::triton_rope", mutates_args=())
def rope(
    x_BSHD: Tensor, cos: Tensor, sin: Tensor, positions_BS: Tensor | None, interleaved: bool, back: bool
) -> Tensor:
    """`rotate`, differentiable in x."""
    positions = None if positions_BS is None or positions_BS.stride(-1) == 1 else positions_BS.contiguous()
    return rotate(x_BSHD, cos, sin, positions_BS if positions is None else positions, interleaved, back)


@rope.register_fake
def _(x_BSHD: Tensor, cos: Tensor, sin: Tensor, positions_BS: Tensor | None, interleaved: bool, back: bool) -> Tensor:
    return x_BSHD.new_empty(x_BSHD.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, positions, ctx.interleaved, ctx.back = inputs
    ctx.save_for_backward(cos, sin, positions)


def _differentiate(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    cos, sin, positions = ctx.saved_tensors
    grad_x = torch.ops.megalite.triton_rope(grad_y, cos, sin, positions, ctx.interleaved, not ctx.back)
    return grad_x, None, None, None, None, None


rope.register_autograd(_differentiate, setup_context=_save)
