"""Dtypes of the specification: float64 stays, everything narrower is computed in float32."""

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays; everything narrower is computed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widen(x: Tensor) -> Tensor:
    return x.to(accumulation_dtype(x.dtype))
