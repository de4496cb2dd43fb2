"""Activations, gated ones act(gate) · up and plain ones without `up`: one pass each way, recomputed going back.

All but relu² and the exact gelu are x · σ(v(x)): swiglu with v = x; geglu and gelu_tanh with
v = 2·√(2/π)·(x + 0.044715·x³); gpt-oss' clamped swiglu with v = alpha · x. Gate and up may be slices of one tensor:
each has strides of its own.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megalite_kernels.custom_op import custom_op
from megalite_kernels.gpu.chips import Chip, chip_of
from megalite_kernels.gpu.launch import launch

KINDS = ("swiglu", "geglu", "swiglu_clamped", "relu2", "gelu", "gelu_tanh")
TILE = 4096
"""Elements of a program."""


def config(chip: Chip, width: int) -> dict[str, int]:
    """Rows of a tile, its columns, and warps: 16 elements a thread."""
    block = min(TILE, max(16, triton.next_power_of_2(width)))
    return {"ROWS": TILE // block, "BLOCK": block, "num_warps": TILE // (16 * chip.warp)}


@triton.jit
def _activate(x, alpha, KIND: tl.constexpr):
    """(act(x), its slope)."""
    if KIND == "relu2":
        x = tl.where(x < 0.0, 0.0, x)  # not maximum, which loses a NaN
        return x * x, 2.0 * x
    if KIND == "gelu":
        below = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))  # Φ(x)
        density = tl.where(tl.abs(x) > 1e4, 0.0, x * 0.3989422804014327 * tl.exp(-0.5 * x * x))  # x·φ(x), no ∞·0
        return x * below, below + density
    v, slope = x, tl.full(x.shape, 1.0, tl.float32)
    if KIND == "geglu" or KIND == "gelu_tanh":
        bounded = tl.where(x > 10.0, 10.0, tl.where(x < -10.0, -10.0, x))  # σ is 0 or 1 there; x³ could overflow
        v = 1.5957691216057308 * (x + 0.044715 * bounded * bounded * bounded)
        slope = 1.5957691216057308 * (1.0 + 3.0 * 0.044715 * bounded * bounded)
    if KIND == "swiglu_clamped":
        v, slope = alpha * x, slope * alpha
    passed = 1.0 / (1.0 + tl.exp(-v))
    return x * passed, passed * (1.0 + x * (1.0 - passed) * slope)


@triton.jit
def _places(row, column, rows, width, by_row, by_column):
    return row[:, None] * by_row + column[None, :] * by_column, (row < rows)[:, None] & (column < width)[None, :]


@triton.jit
def _forward(
    gate_ptr, up_ptr, y_ptr, rows, width, gate_row, gate_column, up_row, up_column, alpha, limit,
    KIND: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]; int64: rows · width may pass 2³¹
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place, inside = _places(row, column, rows, width, gate_row, gate_column)
    gate = tl.load(gate_ptr + place, mask=inside, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
    if KIND == "swiglu_clamped":
        gate = tl.where(gate > limit, limit, gate)
    y, _ = _activate(gate, alpha, KIND)
    if GATED:
        place, inside = _places(row, column, rows, width, up_row, up_column)
        up = tl.load(up_ptr + place, mask=inside, other=0.0).to(tl.float32)
        if KIND == "swiglu_clamped":
            up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up)) + 1.0
        y *= up
    place, inside = _places(row, column, rows, width, width, 1)
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    gate_ptr, up_ptr, grad_y_ptr, grad_gate_ptr, grad_up_ptr, rows, width,
    gate_row, gate_column, up_row, up_column, grad_row, grad_column, alpha, limit,
    KIND: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place, inside = _places(row, column, rows, width, gate_row, gate_column)
    gate = tl.load(gate_ptr + place, mask=inside, other=0.0).to(tl.float32)
    place, inside = _places(row, column, rows, width, grad_row, grad_column)
    grad_y = tl.load(grad_y_ptr + place, mask=inside, other=0.0).to(tl.float32)
    out, inside = _places(row, column, rows, width, width, 1)
    kept = gate
    if KIND == "swiglu_clamped":
        kept = tl.where(gate > limit, limit, gate)
    activated, slope = _activate(kept, alpha, KIND)
    grad_gate = grad_y * slope
    if GATED:
        place, inside = _places(row, column, rows, width, up_row, up_column)
        up = tl.load(up_ptr + place, mask=inside, other=0.0).to(tl.float32)
        grad_up = grad_y * activated
        if KIND == "swiglu_clamped":
            grad_up = tl.where((up > limit) | (up < -limit), 0.0, grad_up)
            up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up)) + 1.0
        tl.store(grad_up_ptr + out, grad_up.to(grad_up_ptr.dtype.element_ty), mask=inside)
        grad_gate *= up
    if KIND == "swiglu_clamped":
        grad_gate = tl.where(gate > limit, 0.0, grad_gate)
    tl.store(grad_gate_ptr + out, grad_gate.to(grad_gate_ptr.dtype.element_ty), mask=inside)


def forward(
    gate_ND: Tensor, up_ND: Tensor | None, kind: str, alpha: float, limit: float, chip: Chip | None = None
) -> Tensor:
    """act(gate) · up of rows with any strides."""
    rows, width = gate_ND.shape
    y = torch.empty((rows, width), dtype=gate_ND.dtype, device=gate_ND.device)
    options = config(chip or chip_of(gate_ND.device), width)
    launch(
        _forward, (triton.cdiv(rows, options["ROWS"]), triton.cdiv(width, options["BLOCK"])), gate_ND, up_ND, y,
        rows, width, *gate_ND.stride(), *_strides(up_ND), alpha, limit, KIND=kind, GATED=up_ND is not None, **options,
    )  # fmt: skip
    return y


def backward(
    gate_ND: Tensor, up_ND: Tensor | None, grad_y_ND: Tensor, kind: str, alpha: float, limit: float,
    chip: Chip | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(grad gate, grad up or nothing), contiguous."""
    rows, width = gate_ND.shape
    grad_gate = torch.empty((rows, width), dtype=gate_ND.dtype, device=gate_ND.device)
    grad_up = grad_gate.new_empty(0) if up_ND is None else torch.empty_like(grad_gate, dtype=up_ND.dtype)
    options = config(chip or chip_of(gate_ND.device), width)
    launch(
        _backward, (triton.cdiv(rows, options["ROWS"]), triton.cdiv(width, options["BLOCK"])), gate_ND, up_ND,
        grad_y_ND, grad_gate, grad_up, rows, width, *gate_ND.stride(), *_strides(up_ND), *grad_y_ND.stride(),
        alpha, limit, KIND=kind, GATED=up_ND is not None, **options,
    )  # fmt: skip
    return grad_gate, grad_up


