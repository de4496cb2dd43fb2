"""Sizes of the attention kernels' tiles, by chip, dtype and head sizes: the largest tried that compile without spills.

No GPU has timed them. What spills and what does not: `python -m megalite_kernels.validate`.
"""

from typing import Any

import torch

from megalite_kernels.gpu.attention_tiles import padded
from megalite_kernels.gpu.chips import Chip

Tiles = dict[str, dict[int, tuple[int, int, int, int]]]
"""Chip -> columns of a query and a value together, at most -> (queries, keys, warps, stages) of a tile."""

FORWARD: Tiles = {
    "sm_80": {128: (128, 64, 8, 3), 256: (128, 32, 8, 3), 384: (128, 32, 8, 2), 512: (64, 64, 8, 1)},
    "sm_90": {128: (128, 64, 4, 3), 256: (128, 64, 8, 3), 384: (128, 64, 8, 2), 512: (128, 64, 8, 2)},
    "sm_100": {128: (128, 64, 4, 3), 256: (128, 64, 8, 3), 384: (128, 64, 8, 2), 512: (128, 64, 8, 2)},
    "gfx942": {128: (128, 64, 4, 2), 256: (128, 64, 8, 1), 384: (64, 32, 4, 1), 512: (64, 32, 4, 1)},
}
KEYS: Tiles = {
    "sm_80": {128: (32, 64, 4, 2), 256: (64, 64, 8, 1), 384: (32, 32, 8, 2), 512: (32, 32, 8, 2)},
    "sm_90": {128: (64, 128, 8, 2), 256: (32, 64, 8, 2), 384: (32, 64, 8, 2), 512: (32, 32, 8, 1)},
    "sm_100": {128: (64, 64, 8, 2), 256: (64, 128, 8, 1), 384: (64, 64, 8, 1), 512: (32, 32, 8, 1)},
    "gfx942": {128: (64, 64, 4, 1), 256: (32, 64, 4, 1), 384: (32, 32, 4, 1), 512: (16, 32, 8, 1)},
}
QUERIES: Tiles = {
    "sm_80": {128: (128, 64, 8, 2), 256: (64, 64, 8, 2), 384: (64, 32, 8, 1), 512: (64, 32, 8, 1)},
    "sm_90": {128: (128, 64, 8, 2), 256: (128, 64, 8, 2), 384: (64, 32, 8, 2), 512: (64, 32, 8, 2)},
    "sm_100": {128: (128, 64, 8, 2), 256: (128, 64, 8, 2), 384: (64, 64, 8, 1), 512: (64, 32, 4, 1)},
    "gfx942": {128: (64, 64, 4, 1), 256: (64, 32, 4, 1), 384: (32, 32, 4, 1), 512: (32, 32, 4, 1)},
}


def config(chip: Chip, dtype: torch.dtype, dim: int, value_dim: int) -> dict[str, Any]:
    """Queries (M) and keys (N) of a tile of the forward pass."""
    return _tiles(FORWARD, chip, dtype, dim, value_dim)


def config_keys(chip: Chip, dtype: torch.dtype, dim: int, value_dim: int) -> dict[str, Any]:
    """The same backward where a program owns keys."""
    return _tiles(KEYS, chip, dtype, dim, value_dim)


def config_queries(chip: Chip, dtype: torch.dtype, dim: int, value_dim: int) -> dict[str, Any]:
    """The same backward where a program owns queries."""
    return _tiles(QUERIES, chip, dtype, dim, value_dim)


def _tiles(table: Tiles, chip: Chip, dtype: torch.dtype, dim: int, value_dim: int) -> dict[str, Any]:
    columns = padded(dim) + padded(value_dim)
    if dtype == torch.float32:  # multiplied element by element, from registers
        m, n, warps, stages = (32, 32, 4, 1) if columns <= 128 else (16, 32, 4, 1)
    else:
        m, n, warps, stages = next(tiles for most, tiles in table[chip.name].items() if columns <= most)
    return {"M": m, "N": n, "num_warps": warps, "num_stages": stages}
