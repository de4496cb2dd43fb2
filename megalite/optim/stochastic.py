"""Rounding to bfloat16 up or down at random, with the chance that makes the mean right (Gupta et al. 2015,
arXiv:1502.02551). Rounded to nearest instead, an update below half a step of the number would be lost every time.
"""

import hashlib

import torch
from torch import Tensor

_WORD = 2**64


def _signed(word: int) -> int:
    return (word % _WORD) - _WORD * (word % _WORD >= _WORD // 2)


def _mixed(z: Tensor, shift: int, factor: int) -> Tensor:
    """(z ⊕ z >> shift) · factor of unsigned 64-bit numbers, which torch only has as signed ones."""
    low = (z >> shift) & ((1 << (64 - shift)) - 1)
    return (z ^ low) * _signed(factor)


def random_bits(key: str, index: Tensor) -> Tensor:
    """16 random bits for each int64 `index`, int32: SplitMix64 (Steele et al. 2014) of a counter that starts where the
    digest of `key` says. They depend on key and index alone, so on no layout and on no call before."""
    start = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little", signed=True)
    z = index * _signed(0x9E3779B97F4A7C15) + start
    z = _mixed(z, 30, 0xBF58476D1CE4E5B9)
    z = _mixed(z, 27, 0x94D049BB133111EB)
    return ((z >> 48) & 0xFFFF).int()


def round_stochastically(wide: Tensor, bits: Tensor) -> Tensor:
    """float32 (wider: rounded to it first) to bfloat16, away from zero with the chance of the fraction that is cut off;
    `bits`: 16 a number. inf and NaN stay."""
    wide = wide.float()
    moved = (wide.contiguous().view(torch.int32) + bits) & -0x10000
    return torch.where(wide.isfinite(), moved.view(torch.float32), wide).bfloat16()
