"""Rows that travel in FP8: a byte a number in e4m3 and one for the scale of every 128, a power of two.

As DeepSeek-V3 sends tokens to experts, and back the gradients of what experts return (arXiv:2412.19437 §3.3.2). What
was packed before is packed again without a loss. Dimensions: R rows, D columns.
"""

import torch
from megalite_kernels.fp8 import dequantize_fp8, quantize_fp8
from torch import Tensor

RECIPE = "blockwise_1x128"
MANTISSA_BITS = 23


def pack(x_RD: Tensor) -> Tensor:
    """uint8 [R, D + ⌈D/128⌉]. 128 numbers of which one is inf or NaN are NaN."""
    codes, scales = quantize_fp8(x_RD.contiguous(), recipe=RECIPE, power_of_two=True)
    exponents = (scales.view(torch.int32) >> MANTISSA_BITS).to(torch.uint8)
    return torch.cat((codes.view(torch.uint8), exponents), dim=1)


def unpack(packed: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """[R, columns] of what `pack` gave."""
    codes = packed[:, :columns].contiguous().view(torch.float8_e4m3fn)
    scales = packed[:, columns:].contiguous().view(torch.float8_e8m0fnu).float()
    return dequantize_fp8(codes, scales, recipe=RECIPE, dtype=dtype)


def rounded(x_RD: Tensor) -> Tensor:
    """x as it arrives when it travels so."""
    return unpack(pack(x_RD), x_RD.shape[1], x_RD.dtype)
