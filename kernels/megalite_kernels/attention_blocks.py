"""Attention over intervals of keys: the ops that any mask comes down to, and a route of PyTorch's own products.

A query sees an interval of keys [low, high), whatever the mask; both ends never fall along a row. The op
`megalite::attention` takes such intervals: on a GPU the Triton kernels do, on a CPU the kernels in C, and for what
these cannot take (float64, other devices) PyTorch multiplies a block of queries at a time and holds no more scores.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megalite_kernels import native
from megalite_kernels.attention_choice import choose_for_spans
from megalite_kernels.custom_op import custom_op
from megalite_kernels.reference import accumulation_dtype

LN2 = math.log(2.0)
"""The Triton kernels keep log-sum-exps in base 2."""
SCORES_IN_BLOCK = 1 << 22
"""Elements of the largest block of scores the PyTorch route makes at once (16 MiB in float32)."""


@custom_op("megalite::visible_spans", mutates_args=())
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
        _demand((documents.diff(dim=1) >= 0).all(), "document numbers decrease along a row; give each a later number")
        ordered = documents.contiguous()
        low = torch.maximum(low, torch.searchsorted(ordered, ordered))
        high = torch.minimum(high, torch.searchsorted(ordered, ordered, right=True))
    return low.to(torch.int32, copy=True).contiguous(), high.to(torch.int32, copy=True).contiguous()


@visible_spans.register_fake
def _(q_BSHD: Tensor, keys: int, causal: bool, window: int, documents: Tensor | None) -> tuple[Tensor, Tensor]:
    shape = q_BSHD.shape[:2]
    return q_BSHD.new_empty(shape, dtype=torch.int32), q_BSHD.new_empty(shape, dtype=torch.int32)


@custom_op("megalite::packed_spans", mutates_args=())
def packed_spans(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, queries: int, keys: int, causal: bool, window: int
) -> tuple[Tensor, Tensor]:
    """The same [1, S] for documents laid end to end, each with its own alignment; see `reference.attention`."""
    of_q, of_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    for cu, rows in ((of_q, queries), (of_k, keys)):
        rising = (cu[0] == 0) & (cu[-1] == rows) & (cu.diff() >= 0).all()
        _demand(rising, "cu_seqlens do not rise from 0 to the number of rows")
    row = torch.arange(queries, device=of_q.device)
    document = torch.searchsorted(of_q, row, right=True) - 1
    first, last = of_k[document], of_k[document + 1]
    position = row - of_q[document] + (last - first) - (of_q[document + 1] - of_q[document])
    low = first if window < 0 else first + torch.minimum((position - window + 1).clamp(min=0), last - first)
    high = first + torch.minimum((position + 1).clamp(min=0), last - first) if causal else last
    return low.to(torch.int32, copy=True)[None], high.to(torch.int32, copy=True)[None]


@packed_spans.register_fake
def _(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, queries: int, keys: int, causal: bool, window: int
) -> tuple[Tensor, Tensor]:
    shape = (1, queries)
    return cu_seqlens_q.new_empty(shape, dtype=torch.int32), cu_seqlens_q.new_empty(shape, dtype=torch.int32)


def _demand(holds: Tensor, what: str) -> None:
    """ValueError on a CPU; a GPU, which must not be waited for, stops by itself."""
    if holds.device.type == "cpu":
        if not bool(holds):
            raise ValueError(f"attention: {what}")
    else:
        torch._assert_async(holds, f"attention: {what}")


@custom_op("megalite::attention", mutates_args=())
def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, low_BS: Tensor, high_BS: Tensor, scale: float, softcap: float, route: str = "auto"
) -> tuple[Tensor, Tensor]:
    """(out [B, S, H, E], log-sum-exp [B, H, S]); softcap 0: none. A query that sees nothing gives 0 and -inf.

    `route`: triton, native or blocks; auto takes the first of them that can."""
    taken = _route(q, v, route)
    if taken == "triton":
        from megalite_kernels.gpu.attention import Mask, forward

        mask = Mask(0, 0, low_BS, high_BS)
        out, lse = forward(q.contiguous(), k.contiguous(), v.contiguous(), None, mask, scale, softcap)
        return out, lse * LN2
    if taken == "native":
        same_q, same_k, same_v = _one_width(q, k, v)
        out, lse = native.attention_forward(same_q, same_k, same_v, low_BS, high_BS, scale, softcap)
        return _cut(out, v), lse
    out, lse = q.new_empty((*q.shape[:3], v.shape[3])), _empty_lse(q)
    for rows, cols in _blocks(q, k, low_BS, high_BS):
        scores, _ = _scores(q, k, rows, cols, low_BS, high_BS, scale, softcap)
        block_lse = torch.logsumexp(scores, -1, keepdim=True)
        probabilities = torch.exp(scores - block_lse.masked_fill(block_lse == -math.inf, 0.0))
        out[:, rows] = _ungroup(probabilities @ _key_heads(v[:, cols]), q.shape[2]).to(q.dtype)
        lse[:, :, rows] = block_lse.reshape(q.shape[0], q.shape[2], -1)
    return out, lse


@custom_op("megalite::attention_backward", mutates_args=())
def attention_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor, low_BS: Tensor, high_BS: Tensor,
    scale: float, softcap: float, grad_lse: Tensor | None = None, route: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v; the probabilities are computed again from lse, a block at a time."""
    taken = _route(q, v, route)
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    if taken == "triton":
        from megalite_kernels.gpu.attention import Mask, backward

        mask = Mask(0, 0, low_BS, high_BS)
        return backward(
            q.contiguous(), k.contiguous(), v.contiguous(), None, out.contiguous(), lse.contiguous() / LN2,
            grad_out.contiguous(), None if grad_lse is None else grad_lse * LN2, mask, scale, softcap,
        )[:3]  # fmt: skip
    if taken == "native":
        *same, same_out, same_grad = _one_width(q, k, v, out, grad_out)
        grads = native.attention_backward((*same, same_out, lse), same_grad, grad_lse, low_BS, high_BS, scale, softcap)
        return _cut(grads[0], q), _cut(grads[1], k), _cut(grads[2], v)
    grad_q = torch.empty_like(q, memory_format=torch.contiguous_format)
    wide = accumulation_dtype(q.dtype)
    grad_k, grad_v = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (k, v))
    for rows, cols in _blocks(q, k, low_BS, high_BS):
        scores, slope = _scores(q, k, rows, cols, low_BS, high_BS, scale, softcap)
        heads = k.shape[2]
        row_lse = lse[:, :, rows].reshape(*scores.shape[:-1], 1)
        probabilities = torch.exp(scores - row_lse.masked_fill(row_lse == -math.inf, 0.0))
        grad, value = _group(grad_out[:, rows], heads), _key_heads(v[:, cols])
        delta = (grad * _group(out[:, rows], heads)).sum(-1, keepdim=True)
        if grad_lse is not None:
            delta -= grad_lse[:, :, rows].reshape(delta.shape)
        grad_scores = probabilities * (grad @ value.transpose(-1, -2) - delta) * slope
        grad_q[:, rows] = _ungroup(grad_scores @ _key_heads(k[:, cols]), q.shape[2]).to(q.dtype)
        grad_k[:, cols] += (grad_scores.transpose(-1, -2) @ _group(q[:, rows], heads)).transpose(1, 2)
        grad_v[:, cols] += (probabilities.transpose(-1, -2) @ grad).transpose(1, 2)
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)


