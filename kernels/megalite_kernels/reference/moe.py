"""Mixture of experts: the choice of experts, tokens sorted by expert and back, and a product per expert.

Shape letters: N tokens, E experts, K experts of a token (a slot is one of a token's K choices), D and F widths,
M sorted rows.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from megalite_kernels.reference.wide import accumulation_dtype, widen

SCORES = ("softmax", "sigmoid")
TINY = 1e-20
"""Added to the sum that sigmoids are divided by, as DeepSeek-V3 does."""


def moe_route(
    logits_NE: Tensor,
    k: int,
    *,
    score: str = "softmax",
    normalize: bool = True,
    bias_E: Tensor | None = None,
    groups: int = 1,
    top_groups: int | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(indices [N, K] int64, probabilities [N, K] in float32 or float64, tokens of each expert [E] int64).

    A token's experts are the k with the largest score + bias, the largest first, and of equal ones the lower number
    first; NaN ranks above all, so that it reaches the loss. A probability is the expert's score, without the bias,
    over the sum of the chosen ones when `normalize`, times `scale`; it is differentiable, the choice isn't. With
    groups, experts lie in so many equal ones, a group counts as much as its two best experts together, and the choice
    is among the `top_groups` best groups (DeepSeek-V3, arXiv:2412.19437). Without bias and fewer
    groups the logits themselves are compared, which rank as their scores do, but without rounding.

    Mixtral and gpt-oss: the defaults; Qwen3-MoE: `normalize` as its norm_topk_prob; DeepSeek-V3: sigmoid and the rest.
    """
    logits, top_groups = widen(logits_NE), top_groups or groups
    scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
    with torch.no_grad():
        ranked = logits if bias_E is None and top_groups == groups else scores
        ranked = ranked if bias_E is None else ranked + bias_E.to(ranked)
        order = ranked.sort(dim=-1, descending=True, stable=True).indices
        if top_groups < groups:
            outside = outside_top_groups(ranked, groups, top_groups).gather(-1, order)
            order = order.gather(-1, outside.int().sort(dim=-1, stable=True).indices)
        indices = order[:, :k]
        counts = _counts(indices, logits.shape[1])
    if score == "softmax" and normalize:
        probs = logits.gather(-1, indices).softmax(-1)
    else:
        probs = scores.gather(-1, indices)
        probs = probs / (probs.sum(-1, keepdim=True) + TINY) if normalize else probs
    return indices, probs * scale, counts


def _counts(numbers: Tensor, experts: int) -> Tensor:
    ones = torch.ones_like(numbers.flatten(), dtype=torch.int64)
    return ones.new_zeros(experts).scatter_add(0, numbers.flatten().long(), ones)


def outside_top_groups(ranked_NE: Tensor, groups: int, top_groups: int) -> Tensor:
    """Whether each expert lies in none of its token's best groups, [N, E]."""
    members = ranked_NE.unflatten(-1, (groups, -1))
    values = members.sort(dim=-1, descending=True).values[..., :2].sum(-1)
    best = values.sort(dim=-1, descending=True, stable=True).indices[..., :top_groups]
    outside = torch.ones_like(values, dtype=torch.bool).scatter(-1, best, False)
    return outside[..., None].expand_as(members).flatten(-2)


def sorted_rows(slots: int, experts: int, pad_to: int | None) -> int:
    """Rows that `moe_permute` allocates: enough for any choice, so that nothing waits for the choice to be known."""
    pad_to = pad_to or 1
    return (slots + min(slots, experts) * (pad_to - 1)) // pad_to * pad_to


