"""Attention on a GPU as one differentiable op. See attention_tiles for the mask's two forms."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megalite_kernels.custom_op import custom_op
from megalite_kernels.gpu.attention_backward import backward, deltas, gradients
from megalite_kernels.gpu.attention_config import config, config_keys, config_queries
from megalite_kernels.gpu.attention_forward import forward
from megalite_kernels.gpu.attention_tiles import Mask, band, padded

__all__ = [
    "Mask", "attention", "backward", "band", "config", "config_keys", "config_queries", "deltas", "forward",
    "gradients", "padded",
]  # fmt: skip


def _mask(shift_low: int, shift_high: int, low_BS: Tensor | None, high_BS: Tensor | None) -> Mask:
    low, high = (None if x is None else x.contiguous() for x in (low_BS, high_BS))
    return Mask(shift_low, shift_high, low, high)


@custom_op("megalite::triton_attention", mutates_args=())
def attention(
    q: Tensor, k: Tensor, v: Tensor, sinks_H: Tensor | None, low_BS: Tensor | None, high_BS: Tensor | None,
    shift_low: int, shift_high: int, scale: float, softcap: float, tiles: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out [B, S, H, E], log-sum-exp in base 2 [B, H, S]): query s sees the keys [low, high), int32, neither falling
    along a row; without those arrays [s + shift_low, s + shift_high) cut to the keys there are. softcap 0: none.
    `tiles`: see tuning."""
    mask, sinks = _mask(shift_low, shift_high, low_BS, high_BS), None if sinks_H is None else sinks_H.contiguous()
    return forward(q.contiguous(), k.contiguous(), v.contiguous(), sinks, mask, scale, softcap, tiles=tiles)


@attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, sinks_H: Tensor | None, low_BS: Tensor | None, high_BS: Tensor | None,
    shift_low: int, shift_high: int, scale: float, softcap: float, tiles: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, queries, heads, _ = q.shape
    return q.new_empty((batch, queries, heads, v.shape[3])), q.new_empty((batch, heads, queries), dtype=torch.float32)


@custom_op("megalite::triton_attention_backward", mutates_args=())
def attention_backward(
    q: Tensor, k: Tensor, v: Tensor, sinks_H: Tensor | None, out: Tensor, lse_BHS: Tensor, grad_out: Tensor,
    grad_lse_BHS: Tensor | None, low_BS: Tensor | None, high_BS: Tensor | None, shift_low: int, shift_high: int,
    scale: float, softcap: float, tiles: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v and the sinks (empty without)."""
    grad_lse, sinks = (None if x is None else x.contiguous() for x in (grad_lse_BHS, sinks_H))
    mask = _mask(shift_low, shift_high, low_BS, high_BS)
    grad_q, grad_k, grad_v, grad_sinks = backward(
        q.contiguous(), k.contiguous(), v.contiguous(), sinks, out, lse_BHS, grad_out.contiguous(), grad_lse, mask,
        scale, softcap, tiles=tiles,
    )  # fmt: skip
    return grad_q, grad_k, grad_v, q.new_empty(0) if grad_sinks is None else grad_sinks


@attention_backward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, sinks_H: Tensor | None, out: Tensor, lse_BHS: Tensor, grad_out: Tensor,
    grad_lse_BHS: Tensor | None, low_BS: Tensor | None, high_BS: Tensor | None, shift_low: int, shift_high: int,
    scale: float, softcap: float, tiles: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    grads = [x.new_empty(x.shape) for x in (q, k, v)]
    return grads[0], grads[1], grads[2], q.new_empty(0) if sinks_H is None else sinks_H.new_empty(sinks_H.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, sinks, low, high, *ctx.rest = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, sinks, low, high, *output)


def _differentiate(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, sinks, low, high, out, lse = ctx.saved_tensors
    *grads, grad_sinks = torch.ops.megalite.triton_attention_backward(
        q, k, v, sinks, out, lse, torch.zeros_like(out) if grad_out is None else grad_out, grad_lse, low, high,
        *ctx.rest,
    )  # fmt: skip
    return *grads, None if sinks is None else grad_sinks, None, None, *(None for _ in ctx.rest)


attention.register_autograd(_differentiate, setup_context=_save)
