"""Mixture of experts: which experts a token goes to, tokens sorted by expert and back, a product per expert.

A layer is route, permute, one or more products with an activation between them, unpermute:

    indices, probs, _ = moe_route(logits, k)
    rows, offsets, inverse = moe_permute(x, indices, experts)
    y = moe_unpermute(grouped_gemm(swiglu(…grouped_gemm(rows, w_in, offsets)…), w_out, offsets), inverse, probs)

Under expert parallelism the same ops serve: indices less a rank's first expert leave the slots of other ranks out, and
rows received from elsewhere are sorted as tokens with one slot each. On a GPU nothing here waits for the choice: the
number of sorted rows depends on shapes alone.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megalite_kernels import moe_cpu, reference
from megalite_kernels.dispatch import choose
from megalite_kernels.reference.moe import SCORES, sorted_rows
from megalite_kernels.tuning import Tuned

INTEGERS = (torch.int32, torch.int64)


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
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """(indices [N, k], probabilities [N, k], tokens of each expert [E]) of a token's k best experts, the best first.

    `score`: "softmax" or "sigmoid" of the logits; `normalize`: chosen scores over their sum; `scale`: times them.
    `bias_E` is added for the choice alone; with `groups` only experts of the `top_groups` best groups are chosen, by
    the sum of a group's two best (DeepSeek-V3, arXiv:2412.19437). Equal scores: the lower expert first; NaN before
    all. Probabilities are float32 (float64 for float64), differentiable by the logits; indices and counts are int64,
    which is what PyTorch's gather and scatter take and what never overflows when ranks add them up.
    Raises ValueError for a k, score, bias or groups that don't fit E experts.
    """
    experts, limit = logits_NE.shape[-1], top_groups or groups
    if logits_NE.dim() != 2 or score not in SCORES:
        raise ValueError(f"moe_route: logits are [N, E] and score {' or '.join(SCORES)}, not {score!r}")
    if groups < 1 or experts % groups or not 1 <= limit <= groups:
        raise ValueError(f"moe_route: {groups} groups, {limit} of them chosen, don't fit {experts} experts")
    if not 1 <= k <= limit * (experts // groups):
        raise ValueError(f"moe_route: cannot choose {k} of {limit * (experts // groups)} experts")
    if bias_E is not None and bias_E.shape != (experts,):
        raise ValueError(f"moe_route: bias is {list(bias_E.shape)}, not one for each of {experts} experts")
    width = (1 << (groups - 1).bit_length()) * (1 << (experts // groups - 1).bit_length())
    features = (("columns", width if limit < groups else experts), ("k", k))
    chosen = choose("moe_route", backend, logits_NE.device.type, logits_NE.dtype, features)
    bias = None if bias_E is None else bias_E.detach()
    if chosen == "triton":
        from megalite_kernels.gpu.moe_route import route

        indices, probs, counts = route(logits_NE, bias, k, score == "sigmoid", normalize, groups, limit, scale)
        return indices, probs, counts
    if chosen == "cpu":
        return moe_cpu.route(logits_NE, k, score, normalize, bias, groups, limit, scale)
    return reference.moe_route(
        logits_NE, k, score=score, normalize=normalize, bias_E=bias, groups=groups, top_groups=limit, scale=scale
    )


def moe_permute(
    x_ND: Tensor, indices_NK: Tensor, experts: int, *, pad_to: int | None = None, rows: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(rows sorted by expert [M, D], offsets [E + 1] int32, inverse [N, K] int32).

    Expert e's rows are offsets[e] to offsets[e + 1], in the order of tokens; slot (n, j) lies at row inverse[n, j].
    `pad_to`: each expert's rows are filled up with zeros to a multiple of it. A slot whose index is outside 0 … E - 1
    (dropped, or another rank's) has no row, and inverse -1. M = N · K, and with `pad_to` as many more as any choice
    could need; rows from offsets[E] on are zero. A caller who knows how many slots have an expert says so in `rows`,
    which then stands for N · K. offsets[1:] is what torch.nn.functional.grouped_mm takes.
    Raises ValueError for indices that aren't integers [N, K].
    """
    if x_ND.dim() != 2 or indices_NK.dim() != 2 or len(x_ND) != len(indices_NK) or indices_NK.dtype not in INTEGERS:
        shapes = f"{list(x_ND.shape)} and {indices_NK.dtype} {list(indices_NK.shape)}"
        raise ValueError(f"moe_permute: needs x [N, D] and integers [N, K], not {shapes}")
    if experts < 1 or (pad_to is not None and pad_to < 1):
        raise ValueError(f"moe_permute: {experts} experts, padded to {pad_to}: both are at least 1")
    if rows is not None and not 0 <= rows <= indices_NK.numel():
        raise ValueError(f"moe_permute: {rows} rows of {indices_NK.numel()} slots")
    chosen = choose("moe_permute", backend, x_ND.device.type, x_ND.dtype)
    if chosen == "cpu":
        made = moe_cpu.permute(x_ND, indices_NK, experts, pad_to or 1, rows)
        return made[0], made[1], made[2]
    if chosen == "reference":
        sorted_MD, offsets, inverse = reference.moe_permute(x_ND, indices_NK, experts, pad_to=pad_to)
    else:
        from megalite_kernels.gpu.moe_permute import permute

        sorted_MD, offsets, inverse = permute(x_ND, indices_NK, experts, pad_to or 1)
    return sorted_MD if rows is None else sorted_MD[: sorted_rows(rows, experts, pad_to)], offsets, inverse