def add_sinks(out_BSHE: Tensor, lse_BHS: Tensor, sinks_H: Tensor) -> tuple[Tensor, Tensor]:
    """What (out, log-sum-exp) become where one more logit a head takes probability and has no value."""
    total = torch.logaddexp(lse_BHS, sinks_H.to(lse_BHS.dtype)[:, None])
    left_BSH1 = torch.exp(lse_BHS - total).transpose(1, 2).unsqueeze(-1)
    return (out_BSHE * left_BSH1).to(out_BSHE.dtype), total


def _route(q: Tensor, v: Tensor, route: str) -> str:
    if q.numel() == 0 or v.numel() == 0:
        return "blocks"  # nothing to compute
    return choose_for_spans(q.device.type, q.dtype, q.shape[3], v.shape[3]) if route == "auto" else route


def _one_width(q: Tensor, k: Tensor, v: Tensor, *like_v: Tensor) -> list[Tensor]:
    """Contiguous, with zeros after the shorter of the two head sizes: the C kernels have one."""
    widest = max(q.shape[3], v.shape[3])
    return [F.pad(x, (0, widest - x.shape[3])).contiguous() for x in (q, k, v, *like_v)]


def _cut(x: Tensor, like: Tensor) -> Tensor:
    return x if x.shape[3] == like.shape[3] else x[..., : like.shape[3]].contiguous()


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
    q: Tensor, k: Tensor, v: Tensor, low_BS: Tensor, high_BS: Tensor, scale: float, softcap: float, route: str = "auto"
) -> tuple[Tensor, Tensor]:
    return q.new_empty((*q.shape[:3], v.shape[3])), _empty_lse(q)


@attention_backward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor, low_BS: Tensor, high_BS: Tensor,
    scale: float, softcap: float, grad_lse: Tensor | None = None, route: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, low_BS, high_BS, ctx.scale, ctx.softcap, ctx.route = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, low_BS, high_BS, *output)


def _differentiate(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, low_BS, high_BS, out, lse = ctx.saved_tensors
    grads = torch.ops.megalite.attention_backward(
        q, k, v, out, lse, torch.zeros_like(out) if grad_out is None else grad_out, low_BS, high_BS, ctx.scale,
        ctx.softcap, grad_lse, ctx.route,
    )  # fmt: skip
    return *grads, None, None, None, None, None


attention_forward.register_autograd(_differentiate, setup_context=_save)
