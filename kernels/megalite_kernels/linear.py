"""linear: PyTorch's own product, except bf16 on a CPU that cannot multiply it, where fp32 does the work.

PyTorch's bf16 product without hardware support runs one to two orders of magnitude below its fp32 product. Widening
the factors, multiplying in fp32 and rounding once gives what bf16 hardware with fp32 accumulation gives.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megalite_kernels.capability import emulate_bf16_on_cpu


def linear(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """x[..., K] · weight[N, K]ᵀ + bias[N] -> [..., N] in x's dtype."""
    if _widened(x):
        y: Tensor = _WidenedLinear.apply(x, weight_NK, bias_N)
        return y
    return F.linear(x, weight_NK, bias_N)


def weight_gradient(x: Tensor, grad_y: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient [N, K] of a linear's weight from its input [..., K] and its output's gradient [..., N]."""
    x_MK, grad_MN = x.flatten(0, -2), grad_y.flatten(0, -2)
    if _widened(x):
        x_MK, grad_MN = x_MK.float(), grad_MN.float()
    return (grad_MN.T @ x_MK).to(dtype)


def _widened(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and emulate_bf16_on_cpu()


class _WidenedLinear(torch.autograd.Function):
    """Keeps the bf16 factors for the backward pass, not their fp32 copies."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight_NK)
        ctx.bias_dtype = None if bias_N is None else bias_N.dtype
        return F.linear(x.float(), weight_NK.float(), None if bias_N is None else bias_N.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_y.float() @ weight.float()).to(x.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = weight_gradient(x, grad_y, weight.dtype)
        if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
            grad_bias = grad_y.flatten(0, -2).float().sum(0).to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias
