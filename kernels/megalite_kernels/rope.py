"""Rotary positions: Triton on a GPU, C on a CPU, one pass over memory each way.

Under torch.compile on a CPU the reference formula is traced instead: Inductor fuses it with its neighbours.
"""

from typing import Any

import torch
from torch import Tensor

from megalite_kernels import native, reference
from megalite_kernels.dispatch import choose


def apply_rope(
    x_BSHD: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    positions: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Each pair of the first R dims of a head turned by its angle, the other dims as they are (arXiv:2104.09864).

    cos and sin [S, R] or [B, S, R] hold a row a token, or with `positions` (integers [S] or [B, S]) are tables [P, R]
    of which each token takes the row at its position. Column i and column i + R/2 belong to pair i, which is dims
    i and i + R/2, or when `interleaved` 2i and 2i + 1. The tables get a gradient from the reference alone.

    Raises ValueError for an odd R, one wider than a head, and positions outside the table. A GPU's positions are not
    looked at, which would stall it: there such a token's rotated dims become NaN.
    """
    features = (
        ("interleaved", interleaved),
        ("table gradients", torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad)),
    )
    chosen = choose("rope", backend, x_BSHD.device.type, x_BSHD.dtype, features)
    if positions is not None:
        _check_positions(positions, cos, sin)
    if chosen == "triton":
        return _triton(x_BSHD, cos, sin, interleaved, positions)
    if chosen == "native" and not torch.compiler.is_compiling() and native.usable(x_BSHD):
        if positions is not None:
            cos, sin, positions = cos[positions], sin[positions], None
        if _rows_of_tables(x_BSHD, cos, sin):
            shape = (*x_BSHD.shape[:2], cos.shape[-1])
            rows = [table.float().expand(shape).reshape(-1, shape[-1]).contiguous() for table in (cos, sin)]
            y: Tensor = _Rope.apply(x_BSHD, *rows)
            return y
    return reference.apply_rope(x_BSHD, cos, sin, interleaved=interleaved, positions=positions)


def _check_positions(positions: Tensor, cos: Tensor, sin: Tensor) -> None:
    if cos.dim() != 2 or cos.shape != sin.shape or positions.dim() not in (1, 2) or positions.is_floating_point():
        shapes = ", ".join(str(list(t.shape)) for t in (cos, sin, positions))
        raise ValueError(f"rope: integer positions [S] or [B, S] pick rows of tables [P, R], not {shapes}")
    # Values are read only where they lie in this processor's memory, and really lie there.
    if positions.device.type != "cpu" or torch.compiler.is_compiling() or type(positions) is not Tensor:
        return
    wrong = (positions < 0) | (positions >= cos.shape[0])
    if bool(wrong.any()):
        raise ValueError(f"rope: position {positions[wrong][0].item()} is outside the table's 0 … {cos.shape[0] - 1}")


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
    )


def _triton(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, positions: Tensor | None) -> Tensor:
    rotated = cos.shape[-1]
    fits = x.dim() == 4 and cos.shape == sin.shape and 0 < rotated <= x.shape[-1] and rotated % 2 == 0
    try:
        if positions is None:
            cos, sin = (table.expand(*x.shape[:2], rotated) for table in (cos, sin))
        else:
            positions = positions.expand(x.shape[:2])
    except RuntimeError:
        fits = False
    if not fits:
        shapes = ", ".join(str(list(t.shape)) for t in (x, cos, sin, positions) if t is not None)
        raise ValueError(f"rope: needs x [B, S, H, D], tables [B, S, R] or positions, R even and ≤ D, not {shapes}")
    from megalite_kernels.gpu.rope import rope

    y: Tensor = rope(x, cos, sin, positions, interleaved, False)
    return y


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BSHD: Tensor, cos_NR: Tensor, sin_NR: Tensor) -> Tensor:
        ctx.save_for_backward(cos_NR, sin_NR)
        return native.rope(x_BSHD.contiguous(), cos_NR, sin_NR, back=False)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        cos_NR, sin_NR = ctx.saved_tensors
        return native.rope(grad_y.contiguous(), cos_NR, sin_NR, back=True), None, None
