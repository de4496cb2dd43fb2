"""Products of matrices in FP8 with scales: a · bᵀ, both with their rows along the summed dim.

A tile is multiplied over one block of the summed dim at a time, from zero, and then scaled and added in float32: so
every recipe is exact to float32, and a chip that sums FP8 products in fewer bits does so over 128 of them at most.
Chips without OCP FP8 in hardware turn codes into fp16, which holds them all exactly, on the way into the product.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from megalite_kernels.custom_op import custom_op
from megalite_kernels.gpu.chips import Chip, chip_of
from megalite_kernels.gpu.launch import launch
from megalite_kernels.gpu.quantize import _power, hardware
from megalite_kernels.reference.fp8 import BLOCKS


def config(chip: Chip, mx: bool, fine: bool = False) -> dict[str, int]:
    """A tile of the result, the summed block, stages and warps. `fine`: each row of both has a scale for every
    block, and those take registers."""
    block = 32 if mx else 128
    if not hardware(chip):
        return {"TILE_M": 64, "TILE_N": 128, "BLOCK_K": block, "num_stages": 2, "num_warps": 8}
    return {"TILE_M": 64 if mx or fine else 128, "TILE_N": 128, "BLOCK_K": block, "num_stages": 3, "num_warps": 8}


@triton.jit
def _decode(code, E5M2: tl.constexpr):
    """fp16 values of uint8 codes, exact."""
    if E5M2:
        half = (code.to(tl.int16) << 8).to(tl.float16, bitcast=True)
    else:
        magnitude = code.to(tl.int16) & 0x7F
        bits = ((code.to(tl.int16) & 0x80) << 8) | (magnitude << 7)  # its exponent's bias is 8 less than fp16's
        half = tl.where(magnitude == 0x7F, float("nan"), bits.to(tl.float16, bitcast=True) * 256.0).to(tl.float16)
    return half


@triton.jit
def _scale(scale_ptr, place, inside, MX: tl.constexpr):
    scale = tl.load(scale_ptr + place, mask=inside, other=0)
    return _power(scale.to(tl.int32)) if MX else scale


@triton.jit
def _scaled_mm(
    a_ptr, scale_a_ptr, b_ptr, scale_b_ptr, c_ptr, rows, columns, summed, scale_a_stride_m, scale_a_stride_k,
    scale_b_stride_n, scale_b_stride_k,
    GROUP_A: tl.constexpr, GROUP_B: tl.constexpr, PER_BLOCK: tl.constexpr, MX: tl.constexpr, HARDWARE: tl.constexpr,
    A_E5M2: tl.constexpr, B_E5M2: tl.constexpr, DESCRIPTORS: tl.constexpr, TILE_M: tl.constexpr,
    TILE_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Programs that run together share rows of b: eight tiles down before one across.
    down, across = tl.cdiv(rows, TILE_M), tl.cdiv(columns, TILE_N)
    band = tl.program_id(0) // (8 * across)
    height = tl.minimum(down - band * 8, 8)
    in_band = tl.program_id(0) - band * 8 * across
    first_m, first_n = (band * 8 + in_band % height) * TILE_M, (in_band // height) * TILE_N
    m = first_m.to(tl.int64) + tl.arange(0, TILE_M)
    n = first_n.to(tl.int64) + tl.arange(0, TILE_N)
    k = tl.arange(0, BLOCK_K)
    a_place, b_place = m[:, None] * summed + k[None, :], n[None, :] * summed + k[:, None]
    a_scales = scale_a_ptr + (m // GROUP_A) * scale_a_stride_m
    b_scales = scale_b_ptr + (n // GROUP_B) * scale_b_stride_n
    total = tl.zeros([TILE_M, TILE_N], tl.float32)
    for block in range(tl.cdiv(summed, BLOCK_K)):
        if DESCRIPTORS:
            a = a_ptr.load([first_m, block * BLOCK_K])
            b = tl.trans(b_ptr.load([first_n, block * BLOCK_K]))
        else:
            left = k < summed - block * BLOCK_K
            a = tl.load(a_ptr + a_place, mask=(m < rows)[:, None] & left[None, :], other=0.0)
            b = tl.load(b_ptr + b_place, mask=(n < columns)[None, :] & left[:, None], other=0.0)
        if not HARDWARE:
            a, b = _decode(a, A_E5M2), _decode(b, B_E5M2)
        product = tl.dot(a, b)
        if PER_BLOCK:
            scale_a = _scale(a_scales, block * scale_a_stride_k, m < rows, MX)
            scale_b = _scale(b_scales, block * scale_b_stride_k, n < columns, MX)
            product *= scale_a[:, None] * scale_b[None, :]
        total += product
        a_place += BLOCK_K
        b_place += BLOCK_K
    if not PER_BLOCK:
        total *= _scale(a_scales, 0, m < rows, MX)[:, None] * _scale(b_scales, 0, n < columns, MX)[None, :]
    place = m[:, None] * columns + n[None, :]
    tl.store(c_ptr + place, total.to(c_ptr.dtype.element_ty), mask=(m < rows)[:, None] & (n < columns)[None, :])


def forward(
    a_MK: Tensor, scale_a: Tensor, b_NK: Tensor, scale_b: Tensor, recipe_a: str, recipe_b: str, out_dtype: torch.dtype,
    chip: Chip | None = None,
) -> Tensor:  # fmt: skip
    """a · bᵀ of contiguous codes; E8M0 scales as uint8."""
    chip = chip or chip_of(a_MK.device)
    (m, k), n, mx = a_MK.shape, b_NK.shape[0], recipe_a == "mxfp8"
    (rows_a, across_a), (rows_b, across_b) = BLOCKS[recipe_a], BLOCKS[recipe_b]
    options = config(chip, mx, fine=rows_a == rows_b == 1 and across_a > 0 and across_b > 0)
    c = a_MK.new_empty((m, n), dtype=out_dtype)
    a, b = (x if hardware(chip) else x.view(torch.uint8) for x in (a_MK, b_NK))
    # Descriptors want rows of whole 16 bytes.
    described = hardware(chip) and chip.descriptors and k > 0 and not any(x.data_ptr() % 16 or k % 16 for x in (a, b))
    blocks = [options["TILE_M"], options["BLOCK_K"]], [options["TILE_N"], options["BLOCK_K"]]
    operands = [
        TensorDescriptor.from_tensor(x, block) if described else x for x, block in zip((a, b), blocks, strict=True)
    ]
    launch(
        _scaled_mm, (triton.cdiv(m, options["TILE_M"]) * triton.cdiv(n, options["TILE_N"]),),
        operands[0], scale_a, operands[1], scale_b, c, m, n, k, scale_a.shape[1] if rows_a else 0, 1 if across_a else 0,
        scale_b.shape[1] if rows_b else 0, 1 if across_b else 0, GROUP_A=rows_a or 1, GROUP_B=rows_b or 1,
        PER_BLOCK=bool(across_a or across_b), MX=mx, HARDWARE=hardware(chip), A_E5M2=a_MK.dtype == torch.float8_e5m2,
        B_E5M2=b_NK.dtype == torch.float8_e5m2, DESCRIPTORS=described, **options,
    )  # fmt: skip
    return c


@custom_op("megalite::triton_scaled_mm", mutates_args=())
def scaled_mm(
    a_MK: Tensor, scale_a: Tensor, b_NK: Tensor, scale_b: Tensor, recipe_a: str, recipe_b: str, out_dtype: torch.dtype
) -> Tensor:
    return forward(
        a_MK.contiguous(), scale_a.contiguous(), b_NK.contiguous(), scale_b.contiguous(), recipe_a, recipe_b, out_dtype
    )


@scaled_mm.register_fake
def _(
    a_MK: Tensor, scale_a: Tensor, b_NK: Tensor, scale_b: Tensor, recipe_a: str, recipe_b: str, out_dtype: torch.dtype
) -> Tensor:
    return a_MK.new_empty((a_MK.shape[0], b_NK.shape[0]), dtype=out_dtype)
