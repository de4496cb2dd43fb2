"""Random bits that depend on names and places alone: on no layout, no call before, and a resumed run draws the same."""

import hashlib

import torch
from torch import Tensor

_WORD = 2**64
_GOLDEN = 0x9E3779B97F4A7C15


def _signed(word: int) -> int:
    return (word % _WORD) - _WORD * (word % _WORD >= _WORD // 2)


def _mixed(z: Tensor, shift: int, factor: int) -> Tensor:
    """(z ⊕ z >> shift) · factor of unsigned 64-bit numbers, which torch only has as signed ones."""
    low = (z >> shift) & ((1 << (64 - shift)) - 1)
    return (z ^ low) * _signed(factor)


def stirred(z: Tensor) -> Tensor:
    """SplitMix64's finalizer (Steele et al. 2014) of int64 numbers, up to its last shift."""
    return _mixed(_mixed(z, 30, 0xBF58476D1CE4E5B9), 27, 0x94D049BB133111EB)


def random_bits(key: str, index: Tensor) -> Tensor:
    """16 random bits for each int64 `index`, int32: SplitMix64 of a counter that starts where `key`'s digest says."""
    start = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little", signed=True)
    return ((stirred(index * _signed(_GOLDEN) + start) >> 48) & 0xFFFF).int()


def text_keys(tokens_BL: Tensor) -> Tensor:
    """A number for every token of a microbatch [B, L], drawn from all token ids of its row and its position there."""
    positions = torch.arange(1, tokens_BL.shape[1] + 1, device=tokens_BL.device)
    rows = stirred(tokens_BL.long() * _signed(_GOLDEN) + positions).sum(1, keepdim=True)
    return stirred(rows + positions)
