"""Linear, embedding, norms, activations, rotary positions.

Shape letters: B batch, S queries, H heads, D head size or width, R rotated dims, N rows out, K columns, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megalite_kernels.reference.wide import widen


def linear(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """x[..., K] · weight[N, K]ᵀ + bias[N] -> [..., N]."""
    y = F.linear(widen(x), widen(weight_NK), None if bias_N is None else widen(bias_N))
    return y.to(x.dtype)


def embedding(tokens: Tensor, weight_VD: Tensor) -> Tensor:
    """Rows of weight[V, D] picked by integers [...] -> [..., D]."""
    return F.embedding(tokens, widen(weight_VD)).to(weight_VD.dtype)


def rms_norm(
    x: Tensor, weight_D: Tensor, eps: float, zero_centered: bool = False, *, residual: Tensor | None = None
) -> Any:
    """x / sqrt(mean(x²) + eps) · w over the last dim; w is 1 + weight when zero_centered (arXiv:1910.07467).

    With a residual: (norm of s, s) for s = x + residual, rounded to x's dtype before it is normed.
    """
    total = x if residual is None else (widen(x) + widen(residual)).to(x.dtype)
    wide, weight = widen(total), widen(weight_D)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    y = (wide * scale * (1.0 + weight if zero_centered else weight)).to(x.dtype)
    return y if residual is None else (y, total)


def layer_norm(
    x: Tensor, weight_D: Tensor, bias_D: Tensor | None, eps: float, *, residual: Tensor | None = None
) -> Any:
    """(x - mean) / sqrt(var + eps) · weight + bias over the last dim, biased variance (arXiv:1607.06450)."""
    total = x if residual is None else (widen(x) + widen(residual)).to(x.dtype)
    bias = None if bias_D is None else widen(bias_D)
    y = F.layer_norm(widen(total), x.shape[-1:], widen(weight_D), bias, eps).to(x.dtype)
    return y if residual is None else (y, total)


def apply_rope(
    x_BSHD: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, positions: Tensor | None = None
) -> Tensor:
    """Each pair of the first R dims of a head turned by its angle; the others pass (arXiv:2104.09864).

    cos and sin are [S, R] or [B, S, R], or [P, R] with `positions` [S] or [B, S] picking their rows. Columns i and
    i + R/2 belong to pair i: dims i and i + R/2, or 2i and 2i + 1 when interleaved. R is even.
    """
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    rotated_dims = cos.shape[-1]
    if rotated_dims % 2 or rotated_dims > x_BSHD.shape[-1]:
        raise ValueError(f"rope: {rotated_dims} rotated dims are odd or more than a head's {x_BSHD.shape[-1]}")
    wide = widen(x_BSHD)
    head, rest = wide[..., :rotated_dims], wide[..., rotated_dims:]
    if interleaved:
        head = head.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    first, second = head.chunk(2, dim=-1)
    cos, sin = cos.to(wide.dtype).unsqueeze(-2), sin.to(wide.dtype).unsqueeze(-2)
    turned = head * cos + torch.cat((-second, first), dim=-1) * sin
    if interleaved:
        turned = turned.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
    return torch.cat((turned, rest), dim=-1).to(x_BSHD.dtype)


def gelu(x: Tensor) -> Tensor:
    """x · Φ(x), exact (arXiv:1606.08415)."""
    return F.gelu(widen(x)).to(x.dtype)


def gelu_tanh(x: Tensor) -> Tensor:
    """The tanh approximation of gelu (GPT-2, Gemma)."""
    return F.gelu(widen(x), approximate="tanh").to(x.dtype)


def relu2(x: Tensor) -> Tensor:
    """max(x, 0)² (arXiv:2109.08668)."""
    return F.relu(widen(x)).square().to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up (arXiv:2002.05202)."""
    return (F.silu(widen(gate)) * widen(up)).to(gate.dtype)


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu_tanh(gate) · up (arXiv:2002.05202)."""
    return (F.gelu(widen(gate), approximate="tanh") * widen(up)).to(gate.dtype)


def swiglu_clamped(gate: Tensor, up: Tensor, *, alpha: float = 1.702, limit: float = 7.0) -> Tensor:
    """g · σ(alpha · g) · (u + 1) for g = min(gate, limit), u = up within ± limit (gpt-oss, arXiv:2508.10925)."""
    g, u = widen(gate).clamp(max=limit), widen(up).clamp(-limit, limit)
    return (g * torch.sigmoid(alpha * g) * (u + 1.0)).to(gate.dtype)
