"""An optimizer's moments in 8 or 16 bits: every block of a row has a float32 scale of its own.

"dynamic" and "dynamic_unsigned" are the 8-bit codes of Dettmers et al. (arXiv:2110.02861, section 1.3): numbers up to 1
in seven decades, each with twice as many steps as the one below it; the second moment, which is never negative, has its
own without a sign. "e4m3" and "fp16" are what FP8-LM keeps the first and the second in (arXiv:2310.18313). R rows, C
columns; the first of these is `skip` elements into its block.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from megalite_kernels.reference.fp8 import fp8_scale, round_fp8

MOMENT_BLOCK = 256
"""Elements of a row that share a scale."""
MOMENT_DTYPES = {
    "dynamic": torch.uint8,
    "dynamic_unsigned": torch.uint8,
    "e4m3": torch.float8_e4m3fn,
    "fp16": torch.float16,
}
DECADES = 7
SMALLEST_FP16 = 2.0**-24


@functools.cache
def dynamic_code(signed: bool) -> Tensor:
    """What the 256 codes mean, float32, ascending: 0, 1, and in the decade up to 10⁻ᵏ the middles of 2⁶⁻ᵏ equal steps
    (2⁷⁻ᵏ without a sign); of the signed ones the negatives too, so there is no -1."""
    values = [torch.tensor([0.0, 1.0], dtype=torch.float64)]
    for decade in range(DECADES):
        steps = 2 ** (DECADES - decade - signed)
        middles = 0.1 + 0.9 * (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
        values += [middles * 10.0**-decade, *([-middles * 10.0**-decade] if signed else [])]
    return torch.cat(values).sort().values.float()


def moment_amax(x_RC: Tensor, skip: int = 0) -> Tensor:
    """Largest |x| of every block, [rows, blocks]; inf where there is a NaN, so that no maximum over ranks loses it."""
    rows, columns = x_RC.shape
    blocks = -(-(skip + columns) // MOMENT_BLOCK)
    wide = F.pad(x_RC.abs(), (skip, blocks * MOMENT_BLOCK - skip - columns))
    return wide.view(rows, blocks, MOMENT_BLOCK).amax(-1).nan_to_num(torch.inf, torch.inf)


def quantize_moment(x_RC: Tensor, amax_RB: Tensor, format: str, skip: int = 0) -> tuple[Tensor, Tensor]:
    """(codes [rows, columns], scales [rows, blocks] float32), to nearest; a block with inf or NaN has the scale NaN.

    A positive number of "dynamic_unsigned" or "fp16" never becomes 0: a step divides by its root, and would then by eps
    alone.
    """
    dtype, amax = MOMENT_DTYPES[format], amax_RB.float()
    if dtype == torch.uint8:
        scale = torch.where(amax.isfinite(), amax, torch.nan)
        shares = x_RC / _spread(torch.where(amax_RB > 0, amax_RB, 1.0), x_RC, skip)
        return _nearest(shares, signed=format == "dynamic"), scale
    scale = fp8_scale(amax, dtype=dtype)
    share = x_RC / _spread(scale.to(x_RC.dtype), x_RC, skip)
    if dtype == torch.float16:
        largest = torch.finfo(dtype).max
        code = share.clamp(-largest, largest).to(dtype)
        return torch.where(share > 0, code.clamp(min=SMALLEST_FP16), code), scale
    return round_fp8(share, dtype), scale


def dequantize_moment(codes_RC: Tensor, scale_RB: Tensor, format: str, dtype: torch.dtype, skip: int = 0) -> Tensor:
    """code · scale in `dtype`, float32 or float64."""
    if codes_RC.dtype == torch.uint8:
        values = dynamic_code(format == "dynamic").to(codes_RC.device)[codes_RC.int()]
    else:
        values = codes_RC.float()
    return values.to(dtype) * _spread(scale_RB.to(dtype), codes_RC, skip)


def _nearest(shares: Tensor, signed: bool) -> Tensor:
    """Codes of the values nearest to numbers from -1 to 1; of two as near, the lower."""
    values = dynamic_code(signed).to(shares.device, shares.dtype)
    codes = torch.bucketize(shares, (values[1:] + values[:-1]) / 2)
    if not signed:
        codes = torch.where(shares > 0, codes.clamp(min=1), codes)
    return codes.to(torch.uint8)


def _spread(of_blocks_RB: Tensor, like_RC: Tensor, skip: int) -> Tensor:
    """A number of every block at each of its elements."""
    return of_blocks_RB.repeat_interleave(MOMENT_BLOCK, 1)[:, skip : skip + like_RC.shape[1]]
