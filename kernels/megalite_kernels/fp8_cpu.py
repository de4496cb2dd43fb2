"""FP8 on a CPU by the C kernels: the reference's numbers, bit for bit, in a fraction of its passes over memory."""

import torch
from torch import Tensor

from megalite_kernels import native
from megalite_kernels.reference.fp8 import BLOCKS, scale_of, scale_shape


def fp8_amax(x_MK: Tensor, recipe: str) -> Tensor:
    return native.fp8_amax(x_MK.contiguous(), scale_shape(tuple(x_MK.shape), recipe), _block(x_MK, recipe))


def quantize_fp8(
    x_MK: Tensor, recipe: str, dtype: torch.dtype, transpose_too: bool, scale: Tensor | None, power_of_two: bool
) -> tuple[Tensor, ...]:
    """`reference.quantize_fp8`."""
    x_MK, transposed = x_MK.contiguous(), None if scale is None else scale.t()
    if scale is None:
        scale = scale_of(fp8_amax(x_MK, recipe), recipe=recipe, dtype=dtype, power_of_two=power_of_two)
    codes = native.fp8_encode(x_MK, (1.0 / scale.float()).contiguous(), _block(x_MK, recipe), dtype)
    if not transpose_too:
        return codes, scale
    over = quantize_fp8(x_MK.t(), recipe, dtype, False, transposed, power_of_two)
    return codes, scale, *(x.contiguous() for x in over)


def scaled_mm(
    a_MK: Tensor, scale_a: Tensor, b_NK: Tensor, scale_b: Tensor, recipe_a: str, recipe_b: str, out_dtype: torch.dtype
) -> Tensor:
    """`reference.scaled_mm` of float32 sums."""
    a, b = _widened(a_MK, scale_a, recipe_a), _widened(b_NK, scale_b, recipe_b)
    return (a @ b.t()).to(out_dtype)


def _widened(codes: Tensor, scales: Tensor, recipe: str) -> Tensor:
    return native.fp8_decode(codes.contiguous(), scales.float().contiguous(), _block(codes, recipe))


def _block(x_MK: Tensor, recipe: str) -> tuple[int, int]:
    """Rows and columns that share a scale."""
    (rows, columns), (m, k) = BLOCKS[recipe], x_MK.shape
    return rows or m, columns or k
