"""Mixture of experts on a CPU: copies and sums of rows by index, and a product per expert in a loop.

Offsets are read as numbers, which costs nothing here and would make a GPU wait. Registered as ops, so that a graph of
torch.compile is not broken by the reading.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from megalite_kernels import native
from megalite_kernels.capability import emulate_bf16_on_cpu
from megalite_kernels.custom_op import custom_op
from megalite_kernels.moe_gradients import products, there_and_back
from megalite_kernels.reference.moe import TINY, outside_top_groups, sorted_places, sorted_rows
from megalite_kernels.reference.wide import widen


def route(
    logits_NE: Tensor, k: int, score: str, normalize: bool, bias_E: Tensor | None, groups: int, top_groups: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`moe_route` in float32, by a top k of int64s instead of a stable sort, which costs twice as much."""
    logits = logits_NE.float()
    scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
    with torch.no_grad():
        ranked = logits if bias_E is None and top_groups == groups else scores
        ranked = ranked if bias_E is None else ranked + bias_E.float()
        # A float's bits rank as it does once those of negative ones are turned; below them the expert's number.
        bits = torch.where(ranked == 0, 0.0, ranked).view(torch.int32)
        bits = torch.where(ranked.isnan(), 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))
        packed = (bits.long() << 32) + torch.arange(logits.shape[1] - 1, -1, -1, device=logits.device)
        if top_groups < groups:
            packed = packed.masked_fill(outside_top_groups(ranked, groups, top_groups), torch.iinfo(torch.int64).min)
        indices = packed.topk(k, dim=-1).indices
        chosen = indices.flatten()
        counts = chosen.new_zeros(logits.shape[1]).scatter_add_(0, chosen, torch.ones_like(chosen))
    if score == "softmax" and normalize:
        return indices, logits.gather(-1, indices).softmax(-1) * scale, counts
    probs = scores.gather(-1, indices)
    probs = probs / (probs.sum(-1, keepdim=True) + TINY) if normalize else probs
    return indices, probs * scale, counts


