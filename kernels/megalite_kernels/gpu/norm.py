"""RMSNorm and LayerNorm with the residual sum that precedes them: one pass over a row each way.

Rows lie in registers, several of a short kind in one program. Going back, a fixed number of programs share the rows
evenly and each adds up the weight gradients of its own; those sums are added in order, so no atomics and the same bits
every time.

Arrays: N rows of D. The reciprocal deviation 1/σ (and for LayerNorm the mean μ) of every row is kept for the way back.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megalite_kernels.custom_op import custom_op
from megalite_kernels.gpu.chips import Chip, chip_of
from megalite_kernels.gpu.launch import launch

PARTS = 512
"""Programs of a backward pass at most: two or more for every multiprocessor of any chip."""
WIDEST = 65_536
"""Longest row: more would not fit in the registers of one block."""
TILE = 1024
"""Elements of a program's tile, where rows are shorter than that."""


def config(chip: Chip, width: int) -> dict[str, int]:
    """Rows of a tile, its columns, and warps: 16 elements a thread, 32 of long rows, whose blocks have fewer registers
    for each thread."""
    block = max(16, triton.next_power_of_2(width))
    rows = max(1, TILE // block)
    elements = chip.warp * (16 if rows * block < 8192 else 32)
    return {"ROWS": rows, "BLOCK": block, "num_warps": max(1, min(16, rows * block // elements))}


@triton.jit
def _forward(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, sum_ptr, mean_ptr, scale_ptr, rows, width, eps,
    RESIDUAL: tl.constexpr, CENTERED: tl.constexpr, ONE_PLUS: tl.constexpr, BIAS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]; int64: rows · width may pass 2³¹
    column = tl.arange(0, BLOCK)  # [BLOCK]
    inside = (row[:, None] < rows) & (column[None, :] < width)
    place = row[:, None] * width + column[None, :]
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
    if RESIDUAL:
        total = (x + tl.load(residual_ptr + place, mask=inside, other=0.0).to(tl.float32)).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + place, total, mask=inside)
        x = total.to(tl.float32)  # normed as stored, so fused and unfused agree
    if CENTERED:
        mean = tl.sum(x, axis=1) / width
        tl.store(mean_ptr + row, mean, mask=row < rows)
        x = tl.where(inside, x - mean[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / width + eps)
    tl.store(scale_ptr + row, scale, mask=row < rows)
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    if ONE_PLUS:
        weight += 1.0
    y = x * scale[:, None] * weight[None, :]
    if BIAS:
        y += tl.load(bias_ptr + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    x_ptr, weight_ptr, mean_ptr, scale_ptr, grad_y_ptr, grad_sum_ptr, grad_x_ptr, grad_weight_ptr, grad_bias_ptr,
    rows, width, rows_of_part,
    GRAD_SUM: tl.constexpr, CENTERED: tl.constexpr, ONE_PLUS: tl.constexpr, BIAS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    if ONE_PLUS:
        weight += 1.0
    grad_weight = tl.zeros([BLOCK], tl.float32)
    grad_bias = tl.zeros([BLOCK], tl.float32)
    last = tl.minimum((part + 1) * rows_of_part, rows)
    for first in range(part * rows_of_part, last, ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row[:, None] < last) & (column[None, :] < width)
        place = row[:, None] * width + column[None, :]
        scale = tl.load(scale_ptr + row, mask=row < last, other=0.0)
        x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
        grad_y = tl.load(grad_y_ptr + place, mask=inside, other=0.0).to(tl.float32)
        if CENTERED:
            x = tl.where(inside, x - tl.load(mean_ptr + row, mask=row < last, other=0.0)[:, None], 0.0)
        normed = x * scale[:, None]
        grad_weight += tl.sum(grad_y * normed, axis=0)
        if BIAS:
            grad_bias += tl.sum(grad_y, axis=0)
        grad_normed = grad_y * weight[None, :]
        # d normed / d x = 1/σ · (1 - normed ⊗ normed / D [- 1 ⊗ 1 / D])
        grad_x = grad_normed - normed * (tl.sum(grad_normed * normed, axis=1) / width)[:, None]
        if CENTERED:
            grad_x -= (tl.sum(grad_normed, axis=1) / width)[:, None]
        grad_x *= scale[:, None]
        if GRAD_SUM:
            grad_x += tl.load(grad_sum_ptr + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x_ptr + place, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
    tl.store(grad_weight_ptr + part * width + column, grad_weight, mask=column < width)
    if BIAS:
        tl.store(grad_bias_ptr + part * width + column, grad_bias, mask=column < width)


def forward(
    x_ND: Tensor, residual_ND: Tensor | None, weight_D: Tensor, bias_D: Tensor | None, eps: float, centered: bool,
    one_plus: bool, chip: Chip | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(y, x + residual or nothing, mean or nothing, 1/σ) of contiguous rows."""
    rows, width = x_ND.shape
    y, scale = torch.empty_like(x_ND), x_ND.new_empty(rows, dtype=torch.float32)
    total = x_ND.new_empty((0, width)) if residual_ND is None else torch.empty_like(x_ND)
    mean = x_ND.new_empty(rows if centered else 0, dtype=torch.float32)
    options = config(chip or chip_of(x_ND.device), width)
    launch(
        _forward, (triton.cdiv(rows, options["ROWS"]),), x_ND, residual_ND, weight_D, bias_D, y, total, mean, scale,
        rows, width, eps, RESIDUAL=residual_ND is not None, CENTERED=centered, ONE_PLUS=one_plus,
        BIAS=bias_D is not None, **options,
    )  # fmt: skip
    return y, total, mean, scale


def backward(
    x_ND: Tensor, weight_D: Tensor, has_bias: bool, mean_N: Tensor, scale_N: Tensor, grad_y_ND: Tensor,
    grad_sum_ND: Tensor | None, one_plus: bool, chip: Chip | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(grad x, grad weight, grad bias or nothing); x is the sum where there was a residual, whose gradient is x's."""
    rows, width = x_ND.shape
    options = config(chip or chip_of(x_ND.device), width)
    rows_of_part = options["ROWS"] * max(1, triton.cdiv(triton.cdiv(rows, options["ROWS"]), PARTS))
    parts = triton.cdiv(rows, rows_of_part)
    grad_x = torch.empty_like(x_ND)
    grad_weight = x_ND.new_empty((parts, width), dtype=torch.float32)
    grad_bias = x_ND.new_empty((parts if has_bias else 0, width), dtype=torch.float32)
    launch(
        _backward, (parts,), x_ND, weight_D, mean_N, scale_N, grad_y_ND, grad_sum_ND, grad_x, grad_weight, grad_bias,
        rows, width, rows_of_part, GRAD_SUM=grad_sum_ND is not None, CENTERED=mean_N.numel() > 0,
        ONE_PLUS=one_plus, BIAS=has_bias, **options,
    )  # fmt: skip
    summed = grad_weight.sum(0).to(weight_D.dtype)
    return grad_x, summed, grad_bias.sum(0).to(weight_D.dtype) if has_bias else summed.new_empty(0)


@custom_op("megalite::triton_norm", mutates_args=())
def norm(
    x_ND: Tensor, residual_ND: Tensor | None, weight_D: Tensor, bias_D: Tensor | None, eps: float, centered: bool,
    one_plus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`forward`, differentiable: RMSNorm, or LayerNorm when `centered`; w = 1 + weight when `one_plus`."""
    residual = None if residual_ND is None else residual_ND.contiguous()
    bias = None if bias_D is None else bias_D.contiguous()
    return forward(x_ND.contiguous(), residual, weight_D.contiguous(), bias, eps, centered, one_plus)


@norm.register_fake
def _(
    x_ND: Tensor, residual_ND: Tensor | None, weight_D: Tensor, bias_D: Tensor | None, eps: float, centered: bool,
    one_plus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    rows = x_ND.shape[0]
    total = x_ND.new_empty((0, x_ND.shape[1])) if residual_ND is None else x_ND.new_empty(x_ND.shape)
    mean = x_ND.new_empty(rows if centered else 0, dtype=torch.float32)
    return x_ND.new_empty(x_ND.shape), total, mean, x_ND.new_empty(rows, dtype=torch.float32)


@custom_op("megalite::triton_norm_backward", mutates_args=())
def norm_backward(
    x_ND: Tensor, weight_D: Tensor, has_bias: bool, mean_N: Tensor, scale_N: Tensor, grad_y_ND: Tensor,
    grad_sum_ND: Tensor | None, one_plus: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grad_sum = None if grad_sum_ND is None else grad_sum_ND.contiguous()
    return backward(
        x_ND.contiguous(), weight_D.contiguous(), has_bias, mean_N, scale_N, grad_y_ND.contiguous(), grad_sum, one_plus
    )


@norm_backward.register_fake
def _(
    x_ND: Tensor, weight_D: Tensor, has_bias: bool, mean_N: Tensor, scale_N: Tensor, grad_y_ND: Tensor,
    grad_sum_ND: Tensor | None, one_plus: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return x_ND.new_empty(x_ND.shape), torch.empty_like(weight_D), weight_D.new_empty(weight_D.shape if has_bias else 0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, bias, _, _, ctx.one_plus = inputs
    _, total, mean, scale = output
    ctx.residual, ctx.bias = residual is not None, bias is not None
    ctx.save_for_backward(x if residual is None else total, weight, mean, scale)


def _differentiate(ctx: Any, grad_y: Tensor, grad_sum: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    grad_x, grad_weight, grad_bias = torch.ops.megalite.triton_norm_backward(
        *ctx.saved_tensors[:2],
        ctx.bias,
        *ctx.saved_tensors[2:],
        grad_y,
        grad_sum if ctx.residual else None,
        ctx.one_plus,
    )
    return grad_x, grad_x if ctx.residual else None, grad_weight, grad_bias if ctx.bias else None, None, None, None


norm.register_autograd(_differentiate, setup_context=_save)
