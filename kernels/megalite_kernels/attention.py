"""Attention: what is asked for, checked, and handed to the implementation that fits; see attention_choice.

Other modules take the ops on intervals of keys from here: `attention_forward`, `attention_backward`, `visible_spans`,
`add_sinks`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megalite_kernels import reference
from megalite_kernels.attention_blocks import (
    LN2,
    add_sinks,
    attention_backward,
    attention_forward,
    visible_spans,
)
from megalite_kernels.dispatch import choose
from megalite_kernels.tuning import Tuned

__all__ = ["add_sinks", "attention", "attention_backward", "attention_forward", "visible_spans"]


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
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    deterministic: bool = False,
    tuned: Tuned | None = None,
    backend: str = "auto",
) -> Any:
    """softmax(mask(cap(scale · q kᵀ))) v -> [B, S, H, E], with the log-sum-exp [B, H, S] if asked; all of it is in
    `reference.attention`, packed documents by `cu_seqlens_q` too.

    documents[B, S]: document number of each position, never decreasing along a row; needs T == S. cu_seqlens: int32
    or int64; the longest documents, `max_seqlen_q` and `max_seqlen_k`, help flash-attn. sinks [H] take their gradient.
    q, k, v: one dtype and device. `deterministic`: the same gradients every time, also asked for by
    torch.use_deterministic_algorithms; all but flash-attn's and PyTorch's on a GPU are. `tuned`: measured tiles for
    the Triton kernels.
    Raises ValueError for tensors that do not belong together, or a backend that cannot do this.
    """
    packed = cu_seqlens_q is not None
    q, k, v = (x[None] for x in (q_BSHD, k_BTKD, v_BTKE)) if packed else (q_BSHD, k_BTKD, v_BTKE)
    _check(q, k, v, documents, sinks)
    if packed and documents is not None:
        raise ValueError("attention: packed documents are told by cu_seqlens, not by documents")
    if cu_seqlens_k is not None and not packed:
        raise ValueError("attention: cu_seqlens_k needs cu_seqlens_q")
    queries, keys = q.shape[1], k.shape[1]
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    features = (
        ("dims", (q.shape[3], v.shape[3])),
        ("sinks", sinks is not None),
        ("softcap", softcap is not None),
        ("window", window is not None),
        ("documents", documents is not None),
        ("packed", packed),
        ("lse", return_lse),
        ("aligned", not causal or queries in (1, keys)),
        ("empty", q.numel() == 0 or v.numel() == 0),
        ("deterministic", deterministic),
    )
    chosen = choose("attention", backend, q.device.type, q.dtype, features)
    if chosen == "reference":
        return reference.attention(
            q_BSHD, k_BTKD, v_BTKE, scale=scale, causal=causal, window=window, softcap=softcap, documents=documents,
            sinks=sinks, return_lse=return_lse, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
        )  # fmt: skip
    if chosen == "sdpa":
        return _sdpa(q, k, v, scale, causal and queries > 1)
    of_q, of_k = cu_seqlens_q, cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    if chosen.startswith("flash"):
        from megalite_kernels.gpu.flash import flash

        longest = (max_seqlen_q or queries, max_seqlen_k or keys)
        out = flash(chosen, q, k, v, scale, causal, window, softcap, sinks, of_q, of_k, longest, deterministic)
        return out[0] if packed else out
    sizes = (q.shape[3], v.shape[3], queries, keys)
    tiles = None if tuned is None else tuned.tiles("attention", q.dtype, sizes)
    out, lse = _ours(chosen, q, k, v, scale, causal, window, softcap or 0.0, documents, sinks, of_q, of_k, tiles)
    if packed:
        out, lse = out[0], lse[0]
    if not return_lse:
        return out
    return out, lse * LN2 if chosen == "triton" else lse


def _check(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, sinks: Tensor | None) -> None:
    if not q.dim() == k.dim() == v.dim() == 4 or k.shape[:3] != v.shape[:3] or q.shape[::3] != k.shape[::3]:
        shapes = ", ".join(str(list(x.shape)) for x in (q, k, v))
        raise ValueError(f"attention: needs q [B, S, H, D], k [B, T, K, D] and v [B, T, K, E], not {shapes}")
    if not k.shape[2] or q.shape[2] % k.shape[2]:
        raise ValueError(f"attention: {q.shape[2]} query heads are no multiple of {k.shape[2]} key heads")
    if sinks is not None and sinks.device != q.device:
        raise ValueError(f"attention: sinks are on {sinks.device}, queries on {q.device}")
    if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        kinds = ", ".join(f"{x.dtype} ({x.device})" for x in (q, k, v))
        raise ValueError(f"attention: q, k and v need one dtype and device, not {kinds}")
    if documents is not None and q.shape[1] != k.shape[1]:
        raise ValueError(f"attention: documents need as many queries as keys, not {q.shape[1]} and {k.shape[1]}")
    if documents is not None and documents.shape != q.shape[:2]:
        raise ValueError(f"attention: documents are {list(documents.shape)}, queries {list(q.shape[:2])}")
    if sinks is not None and sinks.shape != q.shape[2:3]:
        raise ValueError(f"attention: sinks are {list(sinks.shape)}, query heads {q.shape[2]}")


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped).transpose(1, 2)


def _ours(
    chosen: str, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, window: int | None, softcap: float,
    documents: Tensor | None, sinks: Tensor | None, cu_q: Tensor | None, cu_k: Tensor | None, tiles: list[int] | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, log-sum-exp) by the Triton kernels, whose log-sum-exp is in base 2, the C kernels or blocks of queries."""
    keys, back = k.shape[1], -1 if window is None else window
    if chosen == "triton" and documents is None and cu_q is None:
        from megalite_kernels.gpu.attention import attention as triton_attention
        from megalite_kernels.gpu.attention import band

        mask = band(q.shape[1], keys, causal, window)
        result = triton_attention(q, k, v, sinks, None, None, mask.shift_low, mask.shift_high, scale, softcap, tiles)
        return result[0], result[1]
    if cu_q is not None and cu_k is not None:
        low, high = torch.ops.megalite.packed_spans(cu_q, cu_k, q.shape[1], keys, causal, back)
    else:
        low, high = torch.ops.megalite.visible_spans(q, keys, causal, back, documents)
    if chosen == "triton":
        from megalite_kernels.gpu.attention import attention as triton_attention

        result = triton_attention(q, k, v, sinks, low, high, 0, 0, scale, softcap, tiles)
        return result[0], result[1]
    out, lse = torch.ops.megalite.attention(q, k, v, low, high, scale, softcap, chosen)
    return (out, lse) if sinks is None else add_sinks(out, lse, sinks)
