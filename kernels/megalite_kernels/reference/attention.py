"""Attention, and who sees whom.

Shape letters: B batch, S queries, T keys, H query heads, K key heads, D size of a query and a key, E of a value.
"""

import math
from typing import Any

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
    v_BTKE: Tensor,
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    documents: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> Any:
    """softmax(mask(cap(scale · q kᵀ))) v -> [B, S, H, E]; query head h reads key head h // (H // K).

    A query that sees no key gives 0. cap(x) = softcap · tanh(x / softcap) when softcap is set. sinks [H]: one more
    logit a head, neither capped nor masked, that takes probability and has no value.

    With `return_lse` also the log-sum-exp of the logits, the sink's included: [B, H, S] in the dtype of the arithmetic,
    -inf for a query that sees neither key nor sink. Gradients flow through it.

    With `cu_seqlens_q` tensors are packed, [S, H, D], [T, K, D], [T, K, E]: document i is the queries
    cu_seqlens_q[i] ≤ s < cu_seqlens_q[i+1] and the keys cu_seqlens_k[i] ≤ t < cu_seqlens_k[i+1] (as for queries
    when None), each attended alone. Both start at 0 and end at the number of rows. The log-sum-exp is [H, S].
    """
    options: dict[str, Any] = {"scale": scale, "causal": causal, "window": window, "softcap": softcap, "sinks": sinks}
    if cu_seqlens_q is not None:
        of_q, of_k = (cu.tolist() for cu in (cu_seqlens_q, cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k))
        apart = [
            attention(
                q_BSHD[None, q0:q1], k_BTKD[None, k0:k1], v_BTKE[None, k0:k1], **options, return_lse=True
            )
            for q0, q1, k0, k1 in zip(of_q[:-1], of_q[1:], of_k[:-1], of_k[1:], strict=True)
        ]  # fmt: skip
        out_SHE, lse_HS = torch.cat([out[0] for out, _ in apart]), torch.cat([lse[0] for _, lse in apart], -1)
        return (out_SHE, lse_HS) if return_lse else out_SHE

    group = q_BSHD.shape[2] // k_BTKD.shape[2]
    q_BHSD = widen(q_BSHD).transpose(1, 2)
    k_BHTD = widen(k_BTKD).transpose(1, 2).repeat_interleave(group, dim=1)
    v_BHTE = widen(v_BTKE).transpose(1, 2).repeat_interleave(group, dim=1)
    scores = scale * (q_BHSD @ k_BHTD.transpose(-1, -2))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    seen = visible(
        scores.shape[-2], scores.shape[-1], causal=causal, window=window, documents_BS=documents, device=scores.device
    )
    scores = scores.masked_fill(~seen, -math.inf)
    blind = ~seen.any(-1, keepdim=True)
    if sinks is not None:
        sink_BHS1 = widen(sinks)[:, None, None].expand(*scores.shape[:-1], 1)
        scores, blind = torch.cat((scores, sink_BHS1), -1), torch.zeros_like(blind)
    logits = scores.masked_fill(blind, 0.0)
    probabilities = torch.softmax(logits, dim=-1)[..., : v_BHTE.shape[-2]].masked_fill(~seen, 0.0)
    out = (probabilities @ v_BHTE).transpose(1, 2).to(q_BSHD.dtype)
    if not return_lse:
        return out
    return out, torch.logsumexp(logits, dim=-1).masked_fill(blind[..., 0], -math.inf)
