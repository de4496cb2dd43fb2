"""AdamW and gradient norms over many ragged tensors, and Newton–Schulz on ragged matrices."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megalite_kernels.gpu import adamw
from megalite_kernels.gpu import newton_schulz as muon
from megalite_kernels.gpu.chips import CHIPS, Chip
from megalite_kernels.optim import adamw_step, gradient_norm, newton_schulz
from megalite_kernels.validate.case import Case, Sweep, Traffic, random

RAGGED = ((33, 7), (adamw.BLOCK + 5,), (1,), (0, 4), (64, 64))
OPTIONS = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def _adamw(
    grads: torch.dtype | None = None, moments: torch.dtype | None = None, scale: float | None = None,
    skip: bool | None = None, copy: torch.dtype | None = None,
) -> Callable[..., tuple[Tensor, ...]]:  # fmt: skip
    """Three steps from moments of zero: (weights, moments, copies and the count of steps)."""

    def call(*inputs: Tensor, backend: str) -> tuple[Tensor, ...]:
        params = [x.detach().clone() for x in inputs]
        means, squares = ([torch.zeros_like(x, dtype=moments or x.dtype) for x in params] for _ in range(2))
        step = torch.zeros((), device=params[0].device)
        copies = [torch.zeros_like(x, dtype=copy) for x in params] if copy else []
        factor = None if scale is None else torch.tensor(scale, device=step.device)
        stop = None if skip is None else torch.tensor(skip, device=step.device)
        for number in range(3):
            fresh = [(p.detach() * (number + 1) / 3 + 0.1).to(grads or p.dtype) for p in inputs]
            state = (params, fresh, means, squares, step)
            adamw_step(*state, **OPTIONS, grad_scale=factor, skip=stop, copies=copies, backend=backend)  # type: ignore[arg-type]
        return *params, *means, *squares, *copies, step

    return call


def _adamw_case(
    name: str, call: Callable[..., object], shapes: Sequence[tuple[int, ...]] = RAGGED, traffic: Traffic | None = None
) -> Case:
    inputs = lambda: [random(*shape, seed=number) for number, shape in enumerate(shapes)]  # noqa: E731
    return Case("adamw", name, inputs, call, dtypes=(torch.float32,), traffic=traffic)


def _adamw_traffic(shapes: Sequence[tuple[int, ...]], steps: int) -> Traffic:
    """Weights, gradients and moments once each, all but gradients back; and a program's entries in the tables."""
    sizes = [torch.Size(shape).numel() for shape in shapes]
    programs = sum(-(-size // adamw.BLOCK) for size in sizes)
    entries = 4 + 4 + 8 + 4 * 8 + 2 * 4  # owner, first program, size, addresses, bias corrections
    return Traffic(steps * (4 * 4 * sum(sizes) + entries * programs), steps * 3 * 4 * sum(sizes))


def _norm(*tensors: Tensor, backend: str) -> Tensor:
    return gradient_norm(tensors, backend=backend).to(tensors[0].dtype)


def _plain_norm(*tensors: Tensor) -> Tensor:
    return torch.stack([x.detach().square().sum() for x in tensors]).sum().sqrt()


def _norm_case(name: str, *tensors: Tensor, traffic: Traffic | None = None) -> Case:
    return Case("gradient_norm", name, lambda: tensors, _norm, plain=_plain_norm, traffic=traffic)


def _norm_traffic(tensors: Sequence[Tensor]) -> Traffic:
    programs = sum(-(-x.numel() // adamw.BLOCK) for x in tensors)
    return Traffic(4 * sum(x.numel() for x in tensors) + (4 + 4 + 8 + 8) * programs, 4 * programs)


def _orthogonal(steps: int = 2) -> Callable[..., Tensor]:
    return lambda x, backend: newton_schulz(x, steps, backend=backend)


def _plain_orthogonal(steps: int = 2) -> Callable[..., Tensor]:
    return lambda x: newton_schulz(x, steps, backend="torch")


def _muon_case(name: str, x: Tensor, steps: int = 2, traffic: Traffic | None = None) -> Case:
    return Case(
        "newton_schulz", name, lambda: (x,), _orthogonal(steps), plain=_plain_orthogonal(steps), traffic=traffic
    )


def _muon_traffic(rows: int, columns: int) -> Traffic:
    """One step: tiles on and above the diagonal of two symmetric products, then all tiles of the last."""
    options = muon.config(CHIPS["sm_80"], torch.float32)
    tile, block = options["TILE"], options["BLOCK_K"]
    down, across = -(-rows // tile), -(-columns // tile)
    upper = down * (down + 1) // 2
    held = [min(tile, rows - i * tile) for i in range(down)]
    pairs = sum(held[i] + held[j] for i in range(down) for j in range(i, down))
    upper_elements = sum(held[i] * held[j] for i in range(down) for j in range(i, down))
    loaded = (
        pairs * columns + pairs * rows + upper_elements + across * rows * rows + down * rows * columns + rows * columns
    )
    wide, narrow = -(-columns // block) * block, -(-rows // block) * block
    flops = 2 * tile * tile * (upper * (wide + narrow) + down * across * narrow)
    return Traffic(4 * loaded, 4 * (2 * rows * rows + rows * columns), flops)


TWO = ((adamw.BLOCK + 16,), (32, 5))
NORMED = (random(33, 7), random(adamw.BLOCK + 5, seed=1), random(1, seed=2))
BROKEN = random(40, 3) * torch.where(torch.arange(3) == 1, float("inf"), 1.0)
CASES = (
    _adamw_case("ragged tensors", _adamw()),
    _adamw_case("bf16 gradients and copies, a factor", _adamw(torch.bfloat16, scale=0.25, copy=torch.bfloat16)),
    _adamw_case("bf16 moments", _adamw(moments=torch.bfloat16)),
    _adamw_case("fp16 copies, told to go on", _adamw(skip=False, copy=torch.float16)),
    _adamw_case("skipped", _adamw(skip=True, scale=float("nan"))),
    _adamw_case("an infinite factor", _adamw(scale=float("inf"))),
    _adamw_case("one number", _adamw(), ((1,),)),
    _adamw_case("two tensors", _adamw(), TWO, _adamw_traffic(TWO, 3)),
    _norm_case("ragged tensors", *NORMED, traffic=_norm_traffic(NORMED)),
    _norm_case("an empty one", random(5), random(0, 3)),
    _norm_case("zeros", torch.zeros(7, 3, dtype=torch.float64)),
    _norm_case("inf", BROKEN),
    _norm_case("NaN", random(9), random(4) * float("nan")),
    _norm_case("strided", random(40, 9).T),
    _muon_case("wide 40 × 100", random(40, 100)),
    _muon_case("tall 130 × 70", random(130, 70)),
    _muon_case("a stack of three 17 × 33", random(3, 17, 33)),
    _muon_case("a row", random(1, 50)),
    _muon_case("of rank one", random(20, 1) * random(1, 30, seed=1)),
    _muon_case("zeros", torch.zeros(20, 30, dtype=torch.float64)),
    _muon_case("no steps", random(5, 6), steps=0),
    _muon_case("one step, 70 × 130", random(70, 130), steps=1, traffic=_muon_traffic(70, 130)),
)  # fmt: skip


def _adamw_launches(grads: torch.dtype, copies: bool, chip: Chip) -> None:
    params = [torch.empty(shape, device="meta") for shape in ((4096, 4096), (4096, 14336), (4096,))]
    some = [x.to(grads) for x in params]
    low = [x.to(torch.bfloat16) for x in params] if copies else []
    one = params[0].new_empty(())
    adamw.step(params, some, params, params, low, one, 1e-3, 0.9, 0.95, 1e-8, 0.1, one, one, chip)


def _norm_launches(dtype: torch.dtype, chip: Chip) -> None:
    adamw.norm([torch.empty(shape, device="meta", dtype=dtype) for shape in ((4096, 4096), (4096,))], chip)


def _muon_launches(rows: int, columns: int, dtype: torch.dtype, chip: Chip) -> None:
    muon.step(torch.empty((4, rows, columns), device="meta", dtype=dtype), (3.4445, -4.7750, 2.0315), chip)


def _muon_sweep(rows: int, columns: int, dtype: torch.dtype) -> Sweep:
    name = f"a step on 4 × {rows} × {columns} {str(dtype).removeprefix('torch.')}"
    least = rows * rows * (rows + columns) + 2 * rows * rows * columns  # symmetric products are half as much
    moves = Traffic(dtype.itemsize * 4 * rows * columns, dtype.itemsize * 4 * rows * columns, 4 * least)
    run = lambda chip: _muon_launches(rows, columns, dtype, chip)  # noqa: E731
    return Sweep("newton_schulz", name, run, products=dtype != torch.float32, moves=moves, dtype=dtype)


ELEMENTS = 4096 * (4096 + 14336 + 1)
SWEEPS = (
    Sweep("adamw", "75M weights, float32 gradients", lambda chip: _adamw_launches(torch.float32, False, chip),
          moves=Traffic(16 * ELEMENTS, 12 * ELEMENTS), dtype=torch.float32),
    Sweep("adamw", "75M weights, bf16 gradients and copies", lambda chip: _adamw_launches(torch.bfloat16, True, chip),
          moves=Traffic(14 * ELEMENTS, 14 * ELEMENTS), dtype=torch.float32),
    Sweep("gradient_norm", "17M float32", lambda chip: _norm_launches(torch.float32, chip)),
    Sweep("gradient_norm", "17M bf16", lambda chip: _norm_launches(torch.bfloat16, chip)),
    _muon_sweep(1024, 4096, torch.bfloat16),
    _muon_sweep(4096, 14336, torch.bfloat16),
    _muon_sweep(1024, 4096, torch.float32),
)  # fmt: skip