@custom_op("megalite::cpu_moe_permute", mutates_args=())
def permute(
    x_ND: Tensor, indices_NK: Tensor, experts: int, pad_to: int, rows: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`moe_permute`; pad_to 1: no padding."""
    if native.plain(indices_NK):
        offsets, inverse = native.moe_places(indices_NK.long().contiguous(), experts, pad_to)
    else:
        offsets, inverse = sorted_places(indices_NK, experts, pad_to)
    rows = sorted_rows(inverse.numel() if rows is None else rows, experts, pad_to)
    return _spread(x_ND, inverse, rows), offsets, inverse


def _spread(x_ND: Tensor, inverse_NK: Tensor, rows: int) -> Tensor:
    """A copy of its token's row at every slot's place; zeros where there is none."""
    out = _for_slots(x_ND, inverse_NK, rows)
    if native.usable(x_ND) and native.plain(inverse_NK):
        native.moe_spread(x_ND.contiguous(), inverse_NK.contiguous(), out)
        return out
    taken = inverse_NK >= 0
    out[inverse_NK[taken].long()] = x_ND.repeat_interleave(taken.sum(1), dim=0)
    return out


def _for_slots(x_ND: Tensor, inverse_NK: Tensor, rows: int) -> Tensor:
    """Room for `rows` like x's; set to zero where no slot will write."""
    every = rows == inverse_NK.numel() and (not rows or int(inverse_NK.min()) >= 0)
    return (x_ND.new_empty if every else x_ND.new_zeros)(rows, x_ND.shape[1])


@custom_op("megalite::cpu_moe_unpermute", mutates_args=())
def unpermute(y_MD: Tensor, inverse_NK: Tensor, probs_NK: Tensor | None) -> Tensor:
    """`moe_unpermute`."""
    if native.usable(y_MD) and native.plain(inverse_NK) and (probs_NK is None or probs_NK.dtype == torch.float32):
        probs = None if probs_NK is None else probs_NK.contiguous()
        return native.moe_sum(y_MD.contiguous(), inverse_NK.contiguous(), probs)
    y = widen(y_MD)
    if not len(y) or (inverse_NK.numel() and int(inverse_NK.min()) < 0):
        y = torch.cat((y, y.new_zeros(1, y.shape[1])))
        inverse_NK = torch.where(inverse_NK < 0, len(y_MD), inverse_NK)
    weights = None if probs_NK is None else probs_NK.to(y.dtype)
    return F.embedding_bag(inverse_NK, y, mode="sum", per_sample_weights=weights).to(y_MD.dtype)


@custom_op("megalite::cpu_moe_unpermute_backward", mutates_args=())
def unpermute_backward(
    grad_ND: Tensor, inverse_NK: Tensor, rows: int, probs_NK: Tensor | None, y_MD: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(gradient of the sorted rows, gradient of the probabilities)."""
    if probs_NK is None or y_MD is None:
        return _spread(grad_ND, inverse_NK, rows), grad_ND.new_empty(0)
    if native.usable(grad_ND, y_MD) and native.plain(inverse_NK) and probs_NK.dtype == torch.float32:
        grad_y = _for_slots(grad_ND, inverse_NK, rows)
        given = grad_ND.contiguous(), inverse_NK.contiguous(), probs_NK.contiguous(), y_MD.contiguous()
        return grad_y, native.moe_sum_backward(*given, grad_y)
    token, _ = (taken := inverse_NK >= 0).nonzero(as_tuple=True)
    place, wide = inverse_NK[taken].long(), widen(grad_ND)[token]
    grad_y, grad_probs = _for_slots(grad_ND, inverse_NK, rows), torch.zeros_like(probs_NK)
    grad_y[place] = (wide * probs_NK[taken].to(wide.dtype)[:, None]).to(grad_ND.dtype)
    grad_probs[taken] = torch.linalg.vecdot(wide, widen(y_MD)[place]).to(probs_NK.dtype)
    return grad_y, grad_probs


@custom_op("megalite::cpu_grouped_gemm", mutates_args=())
def grouped_gemm(x_MD: Tensor, w_EDF: Tensor, offsets: Tensor, bias_EF: Tensor | None) -> Tensor:
    """`grouped_gemm`."""
    y = x_MD.new_empty((len(x_MD), w_EDF.shape[2]))
    ends = offsets.tolist()
    for expert, (first, last) in enumerate(pairwise(ends)):
        _product(x_MD[first:last], w_EDF[expert], y[first:last], None if bias_EF is None else bias_EF[expert])
    y[ends[-1] :] = 0.0
    return y


@custom_op("megalite::cpu_grouped_gemm_weights", mutates_args=())
def grouped_gemm_weights(x_MD: Tensor, grad_MF: Tensor, offsets: Tensor, like_EDF: Tensor) -> Tensor:
    """Each expert's xᵀ · grad over its rows, with the strides of `like`."""
    out = torch.empty_like(like_EDF)
    ends = offsets.tolist()
    for expert, (first, last) in enumerate(pairwise(ends)):
        _product(x_MD[first:last].T, grad_MF[first:last], out[expert])
    return out


@custom_op("megalite::cpu_grouped_gemm_bias", mutates_args=())
def grouped_gemm_bias(grad_MF: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    """Each expert's sum over its rows, [E, F]."""
    return torch.stack([widen(grad_MF[a:b]).sum(0) for a, b in pairwise(offsets.tolist())]).to(dtype)


def multiple_of_rows(slots: int, experts: int, like: Tensor) -> int:
    """What an expert's rows are best filled up to a multiple of: a sixteenth of an even share or less.

    oneDNN, which multiplies half precision, compiles a product anew for each number of rows (a millisecond and more,
    three times as long as a product of a few hundred rows takes), and with experts that number changes all the time.
    """
    if like.device.type != "cpu" or like.dtype.itemsize != 2 or emulate_bf16_on_cpu():
        return 1
    return 1 << max(0, (slots // experts).bit_length() - 5)


def _product(a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None = None) -> None:
    if a.dtype == torch.bfloat16 and emulate_bf16_on_cpu():
        wide = a.float() @ b.float()
        out.copy_(wide if bias is None else wide + bias)
    elif bias is not None:
        torch.addmm(bias, a, b, out=out)
    else:
        torch.mm(a, b, out=out)


there_and_back(permute, unpermute, unpermute_backward)
products(grouped_gemm, grouped_gemm_weights, grouped_gemm_bias)
