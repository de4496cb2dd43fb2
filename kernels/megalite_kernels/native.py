"""Calls of the compiled CPU kernels on contiguous float32 or bf16 tensors; no autograd here.

Every function allocates and returns its outputs; reductions over partial sums happen in a fixed order.
"""

import ctypes
from ctypes import c_float, c_int, c_int64, c_long, c_void_p
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from megalite_kernels.build import library

DTYPES = (torch.float32, torch.bfloat16)


class _Shape(ctypes.Structure):
    _fields_ = (
        ("batch", c_long),
        ("queries", c_long),
        ("keys", c_long),
        ("heads", c_long),
        ("key_heads", c_long),
        ("dim", c_long),
        ("scale", c_float),
        ("softcap", c_float),
        ("bf16", c_int),
        ("low", c_void_p),
        ("high", c_void_p),
        ("grad_lse", c_void_p),
    )


def usable(*tensors: Tensor | None) -> bool:
    """True when the compiled kernels exist and take these tensors: in CPU memory, all float32 or all bf16, not empty.

    Subclasses (fake tensors, DTensor) have no memory of their own to point at.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    return plain(*given) and given[0].dtype in DTYPES and all(x.dtype == given[0].dtype for x in given)


def plain(*tensors: Tensor) -> bool:
    """`usable`, whatever their dtypes."""
    there = all(type(x) in (Tensor, Parameter) and x.device.type == "cpu" and x.numel() > 0 for x in tensors)
    return there and library().functions is not None


def _call(name: str, *arguments: Any) -> None:
    functions = library().functions
    assert functions is not None
    getattr(functions, name)(c_int(torch.get_num_threads()), *arguments)


def _pointer(tensor: Tensor) -> c_void_p:
    assert tensor.is_contiguous() and tensor.device.type == "cpu"
    return c_void_p(tensor.data_ptr())


def _half(tensor: Tensor) -> c_int:
    return c_int(tensor.dtype == torch.bfloat16)


def rms_norm_forward(x: Tensor, weight_D: Tensor, eps: float, zero_centered: bool) -> tuple[Tensor, Tensor]:
    """(y like x, 1/rms of each row)."""
    width = x.shape[-1]
    rows = x.numel() // width
    y, scale = torch.empty_like(x), torch.empty(rows)
    _call(
        "rms_norm_forward",
        *(_half(x), c_long(rows), c_long(width), c_float(eps), c_float(zero_centered)),
        *map(_pointer, (x, weight_D, y, scale)),
    )
    return y, scale


def rms_norm_backward(
    x: Tensor, weight_D: Tensor, scale_N: Tensor, grad_y: Tensor, zero_centered: bool
) -> tuple[Tensor, Tensor]:
    """(grad x, grad weight)."""
    width = x.shape[-1]
    rows = x.numel() // width
    parts = min(16, rows)
    grad_x, partial = torch.empty_like(x), torch.empty(parts, width)
    _call(
        "rms_norm_backward",
        *(_half(x), c_long(rows), c_long(width), c_long(parts), c_float(zero_centered)),
        *map(_pointer, (x, weight_D, scale_N, grad_y, grad_x, partial)),
    )
    return grad_x, partial.sum(0).to(weight_D.dtype)


def gated_forward(gate: Tensor, up: Tensor, tanh_gelu: bool) -> Tensor:
    y = torch.empty_like(gate)
    _call("gated_forward", _half(gate), c_int(tanh_gelu), c_long(gate.numel()), *map(_pointer, (gate, up, y)))
    return y


def gated_backward(gate: Tensor, up: Tensor, grad_y: Tensor, tanh_gelu: bool) -> tuple[Tensor, Tensor]:
    grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
    pointers = map(_pointer, (gate, up, grad_y, grad_gate, grad_up))
    _call("gated_backward", _half(gate), c_int(tanh_gelu), c_long(gate.numel()), *pointers)
    return grad_gate, grad_up


def rope(x_BSHD: Tensor, cos_NR: Tensor, sin_NR: Tensor, back: bool) -> Tensor:
    """cos and sin: float32, one row a (batch, position) of x."""
    y = torch.empty_like(x_BSHD)
    batch, positions, heads, dim = x_BSHD.shape
    sizes = (c_long(batch * positions), c_long(heads), c_long(dim), c_long(cos_NR.shape[-1]))
    _call("rope", _half(x_BSHD), c_int(back), *sizes, *map(_pointer, (cos_NR, sin_NR, x_BSHD, y)))
    return y


def cross_entropy(
    logits_NV: Tensor, targets_N: Tensor, ignore_index: int, softcap: float | None, z_weight: float, gradient: bool
) -> tuple[Tensor, Tensor]:
    """(nll, lse) a row, 0 where ignored. With `gradient` the float32 logits become d(nll + z_weight·lse²)."""
    rows, width = logits_NV.shape
    assert targets_N.dtype == torch.int64 and targets_N.shape == (rows,)
    nll, lse = torch.empty(rows), torch.empty(rows)
    _call(
        "cross_entropy",
        *(c_long(rows), c_long(width), _pointer(logits_NV), _pointer(targets_N), c_int64(ignore_index)),
        *(c_float(softcap or 0.0), c_float(z_weight), c_int(gradient), _pointer(nll), _pointer(lse)),
    )
    return nll, lse


def shard_sums(
    logits_NV: Tensor, targets_N: Tensor, first: int, ignore_index: int, softcap: float
) -> tuple[Tensor, Tensor]:
    """(lse, target's logit or 0) a row of a shard of the float32 logits, which are capped in place; 0 where ignored."""
    lse, chosen = torch.empty(2, logits_NV.shape[0])
    tail = (c_float(softcap), _pointer(lse), _pointer(chosen))
    _call("shard_sums", *_shard(logits_NV, targets_N, first, ignore_index), *tail)
    return lse, chosen


def shard_gradient(
    logits_NV: Tensor, targets_N: Tensor, first: int, ignore_index: int, softcap: float, nll_weight: float,
    z_weight: float, lse_N: Tensor,
) -> None:  # fmt: skip
    """What `shard_sums` left becomes d(nll_weight·nll + z_weight·lse²) of the whole vocabulary, whose lse is given."""
    assert lse_N.dtype == torch.float32
    tail = (c_float(softcap), c_float(nll_weight), c_float(z_weight), _pointer(lse_N))
    _call("shard_gradient", *_shard(logits_NV, targets_N, first, ignore_index), *tail)


def _shard(logits_NV: Tensor, targets_N: Tensor, first: int, ignore_index: int) -> tuple[Any, ...]:
    rows, width = logits_NV.shape
    assert logits_NV.dtype == torch.float32 and targets_N.dtype == torch.int64 and targets_N.shape == (rows,)
    sizes = (c_long(rows), c_long(width), c_long(first))
    return *sizes, _pointer(logits_NV), _pointer(targets_N), c_int64(ignore_index)


def moe_places(indices_NK: Tensor, experts: int, pad_to: int) -> tuple[Tensor, Tensor]:
    """(offsets [E + 1], place of each slot [N, K]), int32, of int64 experts."""
    assert indices_NK.dtype == torch.int64
    offsets = indices_NK.new_empty(experts + 1, dtype=torch.int32)
    place = torch.empty_like(indices_NK, dtype=torch.int32)
    sizes = map(c_long, (indices_NK.numel(), experts, pad_to))
    _call("moe_places", *sizes, *map(_pointer, (indices_NK, offsets, place)))
    return offsets, place


def moe_spread(x_ND: Tensor, place_NK: Tensor, rows_MD: Tensor) -> None:
    """Every slot's row becomes its token's x; `place`: int32, -1 without one. IndexError for a row not there."""
    _within(place_NK, rows_MD)
    _call("moe_spread", *_slots(x_ND, place_NK), *map(_pointer, (x_ND, place_NK, rows_MD)))


def moe_sum(rows_MD: Tensor, place_NK: Tensor, probs_NK: Tensor | None) -> Tensor:
    """[N, D]: the sum of a token's rows, in the order of its slots, times float32 probabilities."""
    _within(place_NK, rows_MD)
    y = rows_MD.new_empty(len(place_NK), rows_MD.shape[1])
    probs = c_void_p(None) if probs_NK is None else _pointer(probs_NK)
    _call("moe_sum", *_slots(rows_MD, place_NK), _pointer(rows_MD), _pointer(place_NK), probs, _pointer(y))
    return y


def moe_sum_backward(grad_ND: Tensor, place_NK: Tensor, probs_NK: Tensor, rows_MD: Tensor, grad_MD: Tensor) -> Tensor:
    """Gradient of the probabilities [N, K]; that of the rows is written into `grad_MD` where a slot has one."""
    _within(place_NK, rows_MD)
    _within(place_NK, grad_MD)
    grad_probs = torch.empty_like(probs_NK)
    pointers = map(_pointer, (grad_ND, place_NK, probs_NK, rows_MD, grad_MD, grad_probs))
    _call("moe_sum_backward", *_slots(grad_ND, place_NK), *pointers)
    return grad_probs


def _within(place_NK: Tensor, rows_MD: Tensor) -> None:
    if int(place_NK.max()) >= len(rows_MD):
        raise IndexError(f"moe: a slot's row is {int(place_NK.max())}, of {len(rows_MD)}")


def _slots(x: Tensor, place_NK: Tensor) -> tuple[Any, ...]:
    assert place_NK.dtype == torch.int32
    return _half(x), *map(c_long, (*place_NK.shape, x.shape[1]))


def fp8_amax(x_MK: Tensor, shape: tuple[int, int], block: tuple[int, int]) -> Tensor:
    """[`shape`] float32: largest |x| of every block of rows x columns."""
    amax = torch.zeros(shape)
    _call("fp8_amax", _half(x_MK), *_blocks(x_MK, block), _pointer(x_MK), _pointer(amax))
    return amax


def fp8_encode(x_MK: Tensor, inverse: Tensor, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Codes of x times its block's `inverse` scale."""
    codes = torch.empty(x_MK.shape, dtype=dtype)
    tail = map(_pointer, (x_MK, inverse, codes))
    _call("fp8_encode", _half(x_MK), c_int(dtype == torch.float8_e5m2), *_blocks(x_MK, block), *tail)
    return codes


def fp8_decode(codes_MK: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """float32: each code times its block's scale."""
    x = torch.empty(codes_MK.shape)
    tail = map(_pointer, (codes_MK, scales, x))
    _call("fp8_decode", c_int(codes_MK.dtype == torch.float8_e5m2), *_blocks(codes_MK, block), *tail)
    return x


def _blocks(x_MK: Tensor, block: tuple[int, int]) -> tuple[c_long, ...]:
    return tuple(map(c_long, (*x_MK.shape, *block)))


def _shape(
    q: Tensor, k: Tensor, low: Tensor, high: Tensor, scale: float, softcap: float | None, grad_lse: Tensor | None = None
) -> _Shape:
    batch, queries, heads, dim = q.shape
    return _Shape(
        *(batch, queries, k.shape[1], heads, k.shape[2], dim, scale, softcap or 0.0, q.dtype == torch.bfloat16),
        *(low.data_ptr(), high.data_ptr(), None if grad_lse is None else grad_lse.data_ptr()),
    )


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, low_BS: Tensor, high_BS: Tensor, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """(out like q, log-sum-exp [B, H, S]); query (b, s) sees the keys low[b, s] ≤ t < high[b, s].

    A query that sees nothing gives 0 and -inf."""
    out, lse = torch.empty_like(q), torch.empty(q.shape[0], q.shape[2], q.shape[1])
    shape = _shape(q, k, low_BS, high_BS, scale, softcap)
    _call("attention_forward", ctypes.byref(shape), *map(_pointer, (q, k, v, out, lse)))
    return out, lse


def attention_backward(
    saved: tuple[Tensor, ...], grad_out: Tensor, grad_lse_BHS: Tensor | None, low_BS: Tensor, high_BS: Tensor,
    scale: float, softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, from saved = (q, k, v, out, lse)."""
    q, k, v, out, lse = saved
    shape = _shape(q, k, low_BS, high_BS, scale, softcap, grad_lse_BHS)
    functions = library().functions
    assert functions is not None
    width = functions.attention_width(c_long(q.shape[-1]))
    parts = torch.empty(2, q.shape[0], q.shape[2], k.shape[1], width)
    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    _call("attention_backward", ctypes.byref(shape), *map(_pointer, (q, k, v, out, grad_out, lse, parts, *grads)))
    return grads