def moe_unpermute(y_MD: Tensor, inverse_NK: Tensor, probs_NK: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """Σ over a token's slots, in their order, of its sorted row times its probability -> [N, D] in y's dtype.

    Sums in float32; differentiable by rows and probabilities, which may be wider than the rows.
    Raises ValueError for probabilities of another shape than `inverse`.
    """
    if y_MD.dim() != 2 or inverse_NK.dim() != 2 or (probs_NK is not None and probs_NK.shape != inverse_NK.shape):
        shapes = ", ".join(str(list(t.shape)) for t in (y_MD, inverse_NK, probs_NK) if t is not None)
        raise ValueError(f"moe_unpermute: needs y [M, D], inverse [N, K] and probabilities like it, not {shapes}")
    chosen = choose("moe_unpermute", backend, y_MD.device.type, y_MD.dtype)
    if chosen == "reference":
        return reference.moe_unpermute(y_MD, inverse_NK, probs_NK)
    if chosen == "triton":
        from megalite_kernels.gpu.moe_permute import unpermute
    else:
        unpermute = moe_cpu.unpermute
    out: Tensor = unpermute(y_MD, inverse_NK, probs_NK)
    return out


def grouped_gemm(
    x_MD: Tensor,
    w_EDF: Tensor,
    offsets: Tensor,
    bias_EF: Tensor | None = None,
    *,
    tuned: Tuned | None = None,
    backend: str = "auto",
) -> Tensor:
    """Rows offsets[e] to offsets[e + 1] of x times w[e], plus bias[e] -> [M, F]; rows from offsets[E] on are zero.

    offsets: [E + 1] int32 from 0, rising, at most M. A weight kept as [E, F, D], as F.linear's are, goes in as its
    transpose, without a copy. Differentiable by all three; an expert without rows has a gradient of zero.
    `tuned`: tiles for Triton's kernels that were measured.
    Raises ValueError for tensors that don't belong together.
    """
    fits = x_MD.dim() == 2 and w_EDF.dim() == 3 and x_MD.shape[1] == w_EDF.shape[1] and x_MD.dtype == w_EDF.dtype
    if not fits or offsets.shape != (w_EDF.shape[0] + 1,) or offsets.dtype != torch.int32:
        shapes = ", ".join(f"{t.dtype} {list(t.shape)}" for t in (x_MD, w_EDF, offsets))
        raise ValueError(f"grouped_gemm: needs x [M, D], w [E, D, F] of one dtype, int32 offsets [E + 1], not {shapes}")
    if bias_EF is not None and (bias_EF.shape != w_EDF.shape[::2] or bias_EF.dtype != w_EDF.dtype):
        raise ValueError(f"grouped_gemm: bias is {bias_EF.dtype} {list(bias_EF.shape)}, not [E, F] of the weight's")
    dense = 1 in w_EDF.stride()[1:] and len(x_MD) > 0 and not any(size % 8 for size in w_EDF.shape[1:])
    features = (("aligned", dense), ("bias", bias_EF is not None))
    chosen = choose("grouped_gemm", backend, x_MD.device.type, x_MD.dtype, features)
    if chosen == "reference":
        return reference.grouped_gemm(x_MD, w_EDF, offsets, bias_EF)
    if chosen == "batched":
        return reference.grouped_gemm_batched(x_MD, w_EDF, offsets, bias_EF)
    if chosen == "grouped_mm":
        into: Tensor = _GroupedMM.apply(x_MD, w_EDF, offsets)
        return into
    if chosen == "triton":
        from megalite_kernels.gpu.grouped_gemm import grouped_gemm as product

        sizes = (len(x_MD), *w_EDF.shape)
        tiles = None if tuned is None else tuned.tiles("grouped_gemm", x_MD.dtype, sizes)
        y: Tensor = product(x_MD, w_EDF, offsets, bias_EF, tiles)
        return y
    return moe_cpu.grouped_gemm(x_MD, w_EDF, offsets, bias_EF)


class _GroupedMM(torch.autograd.Function):
    """PyTorch's grouped_mm, which leaves rows after the last expert's unwritten: they are set to zero."""

    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, w_EDF: Tensor, offsets: Tensor) -> Tensor:
        x_MD = x_MD.contiguous()
        ctx.save_for_backward(x_MD, w_EDF, offsets)
        return _GroupedMM.product(x_MD, w_EDF, offsets)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w, offsets = ctx.saved_tensors
        grad, (need_x, need_w, _) = grad.contiguous(), ctx.needs_input_grad
        grad_x = _GroupedMM.product(grad, w.transpose(1, 2), offsets) if need_x else None
        if not need_w:
            return grad_x, None, None
        if w.stride(1) == 1:  # a transposed weight's gradient lies as the weight does
            grad_w = F.grouped_mm(grad.T, x, offs=offsets[1:]).transpose(1, 2)
        else:
            grad_w = F.grouped_mm(x.T, grad, offs=offsets[1:])
        empty = offsets[1:] == offsets[:-1]  # some builds leave what was in memory where there was nothing to add
        return grad_x, grad_w.masked_fill_(empty[:, None, None], 0.0), None

    @staticmethod
    def product(x_MD: Tensor, w_EDF: Tensor, offsets: Tensor) -> Tensor:
        y = F.grouped_mm(x_MD, w_EDF, offs=offsets[1:])
        rest = torch.arange(len(x_MD), device=x_MD.device) >= offsets[-1]
        return y.masked_fill_(rest[:, None], 0.0)
