"""Newton–Schulz iteration for Muon, on a stack of matrices.

XXᵀ and bA + cA² of a symmetric A are symmetric: only tiles on and above the diagonal are computed, and stored twice.
Products of bf16 and fp16 accumulate in float32 and are rounded once, with the term that is added.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megalite_kernels.custom_op import custom_op
from megalite_kernels.gpu.chips import Chip, chip_of
from megalite_kernels.gpu.launch import launch


def config(chip: Chip, dtype: torch.dtype) -> dict[str, int]:
    """A square tile of the result, the summed block, stages and warps."""
    if dtype == torch.float32:
        return {"TILE": 64, "BLOCK_K": 32, "num_stages": 2, "num_warps": 8}
    if chip.descriptors:
        return {"TILE": 128, "BLOCK_K": 64, "num_stages": 3, "num_warps": 8}
    return {"TILE": 64, "BLOCK_K": 64, "num_stages": 2, "num_warps": 4}


@triton.jit
def _product(
    a_ptr, b_ptr, m, n, rows, columns, summed, stride_k, stride_n, TILE: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """The tile [m, n] of a · b: a [rows, summed] is contiguous, b [summed, columns] lies by its strides."""
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros([TILE, TILE], tl.float32)
    for first in range(0, summed, BLOCK_K):
        left = k < summed - first
        a_place = m[:, None] * summed + first + k[None, :]
        b_place = (first + k[:, None]).to(tl.int64) * stride_k + n[None, :] * stride_n
        a = tl.load(a_ptr + a_place, mask=(m < rows)[:, None] & left[None, :], other=0.0)
        b = tl.load(b_ptr + b_place, mask=left[:, None] & (n < columns)[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
    return total


@triton.jit
def _symmetric(
    x_ptr, y_ptr, rows, columns, alpha, beta, ADD: tl.constexpr, TILE: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """y = alpha · x xᵀ [+ beta · x, where x is square and symmetric itself] of matrix program_id(2)."""
    if tl.program_id(0) <= tl.program_id(1):
        matrix = tl.program_id(2).to(tl.int64)
        x_ptr += matrix * rows * columns
        y_ptr += matrix * rows * rows
        m = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
        n = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
        total = alpha * _product(x_ptr, x_ptr, m, n, rows, rows, columns, 1, columns, TILE, BLOCK_K)
        inside = (m < rows)[:, None] & (n < rows)[None, :]
        place = m[:, None] * rows + n[None, :]
        if ADD:
            total += beta * tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
        y = total.to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + place, y, mask=inside)
        if tl.program_id(0) < tl.program_id(1):
            mirrored = n[:, None] * rows + m[None, :]
            tl.store(y_ptr + mirrored, tl.trans(y), mask=(n < rows)[:, None] & (m < rows)[None, :])


@triton.jit
def _advance(s_ptr, x_ptr, y_ptr, rows, columns, beta, TILE: tl.constexpr, BLOCK_K: tl.constexpr):
    """y = s x + beta · x of matrix program_id(2)."""
    matrix = tl.program_id(2).to(tl.int64)
    x_ptr += matrix * rows * columns
    m = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    n = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    total = _product(s_ptr + matrix * rows * rows, x_ptr, m, n, rows, columns, rows, columns, 1, TILE, BLOCK_K)
    inside = (m < rows)[:, None] & (n < columns)[None, :]
    place = m[:, None] * columns + n[None, :]
    total += beta * tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + matrix * rows * columns + place, total.to(y_ptr.dtype.element_ty), mask=inside)


def step(x_BRC: Tensor, coefficients: tuple[float, float, float], chip: Chip | None = None) -> Tensor:
    """aX + (bA + cA²)X with A = XXᵀ, of contiguous wide matrices."""
    a, b, c = coefficients
    matrices, rows, columns = x_BRC.shape
    options = config(chip or chip_of(x_BRC.device), x_BRC.dtype)
    down, across = triton.cdiv(rows, options["TILE"]), triton.cdiv(columns, options["TILE"])
    gram, square = (x_BRC.new_empty((matrices, rows, rows)) for _ in range(2))
    y = torch.empty_like(x_BRC)
    launch(_symmetric, (down, down, matrices), x_BRC, gram, rows, columns, 1.0, 0.0, ADD=False, **options)
    launch(_symmetric, (down, down, matrices), gram, square, rows, rows, c, b, ADD=True, **options)
    launch(_advance, (down, across, matrices), square, x_BRC, y, rows, columns, a, **options)
    return y


@custom_op("megalite::triton_newton_schulz", mutates_args=())
def newton_schulz(x_BRC: Tensor, steps: int, a: float, b: float, c: float, eps: float) -> Tensor:
    """`steps` of them from X / (‖X‖ + eps); the longer side is summed over in the end."""
    tall = x_BRC.shape[1] > x_BRC.shape[2]
    x = x_BRC.mT if tall else x_BRC
    norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float32)
    x = (x.float() / (norm + eps)).to(x.dtype).contiguous()
    for _ in range(steps):
        x = step(x, (a, b, c))
    return (x.mT if tall else x).clone(memory_format=torch.contiguous_format)


@newton_schulz.register_fake
def _(x_BRC: Tensor, steps: int, a: float, b: float, c: float, eps: float) -> Tensor:
    return x_BRC.new_empty(x_BRC.shape)
