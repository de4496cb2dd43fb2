"""Gated activations and rotary positions: one pass over memory each way where the CPU kernels run.

Under torch.compile the reference formulas are traced instead: Inductor fuses them with their neighbours.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megalite_kernels import native, reference


def _fast(*tensors: Tensor | None) -> bool:
    return not torch.compiler.is_compiling() and native.usable(*tensors)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up."""
    if _fast(gate, up) and gate.shape == up.shape:
        y: Tensor = _Gated.apply(gate, up, False)
        return y
    return reference.swiglu(gate, up)


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu_tanh(gate) · up."""
    if _fast(gate, up) and gate.shape == up.shape:
        y: Tensor = _Gated.apply(gate, up, True)
        return y
    return reference.geglu(gate, up)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, tanh_gelu: bool) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        ctx.tanh_gelu = tanh_gelu
        return native.gated_forward(gate, up, tanh_gelu)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        return *native.gated_backward(gate, up, grad_y.contiguous(), ctx.tanh_gelu), None


def gelu(x: Tensor) -> Tensor:
    """x · Φ(x), exact."""
    return F.gelu(x)


def gelu_tanh(x: Tensor) -> Tensor:
    """The tanh approximation of gelu."""
    return F.gelu(x, approximate="tanh")


def relu2(x: Tensor) -> Tensor:
    """max(x, 0)²."""
    return F.relu(x).square()


def apply_rope(x_BSHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half rotation of the first R dims of each head by cos, sin [S, R] or [B, S, R]; the tables get no gradient."""
    if _fast(x_BSHD) and _rows_of_tables(x_BSHD, cos, sin):
        shape = (*x_BSHD.shape[:2], cos.shape[-1])
        rows = [table.float().expand(shape).reshape(-1, shape[-1]).contiguous() for table in (cos, sin)]
        y: Tensor = _Rope.apply(x_BSHD, *rows)
        return y
    return reference.apply_rope(x_BSHD, cos, sin)


def _rows_of_tables(x_BSHD: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Constant tables on the CPU whose rows fit x's heads; what does not fit is the reference's to refuse."""
    return (
        x_BSHD.dim() == 4
        and cos.shape == sin.shape
        and cos.dim() in (2, 3)
        and cos.shape[-2] == x_BSHD.shape[1]
        and (cos.dim() == 2 or cos.shape[0] == x_BSHD.shape[0])
        and 0 < cos.shape[-1] <= x_BSHD.shape[-1]
        and cos.shape[-1] % 2 == 0
        and cos.device == sin.device == x_BSHD.device
        and not (cos.requires_grad or sin.requires_grad)
    )


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BSHD: Tensor, cos_NR: Tensor, sin_NR: Tensor) -> Tensor:
        ctx.save_for_backward(cos_NR, sin_NR)
        return native.rope(x_BSHD.contiguous(), cos_NR, sin_NR, back=False)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        cos_NR, sin_NR = ctx.saved_tensors
        return native.rope(grad_y.contiguous(), cos_NR, sin_NR, back=True), None, None
