"""Attention that never holds more than a block of scores, and the choice between its implementations.

On the CPU a compiled kernel skips everything above the diagonal and keeps each block in cache; elsewhere, and in
float64, the same is done with PyTorch's products a block of queries at a time. On an accelerator PyTorch's own fused
kernel is used where it knows the feature. Every route sees a query's keys as an interval [low, high).
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megalite_kernels import native
from megalite_kernels.capability import compiled_kernels
from megalite_kernels.reference import accumulation_dtype

SCORES_IN_BLOCK = 1 << 22
"""Elements of the largest block of scores the PyTorch route makes at once (16 MiB in float32)."""


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
    """softmax(mask(cap(scale · q kᵀ))) v -> [B, S, H, D]; see `reference.attention`.

    documents[B, S]: document number of each position, never decreasing along a row; needs T == S.
    Raises ValueError for tensors that do not belong together.
    """
    _check(q_BSHD, k_BTKD, v_BTKD)
    queries, keys = q_BSHD.shape[1], k_BTKD.shape[1]
    if documents is not None and queries != keys:
        raise ValueError(f"attention: documents need as many queries as keys, not {queries} and {keys}")
    if documents is not None and documents.shape != q_BSHD.shape[:2]:
        raise ValueError(f"attention: documents are {list(documents.shape)}, queries {list(q_BSHD.shape[:2])}")
    plain = window is None and softcap is None and documents is None
    if q_BSHD.device.type == "cuda" and q_BSHD.dtype != torch.float64 and plain and (queries == keys or not causal):
        q, k, v = (x.transpose(1, 2) for x in (q_BSHD, k_BTKD, v_BTKD))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=True)
        return out.transpose(1, 2)
    low, high = torch.ops.megalite.visible_spans(q_BSHD, keys, causal, -1 if window is None else window, documents)
    result: Tensor = torch.ops.megalite.attention(q_BSHD, k_BTKD, v_BTKD, low, high, scale, softcap or 0.0)[0]
    return result


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    if not q.dim() == k.dim() == 4 or k.shape != v.shape or (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        shapes = ", ".join(str(list(x.shape)) for x in (q, k, v))
        raise ValueError(f"attention: needs q [B, S, H, D], k and v [B, T, K, D], not {shapes}")
    if not k.shape[2] or q.shape[2] % k.shape[2]:
        raise ValueError(f"attention: {q.shape[2]} query heads are no multiple of {k.shape[2]} key heads")
    if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        kinds = ", ".join(f"{x.dtype} ({x.device})" for x in (q, k, v))
        raise ValueError(f"attention: q, k and v need one dtype and device, not {kinds}")


@torch.library.custom_op("megalite::visible_spans", mutates_args=())
def visible_spans(
    q_BSHD: Tensor, keys: int, causal: bool, window: int, documents: Tensor | None
) -> tuple[Tensor, Tensor]:
    """int32 low, high [B, S]: query (b, s) sees the keys low ≤ t < high; both never decrease along a row."""
    batch, queries = q_BSHD.shape[:2]
    position = torch.arange(queries, device=q_BSHD.device) + (keys - queries)
    low = (position - window + 1 if window >= 0 else torch.zeros_like(position)).clamp(0, keys)
    high = (position + 1 if causal else torch.full_like(position, keys)).clamp(0, keys)
    low, high = low.expand(batch, queries), high.expand(batch, queries)
    if documents is not None:
        if bool((documents.diff(dim=1) < 0).any()):
            raise ValueError("attention: document numbers decrease along a row; give each document a later number")
        ordered = documents.contiguous()
        low = torch.maximum(low, torch.searchsorted(ordered, ordered))
        high = torch.minimum(high, torch.searchsorted(ordered, ordered, right=True))
    return low.to(torch.int32, copy=True).contiguous(), high.to(torch.int32, copy=True).contiguous()


@visible_spans.register_fake
def _(q_BSHD: Tensor, keys: int, causal: bool, window: int, documents: Tensor | None) -> tuple[Tensor, Tensor]:
    shape = q_BSHD.shape[:2]
    return q_BSHD.new_empty(shape, dtype=torch.int32), q_BSHD.new_empty(shape, dtype=torch.int32)


def _compiled(q: Tensor) -> bool:
    return q.device.type == "cpu" and q.dtype in native.DTYPES and q.numel() > 0 and compiled_kernels()


@torch.library.custom_op("megalite::attention", mutates_args=())
def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, low_BS: Tensor, high_BS: Tensor, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """(out [B, S, H, D], log-sum-exp [B, H, S]); softcap 0: none. A query that sees nothing gives 0 and 0."""
    if _compiled(q):
        return native.attention_forward(q.contiguous(), k.contiguous(), v.contiguous(), low_BS, high_BS, scale, softcap)
    out, lse = torch.empty_like(q, memory_format=torch.contiguous_format), _empty_lse(q)
    for rows, cols in _blocks(q, k, low_BS, high_BS):
        scores, _ = _scores(q, k, rows, cols, low_BS, high_BS, scale, softcap)
        block_lse = torch.logsumexp(scores, -1, keepdim=True)
        blind = block_lse == -math.inf
        probabilities = torch.exp(scores - block_lse.masked_fill(blind, 0.0))
        out[:, rows] = _ungroup(probabilities @ _key_heads(v[:, cols]), q.shape[2]).to(q.dtype)
        lse[:, :, rows] = block_lse.masked_fill(blind, 0.0).reshape(q.shape[0], q.shape[2], -1)
    return out, lse


@torch.library.custom_op("megalite::attention_backward", mutates_args=())
def attention_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor,
    low_BS: Tensor, high_BS: Tensor, scale: float, softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v; the probabilities are computed again from lse, a block at a time."""
    if _compiled(q):
        saved = (*(x.contiguous() for x in (q, k, v, out)), lse)
        return native.attention_backward(saved, grad_out.contiguous(), low_BS, high_BS, scale, softcap)
    grad_q = torch.empty_like(q, memory_format=torch.contiguous_format)
    wide = accumulation_dtype(q.dtype)
    grad_k, grad_v = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (k, v))
    for rows, cols in _blocks(q, k, low_BS, high_BS):
        scores, slope = _scores(q, k, rows, cols, low_BS, high_BS, scale, softcap)
        heads = k.shape[2]
        probabilities = torch.exp(scores - lse[:, :, rows].reshape(*scores.shape[:-1], 1))
        grad, value = _group(grad_out[:, rows], heads), _key_heads(v[:, cols])
        delta = (grad * _group(out[:, rows], heads)).sum(-1, keepdim=True)
        grad_scores = probabilities * (grad @ value.transpose(-1, -2) - delta) * slope
        grad_q[:, rows] = _ungroup(grad_scores @ _key_heads(k[:, cols]), q.shape[2]).to(q.dtype)
        grad_k[:, cols] += (grad_scores.transpose(-1, -2) @ _group(q[:, rows], heads)).transpose(1, 2)
        grad_v[:, cols] += (probabilities.transpose(-1, -2) @ grad).transpose(1, 2)
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)


