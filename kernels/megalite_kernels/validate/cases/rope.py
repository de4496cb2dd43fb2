"""Rotary positions: halves and interleaved pairs, partial heads, positions, broadcast and strided inputs."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from megalite_kernels.gpu import rope
from megalite_kernels.gpu.chips import Chip
from megalite_kernels.rope import apply_rope
from megalite_kernels.validate.case import Case, Far, Sweep, Traffic, random


def _tables(*shape: int) -> tuple[Tensor, Tensor]:
    """Not of one angle, so that every column counts; float32, as models keep them, and so without gradient."""
    return random(*shape, seed=4).float(), random(*shape, seed=5).float()


def _at(*positions: int) -> Tensor:
    return torch.tensor(positions)


def _turn(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None, *, backend: str, interleaved: bool = False
) -> Tensor:
    return apply_rope(x, cos, sin, interleaved=interleaved, positions=positions, backend=backend)


def _slice(x: Tensor, cos: Tensor, sin: Tensor, *, backend: str) -> Tensor:
    """Some heads of a projection, some dims of those, positions and batch exchanged: no stride as in a fresh tensor."""
    return apply_rope(x.transpose(0, 1)[:, :, 1:3, 2:10], cos, sin, backend=backend)


def _traffic(tokens: int, heads: int, dim: int, rotated: int, head_tiles: int = 1) -> Traffic:
    """Each way: x once, y once, and a row of both tables for every token and tile of heads."""
    moved = 4 * tokens * heads * dim * 2
    return Traffic(moved + 2 * 4 * 2 * tokens * rotated * head_tiles, moved)


_pairs = partial(_turn, interleaved=True)
CASES = (
    Case(
        "rope", "9 tokens, heads of 20, 12 turned", lambda: (random(1, 9, 5, 20), *_tables(9, 12)), _turn,
        traffic=_traffic(9, 5, 20, 12),
    ),
    Case(
        "rope", "interleaved, 12 of 20", lambda: (random(2, 3, 5, 20), *_tables(3, 12)), _pairs,
        traffic=_traffic(6, 5, 20, 12),
    ),
    Case(
        "rope", "more heads than a tile", lambda: (random(1, 2, 33, 256), *_tables(2, 256)), _turn,
        traffic=_traffic(2, 33, 256, 256, head_tiles=3),
    ),
    Case("rope", "a table a row", lambda: (random(3, 5, 2, 16), *_tables(3, 5, 16)), _turn),
    Case("rope", "one pair", lambda: (random(1, 1, 1, 2), *_tables(1, 2)), _turn),
    Case("rope", "one interleaved pair of 3 dims", lambda: (random(1, 1, 1, 3), *_tables(1, 2)), _pairs),
    Case("rope", "one row of tables for all", lambda: (random(2, 3, 2, 8), *_tables(1, 8)), _turn),
    Case("rope", "positions", lambda: (random(2, 4, 3, 8), *_tables(11, 6), _at(10, 0, 3, 3)), _turn),
    Case(
        "rope", "positions a row, interleaved",
        lambda: (random(2, 3, 2, 8), *_tables(7, 8), _at(0, 6, 2, 5, 5, 1).view(2, 3).int()), _pairs,
    ),
    Case("rope", "no tokens", lambda: (random(2, 0, 3, 8), *_tables(0, 8)), _turn),
    Case("rope", "strided input", lambda: (random(4, 2, 5, 12), *_tables(4, 8)), _slice),
    Case("rope", "strided tables", lambda: (random(2, 4, 2, 8), *(t[..., ::2] for t in _tables(4, 16))), _turn),
    Case("rope", "NaN in one head", lambda: (_with_nan(random(1, 3, 2, 8)), *_tables(3, 8)), _turn),
)  # fmt: skip


def _with_nan(x: Tensor) -> Tensor:
    x[0, 1, 1, 5] = float("nan")
    return x


def _both_ways(shape: tuple[int, ...], rotated: int, dtype: torch.dtype, chip: Chip, **how: Any) -> None:
    x, table = torch.empty(shape, dtype=dtype, device="meta"), torch.empty(131_072, rotated, device="meta")
    positions = torch.empty(shape[:2], dtype=torch.int64, device="meta")
    rows = table[: shape[1]].expand(shape[0], -1, -1)
    for back in (False, True):
        rope.rotate(x, rows, rows, None, back=back, chip=chip, **how)
        rope.rotate(x, table, table, positions, back=back, chip=chip, **how)


def _sweep(
    name: str, shape: tuple[int, ...], rotated: int, interleaved: bool = False, dtype: torch.dtype = torch.bfloat16
) -> Sweep:
    batch, length, heads, dim = shape
    moved = batch * length * heads * dim * dtype.itemsize * 2
    moves = Traffic(moved + 2 * 2 * 4 * batch * length * rotated, moved)
    run = partial(_both_ways, shape, rotated, dtype, interleaved=interleaved)
    return Sweep("rope", name, run, moves=moves, dtype=dtype)


SWEEPS = (
    _sweep("8k × 32 heads of 128", (1, 8192, 32, 128), 128),
    _sweep("8k × 8 heads of 128", (1, 8192, 8, 128), 128),
    _sweep("4k × 1 head of 256", (2, 4096, 1, 256), 256),
    _sweep("8k × 128 heads of 64, interleaved", (1, 8192, 128, 64), 64, interleaved=True),
    _sweep("2k × 12 heads of 80, 32 turned", (4, 2048, 12, 80), 32),
    _sweep("8k × 32 heads of 128 float32", (1, 8192, 32, 128), 128, dtype=torch.float32),
)


def _far() -> None:
    """A million tokens of 32 heads of 80 in bf16."""
    x, table = torch.empty(1, (1 << 20) + 3, 32, 80, dtype=torch.bfloat16), torch.empty(1, 80)
    for interleaved in (False, True):
        rope.rotate(x, *(table.expand(1, x.shape[1], 80),) * 2, None, interleaved, False)


FAR = (Far("rope", _far),)
