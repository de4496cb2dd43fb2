"""RMSNorm and LayerNorm, with or without the residual sum before them: Triton on a GPU, C on a CPU.

Under torch.compile on a CPU the reference formulas are traced instead: Inductor fuses them with their neighbours.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megalite_kernels import native, reference
from megalite_kernels.dispatch import choose


def rms_norm(
    x: Tensor,
    weight_D: Tensor,
    eps: float,
    zero_centered: bool = False,
    *,
    residual: Tensor | None = None,
    backend: str = "auto",
) -> Any:
    """x / sqrt(mean(x²) + eps) · w over the last dim, w = weight or 1 + weight (arXiv:1910.07467).

    With `residual`, of x's shape and dtype: (norm of s, s) for s = x + residual, rounded to x's dtype.
    """
    chosen = choose("rms_norm", backend, x.device.type, x.dtype)
    if chosen == "native" and residual is None and _fast(x, weight_D) and weight_D.shape == x.shape[-1:]:
        y: Tensor = _RMSNorm.apply(x, weight_D, eps, zero_centered)
        return y
    if chosen == "triton":
        return _triton(x, residual, weight_D, None, eps, centered=False, one_plus=zero_centered)
    return reference.rms_norm(x, weight_D, eps, zero_centered, residual=residual)


def layer_norm(
    x: Tensor,
    weight_D: Tensor,
    bias_D: Tensor | None,
    eps: float,
    *,
    residual: Tensor | None = None,
    backend: str = "auto",
) -> Any:
    """(x - mean) / sqrt(var + eps) · weight + bias over the last dim (arXiv:1607.06450); `residual` as in rms_norm.

    On a CPU PyTorch's own kernel, which accumulates half precision in float32.
    """
    chosen = choose("layer_norm", backend, x.device.type, x.dtype)
    if chosen == "triton":
        return _triton(x, residual, weight_D, bias_D, eps, centered=True, one_plus=False)
    if chosen == "reference" and backend == "reference":
        return reference.layer_norm(x, weight_D, bias_D, eps, residual=residual)
    total = x if residual is None else x + residual
    y = F.layer_norm(total, x.shape[-1:], weight_D, bias_D, eps)
    return y if residual is None else (y, total)


def _fast(x: Tensor, weight_D: Tensor) -> bool:
    return not torch.compiler.is_compiling() and native.usable(x, weight_D) and weight_D.dim() == 1


def _triton(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, centered: bool, one_plus: bool
) -> Any:
    fitting = weight.shape == x.shape[-1:] and (bias is None or bias.shape == weight.shape)
    if not fitting or (residual is not None and residual.shape != x.shape):
        shapes = ", ".join(str(list(t.shape)) for t in (x, weight, bias, residual) if t is not None)
        raise ValueError(f"norm: needs x [..., D], weight [D], bias [D] and a residual like x, not {shapes}")
    if any(t is not None and t.device != x.device for t in (weight, bias, residual)):
        raise ValueError("norm: x, weight, bias and residual are on different devices")
    from megalite_kernels.gpu.norm import norm

    rows = None if residual is None else residual.reshape(-1, x.shape[-1])
    y, total, _, _ = norm(x.reshape(-1, x.shape[-1]), rows, weight, bias, eps, centered, one_plus)
    return y.view(x.shape) if residual is None else (y.view(x.shape), total.view(x.shape))


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float, zero_centered: bool) -> Tensor:
        x, weight_D = x.contiguous(), weight_D.contiguous()
        y, scale_N = native.rms_norm_forward(x, weight_D, eps, zero_centered)
        ctx.save_for_backward(x, weight_D, scale_N)
        ctx.zero_centered = zero_centered
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_D, scale_N = ctx.saved_tensors
        grads = native.rms_norm_backward(x, weight_D, scale_N, grad_y.contiguous(), ctx.zero_centered)
        return *grads, None, None
