"""Attention, and who sees whom.

Shape letters: B batch, S queries, T keys, H query heads, K key heads, D head size.
"""

import math

import torch
from torch import Tensor

from megalite_kernels.reference.wide import widen


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
    q_BHSD = widen(q_BSHD).transpose(1, 2)
    k_BHTD = widen(k_BTKD).transpose(1, 2).repeat_interleave(group, dim=1)
    v_BHTD = widen(v_BTKD).transpose(1, 2).repeat_interleave(group, dim=1)
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
