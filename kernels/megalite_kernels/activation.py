"""Activations of MLPs: gated ones as one pass each way, by Triton on a GPU and in C on a CPU.

Under torch.compile on a CPU the reference formulas are traced instead: Inductor fuses them with their neighbours.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megalite_kernels import native, reference
from megalite_kernels.dispatch import choose


def swiglu(gate: Tensor, up: Tensor, *, backend: str = "auto") -> Tensor:
    """silu(gate) · up (arXiv:2002.05202). Both [..., D], of strides that may differ; the result in gate's dtype."""
    chosen = choose("swiglu", backend, gate.device.type, gate.dtype)
    if chosen == "native" and _fast(gate, up):
        y: Tensor = _Gated.apply(gate, up, False)
        return y
    return _triton("swiglu", gate, up) if chosen == "triton" else reference.swiglu(gate, up)


def geglu(gate: Tensor, up: Tensor, *, backend: str = "auto") -> Tensor:
    """gelu_tanh(gate) · up (arXiv:2002.05202); shapes as in swiglu."""
    chosen = choose("geglu", backend, gate.device.type, gate.dtype)
    if chosen == "native" and _fast(gate, up):
        y: Tensor = _Gated.apply(gate, up, True)
        return y
    return _triton("geglu", gate, up) if chosen == "triton" else reference.geglu(gate, up)


def swiglu_clamped(
    gate: Tensor, up: Tensor, *, alpha: float = 1.702, limit: float = 7.0, backend: str = "auto"
) -> Tensor:
    """g · σ(alpha · g) · (u + 1) for g = min(gate, limit), u = up within ± limit (gpt-oss, arXiv:2508.10925)."""
    if choose("swiglu_clamped", backend, gate.device.type, gate.dtype) == "triton":
        return _triton("swiglu_clamped", gate, up, alpha, limit)
    return reference.swiglu_clamped(gate, up, alpha=alpha, limit=limit)


def relu2(x: Tensor, *, backend: str = "auto") -> Tensor:
    """max(x, 0)² (arXiv:2109.08668)."""
    chosen = choose("relu2", backend, x.device.type, x.dtype)
    if chosen == "triton":
        return _triton("relu2", x, None)
    return reference.relu2(x) if backend == "reference" else F.relu(x).square()


def gelu(x: Tensor, *, backend: str = "auto") -> Tensor:
    """x · Φ(x), exact (arXiv:1606.08415)."""
    chosen = choose("gelu", backend, x.device.type, x.dtype)
    if chosen == "triton":
        return _triton("gelu", x, None)
    return reference.gelu(x) if backend == "reference" else F.gelu(x)


def gelu_tanh(x: Tensor, *, backend: str = "auto") -> Tensor:
    """The tanh approximation of gelu (GPT-2, Gemma)."""
    chosen = choose("gelu_tanh", backend, x.device.type, x.dtype)
    if chosen == "triton":
        return _triton("gelu_tanh", x, None)
    return reference.gelu_tanh(x) if backend == "reference" else F.gelu(x, approximate="tanh")


def _fast(gate: Tensor, up: Tensor) -> bool:
    return not torch.compiler.is_compiling() and native.usable(gate, up) and gate.shape == up.shape


def _triton(kind: str, gate: Tensor, up: Tensor | None, alpha: float = 0.0, limit: float = 0.0) -> Tensor:
    if up is not None and gate.shape != up.shape:
        try:
            gate, up = torch.broadcast_tensors(gate, up)
        except RuntimeError:
            raise ValueError(f"{kind}: gate {list(gate.shape)} and up {list(up.shape)} do not fit") from None
    from megalite_kernels.gpu.activation import activation

    width = gate.shape[-1] if gate.dim() else 1
    rows = [None if x is None else x.reshape(math.prod(x.shape[:-1]), width) for x in (gate, up)]
    y: Tensor = activation(*rows, kind, alpha, limit).view(gate.shape)
    return y


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
