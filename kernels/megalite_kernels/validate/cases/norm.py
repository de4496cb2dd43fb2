"""RMSNorm and LayerNorm: ragged widths, one row, tiny and huge values, residuals, strided inputs."""

from functools import partial

import torch
from torch import Tensor

from megalite_kernels.gpu import norm
from megalite_kernels.gpu.chips import Chip
from megalite_kernels.norm import layer_norm, rms_norm
from megalite_kernels.validate.case import Case, Far, Sweep, Traffic, random


def _rms(x: Tensor, weight: Tensor, residual: Tensor | None = None, *, backend: str, one_plus: bool = False) -> object:
    return rms_norm(x, weight, 1e-6, one_plus, residual=residual, backend=backend)


def _layer(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None, *, backend: str) -> object:
    return layer_norm(x, weight, bias, 1e-5, residual=residual, backend=backend)


def _traffic(rows: int, width: int, centered: bool = False) -> Traffic:
    """x once each way and y, grad y, grad x once, in float32; weight once a program, its gradient once a part."""
    tile = max(1, norm.TILE // max(16, 1 << (width - 1).bit_length()))
    programs = -(-rows // tile)
    per_row = 4 * (2 if centered else 1)
    vectors = 2 if centered else 1  # weight, and bias
    loaded = 4 * rows * width * 3 + 4 * width * (programs * vectors + programs) + per_row * rows
    return Traffic(loaded, 4 * rows * width * 2 + per_row * rows + 4 * width * programs * vectors)


CASES = (
    Case("rms_norm", "33 rows of 200", lambda: (random(33, 200), random(200, seed=1)), _rms, traffic=_traffic(33, 200)),
    Case(
        "rms_norm", "heads of 64", lambda: (random(2, 5, 3, 64), random(64, seed=1)), _rms, traffic=_traffic(30, 64)
    ),
    Case(
        "rms_norm", "1 + weight", lambda: (random(7, 130), random(130, seed=1, scale=0.1)),
        lambda x, w, backend: _rms(x, w, backend=backend, one_plus=True),
    ),
    Case(
        "rms_norm", "residual", lambda: (random(9, 96), random(96, seed=1), random(9, 96, seed=2)), _rms
    ),
    Case("rms_norm", "one row of one", lambda: (random(1, 1), random(1, seed=1)), _rms),
    Case("rms_norm", "no rows", lambda: (random(0, 8), random(8, seed=1)), _rms),
    Case("rms_norm", "a row of zeros", lambda: (random(3, 40) * torch.tensor([[1.0], [0.0], [1.0]]), random(40)), _rms),
    Case("rms_norm", "values of 1e4", lambda: (random(4, 48, scale=1e4), random(48, seed=1)), _rms),
    Case("rms_norm", "strided input", lambda: (random(40, 6).T, random(40, seed=1)), _rms),
    Case(
        "layer_norm", "17 rows of 100", lambda: (random(17, 100), random(100, seed=1), random(100, seed=2)), _layer,
        traffic=_traffic(17, 100, centered=True),
    ),
    Case("layer_norm", "no bias, far from 0", lambda: (random(5, 72) + 50, random(72, seed=1), None), _layer),
    Case(
        "layer_norm", "residual",
        lambda: (random(6, 33), random(33, seed=1), random(33, seed=2), random(6, 33, seed=3)), _layer,
    ),
)  # fmt: skip


def _both_ways(rows: int, width: int, dtype: torch.dtype, centered: bool, chip: Chip) -> None:
    x, weight = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((rows, width), (width,)))
    bias = weight if centered else None
    norm.forward(x, x, weight, bias, 1e-6, centered, False, chip)
    _, _, mean, scale = norm.forward(x, None, weight, bias, 1e-6, centered, False, chip)
    norm.backward(x, weight, centered, mean, scale, x, x, False, chip)


def _sweep(op: str, rows: int, width: int, dtype: torch.dtype, spills: dict[str, int] | None = None) -> Sweep:
    name = f"{rows} × {width} {str(dtype).removeprefix('torch.')}"
    size = rows * width * dtype.itemsize
    moves = Traffic(3 * size, 2 * size)  # x twice and grad y; y and grad x
    run = partial(_both_ways, rows, width, dtype, op == "layer_norm")
    return Sweep(op, name, run, spills=spills or {}, moves=moves, dtype=dtype)


SPILLS = {"sm_80": 64, "sm_90": 68, "sm_100": 92}
"""Backward of rows of 16,384: a thread holds 32 of x, grad y and the weight's gradient, and has 128 registers."""


SWEEPS = (
    *(_sweep("rms_norm", 8192, width, torch.bfloat16) for width in (128, 768, 4096, 8192)),
    _sweep("rms_norm", 8192, 16384, torch.bfloat16, SPILLS),
    _sweep("rms_norm", 8192, 4096, torch.float32),
    *(_sweep("layer_norm", 8192, width, torch.bfloat16) for width in (1024, 4096)),
)


def _far() -> None:
    """Rows of 65,536 in bf16: the last lies past 2³¹ elements."""
    x, weight = torch.empty((1 << 15) + 9, 65_536, dtype=torch.bfloat16), torch.ones(65_536, dtype=torch.bfloat16)
    _, _, mean, scale = norm.forward(x, x, weight, weight, 1e-5, True, False)
    norm.backward(x, weight, True, mean, scale, x, x, False)


FAR = (Far("layer_norm", _far),)
