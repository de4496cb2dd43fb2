"""FP8 numbers with scales, as the formats define them (OCP 8-bit floating point 1.0 and microscaling formats 1.0).

x ≈ codes · scale. A recipe says which block of a matrix shares one scale. A scale is a float32 number, amax / largest
code at least 2⁻¹²⁶, so that its inverse is finite too; or in "mxfp8" a power of two stored as its exponent (E8M0),
2^(⌊log₂ amax⌋ - ⌊log₂ largest⌋), by which values between the largest code and the next power of two saturate.
A block with an inf or a NaN has the scale NaN and codes NaN, so that none of it can hide.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCKS: dict[str, tuple[int, int]] = {
    "tensorwise": (0, 0),
    "rowwise": (1, 0),
    "blockwise_1x128": (1, 128),
    "blockwise_128x128": (128, 128),
    "mxfp8": (1, 32),
}
"""Recipe -> rows and columns that share a scale; 0: all."""
EXPONENTS = {torch.float8_e4m3fn: 8, torch.float8_e5m2: 15}
"""Of the largest code: 448 = 1.75 · 2⁸, 57344 = 1.75 · 2¹⁵."""
SMALLEST_SCALE = 2.0**-126


def scale_shape(shape: tuple[int, ...], recipe: str) -> tuple[int, int]:
    """Of the scales of a matrix [M, K]: one for every block or part of one."""
    (rows, columns), (m, k) = BLOCKS[recipe], shape
    return -(-m // rows) if rows else 1, -(-k // columns) if columns else 1


def fp8_amax(x_MK: Tensor, *, recipe: str) -> Tensor:
    """Largest |x| of every block, in float32, NaN where there is one; 0 for a block of nothing."""
    (rows, columns), (m, k) = BLOCKS[recipe], x_MK.shape
    rows, columns = rows or max(m, 1), columns or max(k, 1)
    down, across = scale_shape((m, k), recipe)
    wide = F.pad(x_MK.detach().float().abs(), (0, across * columns - k, 0, down * rows - m))
    if not wide.numel():
        return wide.new_zeros(down, across)
    return wide.view(down, rows, across, columns).amax((1, 3))


def fp8_scale(amax: Tensor, *, dtype: torch.dtype, power_of_two: bool = False) -> Tensor:
    """float32 scales that bring `amax` onto the largest code, or at most there by a power of two."""
    scale = (amax / torch.finfo(dtype).max).clamp(min=SMALLEST_SCALE)
    if power_of_two:  # rounded up: where any bit of the mantissa is set, the sum carries into the exponent
        bits = (scale.view(torch.int32) + 0x7FFFFF) & 0x7F800000
        scale = bits.view(torch.float32)
    return torch.where(amax.isfinite(), scale, torch.nan)


def mx_scale(amax: Tensor, *, dtype: torch.dtype) -> Tensor:
    """E8M0 scales: the exponent of `amax` less that of the largest code, at least 2⁻¹²⁷; code 255 is NaN."""
    exponent = amax.contiguous().view(torch.int32) >> 23
    code = torch.where(exponent == 255, 255, (exponent - EXPONENTS[dtype]).clamp(min=0))
    return code.to(torch.uint8).view(torch.float8_e8m0fnu)


def scale_of(amax: Tensor, *, recipe: str, dtype: torch.dtype, power_of_two: bool) -> Tensor:
    """The recipe's scales."""
    if recipe == "mxfp8":
        return mx_scale(amax, dtype=dtype)
    return fp8_scale(amax, dtype=dtype, power_of_two=power_of_two)


def round_fp8(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes of float32 numbers: to nearest even, saturating (±inf too); NaN is code 0x7f."""
    largest = torch.finfo(dtype).max
    codes = x.clamp(-largest, largest).to(dtype).view(torch.uint8)
    return codes.masked_fill(x.isnan(), 0x7F).view(dtype)


def quantize_fp8(
    x_MK: Tensor,
    *,
    recipe: str,
    dtype: torch.dtype = torch.float8_e4m3fn,
    transpose_too: bool = False,
    scale: Tensor | None = None,
    power_of_two: bool = False,
) -> tuple[Tensor, ...]:
    """(codes [M, K], scales), and for `transpose_too` what x transposed would give, (…, codes [K, M], scales).

    Computed in float32, to which wider numbers are rounded first: code = x · (1 / scale), rounded. `scale`: given
    instead of found, as delayed scaling does; `power_of_two`: round float32 scales up to one.
    """
    x_MK = x_MK.detach()
    if scale is None:
        scale = scale_of(fp8_amax(x_MK, recipe=recipe), recipe=recipe, dtype=dtype, power_of_two=power_of_two)
        transposed = None
    else:
        transposed = scale.t()
    codes = round_fp8(x_MK.float() * _spread(1.0 / scale.float(), x_MK.shape, recipe), dtype)
    if not transpose_too:
        return codes, scale
    over = quantize_fp8(x_MK.t(), recipe=recipe, dtype=dtype, scale=transposed, power_of_two=power_of_two)
    return codes, scale, *(x.contiguous() for x in over)


def dequantize_fp8(codes_MK: Tensor, scales: Tensor, *, recipe: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """codes · scale, in float32 rounded to `dtype` or in float64."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return (codes_MK.float().to(wide) * _spread(scales.float().to(wide), codes_MK.shape, recipe)).to(dtype)


def scaled_mm(
    a_MK: Tensor,
    scale_a: Tensor,
    b_NK: Tensor,
    scale_b: Tensor,
    *,
    recipe_a: str,
    recipe_b: str,
    out_dtype: torch.dtype,
) -> Tensor:
    """a · bᵀ [M, N] of two quantised matrices, accumulated in float32, or in float64 for a float64 result."""
    wide = torch.float64 if out_dtype == torch.float64 else torch.float32
    a = dequantize_fp8(a_MK, scale_a, recipe=recipe_a, dtype=wide)
    b = dequantize_fp8(b_NK, scale_b, recipe=recipe_b, dtype=wide)
    return (a @ b.t()).to(out_dtype)


def _spread(scales: Tensor, shape: tuple[int, ...], recipe: str) -> Tensor:
    """A scale for every element."""
    for dim, size in enumerate(BLOCKS[recipe]):
        if size > 1:
            scales = scales.repeat_interleave(size, dim).narrow(dim, 0, shape[dim])
    return scales.expand(shape)
