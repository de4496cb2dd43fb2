"""Gated activations and relu²: slices of one projection, broadcast and strided inputs, saturated and clamped gates."""

from functools import partial

import torch
from torch import Tensor

from megalite_kernels.activation import geglu, gelu, gelu_tanh, relu2, swiglu, swiglu_clamped
from megalite_kernels.gpu import activation
from megalite_kernels.gpu.chips import Chip
from megalite_kernels.validate.case import Case, Far, Outputs, Sweep, Traffic, random

GATED = {"swiglu": swiglu, "geglu": geglu, "swiglu_clamped": swiglu_clamped}


def _sides(kind: str, gate_up: Tensor, *, backend: str) -> Outputs:
    """Both halves of one projection: slices, so their rows lie further apart than they are long."""
    return GATED[kind](*gate_up.chunk(2, dim=-1), backend=backend)


def _turns(kind: str, gate_up: Tensor, *, backend: str) -> Outputs:
    """Even and odd columns of one projection, as gpt-oss lays them."""
    return GATED[kind](gate_up[..., ::2], gate_up[..., 1::2], backend=backend)


def _traffic(rows: int, width: int) -> Traffic:
    """gate, up and y; then gate, up, grad y and both their gradients."""
    return Traffic(4 * rows * width * 5, 4 * rows * width * 3)


_hostile = torch.tensor([[-1e4, -100.0, -7.5, -0.0, 0.0, 7.5, 100.0, 1e4]], dtype=torch.float64)
CASES = (
    *(
        case
        for kind, op in GATED.items()
        for case in (
            Case(
                kind, "33 rows of 100", lambda: (random(33, 100, scale=4), random(33, 100, seed=1, scale=4)), op,
                traffic=_traffic(33, 100),
            ),
            Case(kind, "halves of one tensor", lambda: (random(2, 3, 74, scale=4),), partial(_sides, kind)),
            Case(kind, "even and odd columns", lambda: (random(5, 48, scale=4),), partial(_turns, kind)),
            Case(kind, "saturated gates", lambda: (_hostile, random(1, 8)), op),
        )
    ),
    Case("swiglu", "a row longer than a tile", lambda: (random(2, 5000), random(2, 5000, seed=1)), swiglu),
    Case("swiglu", "one value", lambda: (random(1), random(1, seed=1)), swiglu),
    Case("swiglu", "no rows", lambda: (random(0, 8), random(0, 8)), swiglu),
    Case("swiglu", "one up for all rows", lambda: (random(5, 8), random(8, seed=1)), swiglu),
    Case("swiglu", "transposed", lambda: (random(6, 9).T, random(9, 6, seed=1)), swiglu),
    Case("swiglu_clamped", "up beyond the limit", lambda: (random(1, 8), _hostile), swiglu_clamped),
    Case("gelu", "3 × 7 rows of 30", lambda: (random(3, 7, 30, scale=4),), gelu),
    Case("gelu", "far out and NaN", lambda: (torch.tensor([3e4, -3e4, 40.0, -40.0, float("nan")]).double(),), gelu),
    Case("gelu_tanh", "3 × 7 rows of 30", lambda: (random(3, 7, 30, scale=4),), gelu_tanh),
    Case("gelu_tanh", "far out", lambda: (torch.tensor([1e9, -1e9, 40.0, -40.0, 0.0]).double(),), gelu_tanh),
    Case("relu2", "3 × 7 rows of 30", lambda: (random(3, 7, 30, scale=4),), relu2),
    Case("relu2", "one NaN", lambda: (torch.tensor([1.0, float("nan"), -1.0], dtype=torch.float64),), relu2),
)  # fmt: skip


def _both_ways(kind: str, rows: int, width: int, dtype: torch.dtype, chip: Chip) -> None:
    gate_up, y = (torch.empty(rows, columns, dtype=dtype, device="meta") for columns in (2 * width, width))
    gate, up = gate_up.chunk(2, dim=-1)
    for left, right in ((gate, up), (y, y)):
        pair = (left, right if kind in ("swiglu", "geglu", "swiglu_clamped") else None)
        activation.forward(*pair, kind, 1.702, 7.0, chip)
        activation.backward(*pair, y, kind, 1.702, 7.0, chip)


def _sweep(kind: str, rows: int, width: int, dtype: torch.dtype = torch.bfloat16) -> Sweep:
    name = f"{rows} × {width} {str(dtype).removeprefix('torch.')}"
    sides, size = 2 if kind in ("swiglu", "geglu", "swiglu_clamped") else 1, rows * width * dtype.itemsize
    moves = Traffic(size * (2 * sides + 1), size * (sides + 1))
    return Sweep(kind, name, partial(_both_ways, kind, rows, width, dtype), moves=moves, dtype=dtype)


SWEEPS = (
    *(_sweep("swiglu", 8192, width) for width in (512, 2816, 14336)),
    _sweep("swiglu", 8192, 14336, torch.float32),
    _sweep("geglu", 8192, 16384),
    _sweep("swiglu_clamped", 8192, 2880),
    _sweep("relu2", 8192, 3072),
    _sweep("gelu", 8192, 3072),
    _sweep("gelu_tanh", 8192, 3072),
)


def _far() -> None:
    """A row of both sides past 2³¹ elements, as halves and each for itself."""
    gate_up = torch.empty((1 << 17) + 1, 2 * 8192, dtype=torch.bfloat16)
    gate, up = gate_up.chunk(2, dim=-1)
    activation.forward(gate, up, "swiglu", 0.0, 0.0)
    rows = gate_up.view(-1, 8192)
    activation.backward(rows, rows, rows, "swiglu", 0.0, 0.0)


FAR = (Far("swiglu", _far),)
