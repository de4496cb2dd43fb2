"""NVFP4 as its makers train with it (arXiv:2509.25149, appendix C): e2m1 codes, an e4m3 scale for each block of 16
along the last dim (or of 16x16), and a float32 scale a tensor, amax / (6 · 448), that brings those into e4m3's range.

x ≈ code · block scale · tensor scale. Codes are kept one in a byte, as they are numbered: a sign, two bits of exponent,
one of mantissa. There is no inf and no NaN: a block with either has the scale NaN, so that none of it can hide.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megalite_kernels.reference.fp8 import SMALLEST_SCALE, round_fp8
from megalite_kernels.reference.wide import accumulation_dtype

FP4_BLOCK = 16
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Of codes 0 to 7; 8 to 15 are the same below zero."""


def round_fp4(x: Tensor, bits: Tensor | None = None) -> Tensor:
    """Codes (uint8) of numbers: to nearest, of two as near the one whose mantissa is even; or, with 16 random `bits`
    (int32) a number, up with the chance of its place between its neighbours. Saturates; NaN becomes a 0."""
    values = torch.tensor(FP4_VALUES, dtype=x.dtype, device=x.device)
    size = x.abs().nan_to_num(0.0).clamp(max=FP4_VALUES[-1])
    below = torch.bucketize(size, values[1:], right=True)
    low, high = values[below], values[(below + 1).clamp(max=7)]
    place = (size - low) / (high - low).clamp(min=FP4_VALUES[1])
    if bits is None:
        up = (place > 0.5) | ((place == 0.5) & (below % 2 == 1))
    else:
        up = bits < place * 2**16
    return (below + up + 8 * x.signbit()).to(torch.uint8)


def nvfp4_amax(x_MK: Tensor, rows: int = 1) -> Tensor:
    """Largest |x| of every block of `rows` x 16, NaN where there is one."""
    m, k = x_MK.shape
    down, across = -(-m // rows), -(-k // FP4_BLOCK)
    wide = F.pad(x_MK.abs(), (0, across * FP4_BLOCK - k, 0, down * rows - m))
    return wide.view(down, rows, across, FP4_BLOCK).amax((1, 3))


def quantize_nvfp4(
    x_MK: Tensor, *, rows: int = 1, amax: Tensor | None = None, bits: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(codes [M, K] uint8, block scales [⌈M/rows⌉, ⌈K/16⌉] e4m3, tensor scale float32) of a float32 or float64 matrix.

    `rows`: of a block, 1 or 16; `amax`: of the tensor, where this is a part of it; `bits`: as of `round_fp4`. A block
    that is below the smallest scale beside its tensor becomes 0.
    """
    of_blocks = nvfp4_amax(x_MK, rows)
    largest = of_blocks.amax() if amax is None else amax.to(x_MK.dtype)
    scale = (largest / (6 * 448)).clamp(min=SMALLEST_SCALE).float()
    wide = scale.to(x_MK.dtype)
    blocks = round_fp8(torch.where(of_blocks.isfinite(), of_blocks / 6 / wide, torch.nan).float(), torch.float8_e4m3fn)
    each = _spread(blocks.float().to(x_MK.dtype) * wide, x_MK.shape, rows)
    shares = torch.where(each > 0, x_MK / each, 0.0)
    return round_fp4(shares, bits), blocks, scale


def dequantize_nvfp4(codes_MK: Tensor, blocks: Tensor, scale: Tensor, *, rows: int = 1, dtype: torch.dtype) -> Tensor:
    """code · block scale · tensor scale, computed in float32, or in float64 for that."""
    wide = accumulation_dtype(dtype)
    values = torch.tensor([*FP4_VALUES, *(-value for value in FP4_VALUES)], dtype=wide, device=codes_MK.device)
    each = _spread(blocks.float().to(wide) * scale.to(wide), codes_MK.shape, rows)
    return (values[codes_MK.int()] * each).to(dtype)


def hadamard(x: Tensor, signs_16: Tensor) -> Tensor:
    """The last dim in groups of 16, filled up with zeros, each times diag(signs) · H / 4 with the Hadamard matrix H: an
    orthogonal map, so a product of two that are mapped alike is that of the two; outliers are spread over a group."""
    matrix = torch.ones(1, 1, dtype=x.dtype, device=x.device)
    for _ in range(4):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    padded = F.pad(x, (0, -x.shape[-1] % FP4_BLOCK))
    groups = padded.view(*x.shape[:-1], -1, FP4_BLOCK)
    return (groups * signs_16.to(x.dtype) @ (matrix / 4)).view(padded.shape)


def _spread(blocks: Tensor, shape: torch.Size, rows: int) -> Tensor:
    """A number of every block at each of its elements."""
    wide = blocks.repeat_interleave(FP4_BLOCK, 1)[:, : shape[1]]
    return wide.repeat_interleave(rows, 0)[: shape[0]] if rows > 1 else wide