def _strides(x: Tensor | None) -> tuple[int, ...]:
    return (0, 1) if x is None else x.stride()


@custom_op("megalite::triton_activation", mutates_args=())
def activation(gate_ND: Tensor, up_ND: Tensor | None, kind: str, alpha: float, limit: float) -> Tensor:
    """`forward`, differentiable."""
    return forward(gate_ND, up_ND, kind, alpha, limit)


@activation.register_fake
def _(gate_ND: Tensor, up_ND: Tensor | None, kind: str, alpha: float, limit: float) -> Tensor:
    return gate_ND.new_empty(gate_ND.shape)


@custom_op("megalite::triton_activation_backward", mutates_args=())
def activation_backward(
    gate_ND: Tensor, up_ND: Tensor | None, grad_y_ND: Tensor, kind: str, alpha: float, limit: float
) -> tuple[Tensor, Tensor]:
    return backward(gate_ND, up_ND, grad_y_ND, kind, alpha, limit)


@activation_backward.register_fake
def _(
    gate_ND: Tensor, up_ND: Tensor | None, grad_y_ND: Tensor, kind: str, alpha: float, limit: float
) -> tuple[Tensor, Tensor]:
    return gate_ND.new_empty(gate_ND.shape), gate_ND.new_empty(0) if up_ND is None else up_ND.new_empty(up_ND.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, *ctx.constants = inputs
    ctx.save_for_backward(gate, up)


def _differentiate(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    gate, up = ctx.saved_tensors
    grad_gate, grad_up = torch.ops.megalite.triton_activation_backward(gate, up, grad_y, *ctx.constants)
    return grad_gate, None if up is None else grad_up, None, None, None


activation.register_autograd(_differentiate, setup_context=_save)
