"""A product per expert: rows sorted by expert times that expert's weight, its way back, and the weights' gradient.

How many rows an expert has is known on the GPU alone. Tile t of rows of BM belongs to the last expert e with
offsets[e] // BM + e ≤ t: that leaves every expert as many tiles as it can need, M // BM + E + 1 in all, a few of them
empty, and each program finds its expert by itself. The rows after the last expert's are a group without a weight,
whose result is zero. Strides let one kernel multiply by weights and by their transposes.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from megalite_kernels.custom_op import custom_op
from megalite_kernels.gpu.chips import Chip, chip_of
from megalite_kernels.gpu.launch import launch
from megalite_kernels.moe_gradients import products
from megalite_kernels.tuning import part

NEIGHBOURS = tl.constexpr(8)
"""Tiles of rows whose programs run next to each other, so that they find an expert's weight in the cache."""


def config(chip: Chip, dtype: torch.dtype, rows: int, experts: int) -> dict[str, int]:
    """Tiles [BM, BN] with steps of BK, warps and stages; few rows an expert get tiles of few rows."""
    if dtype.itemsize == 4:
        return {"BM": 64, "BN": 64, "BK": 32, "num_warps": 4, "num_stages": 2}
    bm = 128 if rows > 64 * experts else 64
    if chip.name == "gfx942":
        return {"BM": bm, "BN": 128, "BK": 32, "num_warps": 4, "num_stages": 2}
    return {"BM": bm, "BN": 128, "BK": 64, "num_warps": 8 if bm == 128 else 4, "num_stages": 3}


def weight_config(chip: Chip, dtype: torch.dtype) -> dict[str, int]:
    """Tiles [BD, BF] of a weight's gradient, and rows of a step."""
    if dtype.itemsize == 4:
        return {"BD": 64, "BF": 64, "BK": 32, "num_warps": 4, "num_stages": 2}
    if chip.name == "gfx942":
        return {"BD": 128, "BF": 128, "BK": 32, "num_warps": 4, "num_stages": 2}
    return {"BD": 128, "BF": 128, "BK": 64, "num_warps": 8, "num_stages": 3}


