"""Rounding to bfloat16 up or down at random, with the chance that makes the mean right (Gupta et al. 2015,
arXiv:1502.02551). Rounded to nearest instead, an update below half a step of the number would be lost every time.
"""

import torch
from torch import Tensor


def round_stochastically(wide: Tensor, bits: Tensor) -> Tensor:
    """float32 (wider: rounded to it first) to bfloat16, away from zero with the chance of the fraction that is cut off;
    `bits`: 16 a number. inf and NaN stay."""
    wide = wide.float()
    moved = (wide.contiguous().view(torch.int32) + bits) & -0x10000
    return torch.where(wide.isfinite(), moved.view(torch.float32), wide).bfloat16()