def sorted_places(indices_NK: Tensor, experts: int, pad_to: int | None = None) -> tuple[Tensor, Tensor]:
    """(offsets [E + 1], inverse [N, K]) of `moe_permute`, both int32."""
    expert = indices_NK.flatten()
    expert = torch.where((expert >= 0) & (expert < experts), expert, experts)  # those elsewhere come last
    counts = _counts(expert, experts + 1)[:experts]
    pad_to = pad_to or 1
    ends = ((counts + pad_to - 1) // pad_to * pad_to).cumsum(0)
    offsets = F.pad(ends, (1, 0))
    padding = offsets - F.pad(counts.cumsum(0), (1, 0))  # before each expert's rows
    order = expert.argsort(stable=True)
    row = torch.arange(len(order), device=order.device) + padding[expert[order]]
    inverse = torch.empty_like(order).scatter(0, order, torch.where(expert[order] < experts, row, -1))
    return offsets.int(), inverse.view(indices_NK.shape).int()


def moe_permute(
    x_ND: Tensor, indices_NK: Tensor, experts: int, *, pad_to: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(rows sorted by expert [M, D], offsets [E + 1] int32, inverse [N, K] int32).

    Each slot gets a copy of its token's row, by expert, then token, then slot: expert e's rows are offsets[e] to
    offsets[e + 1], and slot (n, j) lies at row inverse[n, j]. With `pad_to` every expert's rows are filled up to a
    multiple of it with zeros. A slot whose index is no expert's (say -1: dropped, or on another rank) gets no row and
    inverse -1. M depends on shapes alone, N · K plus the most that padding could need; the rows left over are zero.
    """
    offsets, inverse = sorted_places(indices_NK, experts, pad_to)
    rows = sorted_rows(inverse.numel(), experts, pad_to)
    place = torch.where(inverse < 0, rows, inverse).flatten().long()  # one row more, for those without
    copies = x_ND.repeat_interleave(indices_NK.shape[1], dim=0)
    return x_ND.new_zeros(rows + 1, x_ND.shape[1]).index_copy(0, place, copies)[:rows], offsets, inverse


def moe_unpermute(y_MD: Tensor, inverse_NK: Tensor, probs_NK: Tensor | None = None) -> Tensor:
    """Σ over a token's slots of probability · its sorted row -> [N, D] in y's dtype; without probabilities the sum."""
    y = torch.cat((widen(y_MD), y_MD.new_zeros(1, y_MD.shape[1], dtype=accumulation_dtype(y_MD.dtype))))
    rows = y[inverse_NK.long()]  # -1: the row of zeros
    if probs_NK is not None:
        rows = rows * widen(probs_NK)[..., None]
    return rows.sum(1).to(y_MD.dtype)


def grouped_gemm(x_MD: Tensor, w_EDF: Tensor, offsets: Tensor, bias_EF: Tensor | None = None) -> Tensor:
    """Rows offsets[e] to offsets[e + 1] of x times w[e], plus bias[e] -> [M, F]; rows from offsets[E] on: zero."""
    ends = offsets.tolist()
    parts = [widen(x_MD[a:b]) @ widen(w) for (a, b), w in zip(pairwise(ends), w_EDF, strict=True)]
    if bias_EF is not None:
        parts = [part + widen(bias) for part, bias in zip(parts, bias_EF, strict=True)]
    rest = x_MD.new_zeros(len(x_MD) - ends[-1], w_EDF.shape[2], dtype=accumulation_dtype(x_MD.dtype))
    return torch.cat((*parts, rest)).to(x_MD.dtype)


def grouped_gemm_batched(x_MD: Tensor, w_EDF: Tensor, offsets: Tensor, bias_EF: Tensor | None = None) -> Tensor:
    """`grouped_gemm` as one batched product, every expert's rows filled up with zeros to those of the largest."""
    counts, ends = offsets.diff(), offsets.tolist()
    expert = torch.arange(len(w_EDF), device=x_MD.device).repeat_interleave(counts, output_size=ends[-1])
    row = torch.arange(ends[-1], device=x_MD.device) - offsets[expert]
    filled = widen(x_MD).new_zeros(len(w_EDF), int(counts.max()), x_MD.shape[1])
    y = filled.index_put((expert, row), widen(x_MD[: ends[-1]])) @ widen(w_EDF)
    if bias_EF is not None:
        y = y + widen(bias_EF)[:, None]
    rest = y.new_zeros(len(x_MD) - ends[-1], w_EDF.shape[2])
    return torch.cat((y[expert, row], rest)).to(x_MD.dtype)