@triton.jit
def _rows(
    x_ptr, w_ptr, bias_ptr, offsets_ptr, y_ptr, rows, depth, width, experts, tiles, stride_e, stride_d, stride_f,
    EXPERTS: tl.constexpr, BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(width, BN)
    program = tl.program_id(0)
    group = program // (NEIGHBOURS * across)
    here = tl.minimum(tiles - group * NEIGHBOURS, NEIGHBOURS)
    within = program - group * NEIGHBOURS * across
    tile = group * NEIGHBOURS + within % here
    expert = tl.arange(0, EXPERTS)
    starts = tl.load(offsets_ptr + expert, mask=expert <= experts, other=0)
    mine = tl.sum(((expert <= experts) & (starts // BM + expert <= tile)).to(tl.int32), axis=0) - 1
    start = tl.load(offsets_ptr + mine)
    end = tl.load(offsets_ptr + mine + 1, mask=mine < experts, other=rows)
    first = start + (tile - start // BM - mine) * BM
    if first < end:
        row = first.to(tl.int64) + tl.arange(0, BM)
        column = within // here * BN + tl.arange(0, BN)
        k = tl.arange(0, BK)
        x_ptrs = x_ptr + row[:, None] * depth + k[None, :]
        w_ptrs = w_ptr + mine.to(tl.int64) * stride_e + k[:, None] * stride_d + column[None, :] * stride_f
        total = tl.zeros([BM, BN], tl.float32)
        for done in range(0, tl.where(mine < experts, depth, 0), BK):
            deep = done + k < depth
            x = tl.load(x_ptrs, mask=(row < end)[:, None] & deep[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=deep[:, None] & (column < width)[None, :], other=0.0)
            total = tl.dot(x, w, total, input_precision="ieee")
            x_ptrs += BK
            w_ptrs += BK * stride_d
        if BIAS:
            known = (column < width) & (mine < experts)
            bias = tl.load(bias_ptr + mine.to(tl.int64) * width + column, mask=known, other=0.0)
            total += bias.to(tl.float32)[None, :]
        inside = (row < end)[:, None] & (column < width)[None, :]
        place = row[:, None] * width + column[None, :]
        tl.store(y_ptr + place, total.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _weights(
    x_ptr, grad_ptr, offsets_ptr, out_ptr, depth, width, stride_e, stride_d, stride_f,
    BD: tl.constexpr, BF: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(width, BF)
    expert = tl.program_id(1)
    d = tl.program_id(0) // across * BD + tl.arange(0, BD)
    f = tl.program_id(0) % across * BF + tl.arange(0, BF)
    start = tl.load(offsets_ptr + expert).to(tl.int64)
    end = tl.load(offsets_ptr + expert + 1)
    total = tl.zeros([BD, BF], tl.float32)
    for first in range(start, end, BK):
        row = first + tl.arange(0, BK)
        there = row < end
        x_ptrs = x_ptr + row[None, :] * depth + d[:, None]
        grad_ptrs = grad_ptr + row[:, None] * width + f[None, :]
        x = tl.load(x_ptrs, mask=(d < depth)[:, None] & there[None, :], other=0.0)
        grad = tl.load(grad_ptrs, mask=there[:, None] & (f < width)[None, :], other=0.0)
        total = tl.dot(x, grad, total, input_precision="ieee")
    place = expert.to(tl.int64) * stride_e + d[:, None].to(tl.int64) * stride_d + f[None, :] * stride_f
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=(d < depth)[:, None] & (f < width)[None, :])


@triton.jit
def _sums(grad_ptr, offsets_ptr, out_ptr, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    expert = tl.program_id(1)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    start = tl.load(offsets_ptr + expert).to(tl.int64)
    end = tl.load(offsets_ptr + expert + 1)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(start, end, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < end)[:, None] & (column < width)[None, :]
        grad = tl.load(grad_ptr + row[:, None] * width + column[None, :], mask=inside, other=0.0)
        total += tl.sum(grad.to(tl.float32), axis=0)
    place = expert.to(tl.int64) * width + column
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=column < width)


def rows(
    x_MD: Tensor, w_EDF: Tensor, offsets: Tensor, bias_EF: Tensor | None = None, chip: Chip | None = None,
    tiles: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    """y [M, F] = x · w + bias of each row's expert, of contiguous x and any strides of w."""
    (count, depth), (experts, _, width) = x_MD.shape, w_EDF.shape
    y = x_MD.new_empty((count, width))
    options = part("grouped_gemm", tiles, 0) or config(chip or chip_of(x_MD.device), x_MD.dtype, count, experts)
    down = count // options["BM"] + experts + 1 if count else 0
    launch(
        _rows, (down * triton.cdiv(width, options["BN"]),), x_MD, w_EDF, bias_EF, offsets, y, count, depth, width,
        experts, down, *w_EDF.stride(), EXPERTS=triton.next_power_of_2(experts + 1), BIAS=bias_EF is not None,
        **options,
    )  # fmt: skip
    return y


def weights(
    x_MD: Tensor, grad_MF: Tensor, offsets: Tensor, like_EDF: Tensor, chip: Chip | None = None,
    tiles: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    """Each expert's xᵀ · grad over its rows, with the strides of `like`; zero where it has none."""
    experts, depth, width = like_EDF.shape
    out = torch.empty_like(like_EDF)
    options = part("grouped_gemm", tiles, 1) or weight_config(chip or chip_of(x_MD.device), x_MD.dtype)
    grid = (triton.cdiv(depth, options["BD"]) * triton.cdiv(width, options["BF"]), experts)
    launch(_weights, grid, x_MD, grad_MF, offsets, out, depth, width, *out.stride(), **options)
    return out


def sums(grad_MF: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    """Each expert's sum over its rows, [E, F]: the gradient of its bias."""
    width, experts = grad_MF.shape[1], len(offsets) - 1
    out = grad_MF.new_empty((experts, width), dtype=dtype)
    launch(_sums, (triton.cdiv(width, 128), experts), grad_MF, offsets, out, width, ROWS=32, BLOCK=128)
    return out


@custom_op("megalite::triton_grouped_gemm", mutates_args=())
def grouped_gemm(
    x_MD: Tensor, w_EDF: Tensor, offsets: Tensor, bias_EF: Tensor | None, tiles: Sequence[int] | None = None
) -> Tensor:
    """`rows`, differentiable. `tiles`: see tuning."""
    bias = None if bias_EF is None else bias_EF.contiguous()
    return rows(x_MD.contiguous(), w_EDF, offsets, bias, tiles=tiles)


@custom_op("megalite::triton_grouped_gemm_weights", mutates_args=())
def grouped_gemm_weights(
    x_MD: Tensor, grad_MF: Tensor, offsets: Tensor, like_EDF: Tensor, tiles: Sequence[int] | None = None
) -> Tensor:
    return weights(x_MD.contiguous(), grad_MF.contiguous(), offsets, like_EDF, tiles=tiles)


@custom_op("megalite::triton_grouped_gemm_bias", mutates_args=())
def grouped_gemm_bias(grad_MF: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    return sums(grad_MF.contiguous(), offsets, dtype)


products(grouped_gemm, grouped_gemm_weights, grouped_gemm_bias)
