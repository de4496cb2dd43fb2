"""The specification of every op, in plain PyTorch and any float dtype; float64 runs in float64 all the way.

Nothing here is tuned. Half precision is computed in float32 and rounded once at the end. Every faster
implementation in this package is tested against these functions in float64.

Shape letters: B batch, S queries, T keys, H query heads, K key heads, D head size or width, R rotated dims,
N rows, V vocabulary.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays; everything narrower is computed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _wide(x: Tensor) -> Tensor:
    return x.to(accumulation_dtype(x.dtype))


def linear(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """x[..., K] · weight[N, K]ᵀ + bias[N] -> [..., N]."""
    y = F.linear(_wide(x), _wide(weight_NK), None if bias_N is None else _wide(bias_N))
    return y.to(x.dtype)


def embedding(tokens: Tensor, weight_VD: Tensor) -> Tensor:
    """Rows of weight[V, D] picked by integers [...] -> [..., D]."""
    return F.embedding(tokens, _wide(weight_VD)).to(weight_VD.dtype)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float, zero_centered: bool = False) -> Tensor:
    """x / sqrt(mean(x²) + eps) · w over the last dim; w is 1 + weight when zero_centered (arXiv:1910.07467)."""
    wide, weight = _wide(x), _wide(weight_D)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * (1.0 + weight if zero_centered else weight)).to(x.dtype)


def layer_norm(x: Tensor, weight_D: Tensor, bias_D: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) · weight + bias over the last dim, biased variance (arXiv:1607.06450)."""
    bias = None if bias_D is None else _wide(bias_D)
    return F.layer_norm(_wide(x), x.shape[-1:], _wide(weight_D), bias, eps).to(x.dtype)


def apply_rope(x_BSHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions, half rotation, on the first R dims of each head; the others pass (arXiv:2104.09864).

    cos and sin are [S, R] or [B, S, R], already gathered by position, both halves written out. R is even.
    """
    rotated_dims = cos.shape[-1]
    if rotated_dims % 2 or rotated_dims > x_BSHD.shape[-1]:
        raise ValueError(f"rope: {rotated_dims} rotated dims are odd or more than a head's {x_BSHD.shape[-1]}")
    wide = _wide(x_BSHD)
    head, rest = wide[..., :rotated_dims], wide[..., rotated_dims:]
    first, second = head.chunk(2, dim=-1)
    cos, sin = cos.to(wide.dtype).unsqueeze(-2), sin.to(wide.dtype).unsqueeze(-2)
    turned = head * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned, rest), dim=-1).to(x_BSHD.dtype)


def visible(
    queries: int,
    keys: int,
    *,
    causal: bool,
    window: int | None = None,
    documents_BS: Tensor | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Boolean [S, T] or [B, 1, S, T]: True where a query sees a key.

    Query i stands at position i + T - S (bottom-right alignment). A window of w shows the w latest positions,
    the query's own included. documents[B, S] (T == S) restricts a query to keys of its own document.
    """
    position = torch.arange(queries, device=device)[:, None] + (keys - queries)
    key = torch.arange(keys, device=device)[None, :]
    seen = torch.ones(queries, keys, dtype=torch.bool, device=device)
    if causal:
        seen &= key <= position
    if window is not None:
        seen &= key > position - window
    if documents_BS is not None:
        return seen & (documents_BS[:, None, :, None] == documents_BS[:, None, None, :])
    return seen


def attention(
    q_BSHD: Tensor,
    k_BTKD: Tensor,
    v_BTKD: Tensor,
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    documents: Tensor | None = None,
) -> Tensor:
    """softmax(mask(cap(scale · q kᵀ))) v -> [B, S, H, D]; query head h reads key head h // (H // K).

    A query that sees no key gives 0. cap(x) = softcap · tanh(x / softcap) when softcap is set.
    """
    group = q_BSHD.shape[2] // k_BTKD.shape[2]
    q_BHSD = _wide(q_BSHD).transpose(1, 2)
    k_BHTD = _wide(k_BTKD).transpose(1, 2).repeat_interleave(group, dim=1)
    v_BHTD = _wide(v_BTKD).transpose(1, 2).repeat_interleave(group, dim=1)
    scores = scale * (q_BHSD @ k_BHTD.transpose(-1, -2))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    seen = visible(
        scores.shape[-2], scores.shape[-1], causal=causal, window=window, documents_BS=documents, device=scores.device
    )
    scores = scores.masked_fill(~seen, -math.inf)
    blind = ~seen.any(-1, keepdim=True)
    probabilities = torch.softmax(scores.masked_fill(blind, 0.0), dim=-1).masked_fill(blind, 0.0)
    return (probabilities @ v_BHTD).transpose(1, 2).to(q_BSHD.dtype)


def gelu(x: Tensor) -> Tensor:
    """x · Φ(x), exact (arXiv:1606.08415)."""
    return F.gelu(_wide(x)).to(x.dtype)


def gelu_tanh(x: Tensor) -> Tensor:
    """The tanh approximation of gelu (GPT-2, Gemma)."""
    return F.gelu(_wide(x), approximate="tanh").to(x.dtype)


def relu2(x: Tensor) -> Tensor:
    """max(x, 0)² (arXiv:2109.08668)."""
    return F.relu(_wide(x)).square().to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up (arXiv:2002.05202)."""
    return (F.silu(_wide(gate)) * _wide(up)).to(gate.dtype)


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu_tanh(gate) · up (arXiv:2002.05202)."""
    return (F.gelu(_wide(gate), approximate="tanh") * _wide(up)).to(gate.dtype)


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    z_loss: float = 0.0,
    softcap: float | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> tuple[Tensor, Tensor]:
    """(nll_sum, z_sum) over rows whose target is not ignore_index; float32, or float64 for float64 input.

    nll = logsumexp(logits) - logits[target]; z = logsumexp(logits)² (arXiv:2204.02311). Never divided. `z_loss`
    changes neither value: it is the weight the caller gives z_sum in its loss, which faster versions need early.
    """
    logits = _wide(hidden_ND) @ _wide(weight_VD).T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    counted = targets_N != ignore_index
    lse = torch.logsumexp(logits, dim=-1)
    chosen = logits.gather(-1, torch.where(counted, targets_N, 0)[:, None])[:, 0]
    zero = torch.zeros((), dtype=lse.dtype, device=lse.device)
    return torch.where(counted, lse - chosen, zero).sum(), torch.where(counted, lse.square(), zero).sum()