def _empty_lse(q: Tensor) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=accumulation_dtype(q.dtype))


def _blocks(q: Tensor, k: Tensor, low_BS: Tensor, high_BS: Tensor) -> list[tuple[slice, slice]]:
    """Runs of queries and the keys that any of them sees."""
    size = max(1, SCORES_IN_BLOCK // max(1, q.shape[0] * q.shape[2] * k.shape[1]))
    rows = [slice(start, min(start + size, q.shape[1])) for start in range(0, q.shape[1], size)]
    spans = [(int(low_BS[:, r].min()), int(high_BS[:, r].max())) for r in rows] if low_BS.numel() else []
    return [(r, slice(low, max(low, high))) for r, (low, high) in zip(rows, spans, strict=True)]


def _group(x_BSHD: Tensor, key_heads: int) -> Tensor:
    """[B, S, H, D] -> [B, K, G·S, D], wide: a group's heads lie one after the other, so keys need no repeating."""
    batch, queries, heads, dim = x_BSHD.shape
    x = x_BSHD.to(accumulation_dtype(x_BSHD.dtype)).view(batch, queries, key_heads, heads // key_heads, dim)
    return x.permute(0, 2, 3, 1, 4).reshape(batch, key_heads, -1, dim)


def _ungroup(x_BKRD: Tensor, heads: int) -> Tensor:
    batch, dim = x_BKRD.shape[0], x_BKRD.shape[-1]
    return x_BKRD.reshape(batch, heads, -1, dim).transpose(1, 2)


def _key_heads(x_BTKD: Tensor) -> Tensor:
    return x_BTKD.to(accumulation_dtype(x_BTKD.dtype)).transpose(1, 2)


def _scores(
    q: Tensor, k: Tensor, rows: slice, cols: slice, low_BS: Tensor, high_BS: Tensor, scale: float, softcap: float
) -> tuple[Tensor, Tensor | float]:
    """Masked scores [B, K, G·S, T] of a block, and their derivative by the bare product."""
    scores = scale * (_group(q[:, rows].contiguous(), k.shape[2]) @ _key_heads(k[:, cols]).transpose(-1, -2))
    slope: Tensor | float = scale
    if softcap > 0:
        scores = torch.tanh(scores / softcap)
        slope, scores = scale * (1.0 - scores.square()), softcap * scores
    key = torch.arange(cols.start, cols.stop, device=q.device)
    seen_BST = (key >= low_BS[:, rows, None]) & (key < high_BS[:, rows, None])
    return scores.masked_fill(~seen_BST.repeat(1, q.shape[2] // k.shape[2], 1)[:, None], -math.inf), slope


@attention_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, low_BS: Tensor, high_BS: Tensor, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q, memory_format=torch.contiguous_format), _empty_lse(q)


@attention_backward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor,
    low_BS: Tensor, high_BS: Tensor, scale: float, softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dense = torch.contiguous_format
    return (
        torch.empty_like(q, memory_format=dense),
        torch.empty_like(k, memory_format=dense),
        torch.empty_like(v, memory_format=dense),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, low_BS, high_BS, ctx.scale, ctx.softcap = inputs
    ctx.save_for_backward(q, k, v, low_BS, high_BS, *output)


def _differentiate(ctx: Any, grad_out: Tensor, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, low_BS, high_BS, out, lse = ctx.saved_tensors
    grads = torch.ops.megalite.attention_backward(q, k, v, out, lse, grad_out, low_BS, high_BS, ctx.scale, ctx.softcap)
    return *grads, None, None, None, None


attention_forward.register_autograd(_differentiate, setup_context=_save)
