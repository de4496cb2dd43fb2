"""The experts' grouped products in FP8: a tensor is what one expert computes of one microbatch, or one expert's weight.

So each expert has scales of its own, as in Transformer Engine's GroupedLinear, and no row, tile or block reaches from
one expert's rows into another's, as in DeepSeek-V3's products (arXiv:2412.19437 §3.3). Rows come sorted by expert and
microbatch (`Work.sources`). Dimensions: M sorted rows in P parts, E experts, N outputs, K inputs.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from megalite_kernels.fp8 import fp8_amax
from torch import Tensor

from megalite.comm import Communicator
from megalite.parallel.experts import Sources
from megalite.parallel.fp8 import Factor, History, Kind, Recipe, WeightFactors, factor, multiplied, scaled, unless_lost


class GroupedFp8:
    """How one matrix of all experts multiplies. `split`: what of it etp cuts. The ranks that hold parts of the same
    tensor agree on its amax: along etp, and along edp where it has replicas that tokens of one microbatch go to. Each
    part is a product of its own, so that the host reads where parts begin."""

    def __init__(self, recipe: Recipe, comm: Communicator, split: Literal["outputs", "inputs"]) -> None:
        self.recipe, self.comm = recipe, comm
        self.history = History() if recipe.name == "delayed" else None
        self.sources = Sources.of(comm.mesh)
        cut = ["etp"] * (comm.mesh.size("etp") > 1)
        self.over = {"M": ["edp"] * self.sources.spread, "N": [], "K": []} | {"N" if split == "outputs" else "K": cut}
        self.gathered: Tensor | None = None
        self.weights = WeightFactors()
        self.watch: Callable[[Tensor, Tensor, Tensor, Tensor], None] | None = None  # is told x, weight, offsets and y

    def gather(self, amax_E: Tensor) -> Tensor:
        """As of `Fp8`, of each expert."""
        if self.history is not None:
            self.history.note("weight", amax_E)
            amax_E = self._known("weight", amax_E)
        self.gathered = amax_E
        return amax_E

    def product(self, x_MK: Tensor, weight_ENK: Tensor, offsets: Tensor, bias_EN: Tensor | None) -> Tensor:
        """[M, N] in x's dtype: rows offsets[p] to offsets[p + 1] times their expert's weightᵀ, plus its bias; rows
        after the last are zero. Communicates where scales are agreed on, also going back."""
        y: Tensor = _Grouped.apply(x_MK, weight_ENK, bias_EN, offsets, self)
        if self.watch is not None:
            self.watch(x_MK, weight_ENK, offsets, y)
        return y

    def quantized(self, kind: Kind, parts: Sequence[Tensor], dims: str) -> list[Factor]:
        """A factor [rows, columns] of each part's product, or of each expert's; `dims` are two of M, N and K."""
        if kind == "weight":
            return self.weights.of(dims, lambda: self._quantized(kind, parts, dims))
        return self._quantized(kind, parts, dims)

    def _quantized(self, kind: Kind, parts: Sequence[Tensor], dims: str) -> list[Factor]:
        blocks, dtype = self.recipe.blocks(kind), self.recipe.dtype(kind)
        axes: Sequence[str] = ()
        if blocks == "tensorwise":
            axes = self.over[dims[0]] + self.over[dims[1]]
        elif blocks == "rowwise":
            axes = self.over[dims[1]]
        parts = [part.contiguous() for part in parts]
        if kind == "weight" and self.gathered is not None:
            amaxes = self.gathered.view(-1, 1, 1)
            return [factor(part, blocks, dtype, amax) for part, amax in zip(parts, amaxes, strict=True)]
        if self.history is None and not axes:
            return [factor(part, blocks, dtype) for part in parts]
        found = [fp8_amax(part, recipe=blocks) for part in parts]
        amax = torch.cat([of.flatten() for of in found])
        if self.history is not None:
            self.history.note(kind, amax)
        if self.history is None or not self.history.knows(kind):
            amax = self._agreed(amax, axes, len(parts))
        amax = self._known(kind, amax)
        amaxes = amax.split([of.numel() for of in found])
        return [
            factor(part, blocks, dtype, agreed.view_as(of))
            for part, agreed, of in zip(parts, amaxes, found, strict=True)
        ]

    def _known(self, kind: Kind, amax: Tensor) -> Tensor:
        """What scales the parts: what their experts' histories say, where they say anything."""
        if self.history is None or (known := self.history.of(kind)) is None:
            return amax
        known = known.repeat_interleave(len(amax) // len(known))
        return torch.where(known > 0, unless_lost(known, amax), amax)

    def _agreed(self, amax: Tensor, axes: Sequence[str], parts: int) -> Tensor:
        """The largest of all ranks', of each part equally many. Along edp by the place of a part's microbatch, for
        other microbatches may meet at a replica."""
        amax, places = amax.nan_to_num(torch.inf, torch.inf), list(self.sources.places)  # a library's max may lose NaN
        for axis in axes:
            if axis != "edp":
                self.comm.all_reduce(amax, axis, op="max")
                continue
            experts = parts // len(places)
            table = amax.new_zeros(experts, self.comm.mesh.size("dp"), len(amax) // parts)
            table[:, places] = amax.view(experts, len(places), -1)
            self.comm.all_reduce(table, axis, op="max")
            amax = table[:, places].flatten()
        return amax


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor, fp8: GroupedFp8) -> Tensor:
        ends = offsets.tolist()
        ctx.save_for_backward(x, weight)
        ctx.fp8, ctx.ends, ctx.bias_dtype = fp8, ends, None if bias is None else bias.dtype
        factors = fp8.quantized("input", _parts(x, ends), "MK")
        ctx.input_scales = _scales(factors)
        y = products(fp8, x, ends, factors, weight.detach(), "NK")
        if bias is not None:
            for part, (start, stop) in enumerate(pairwise(ends)):
                y[start:stop] += bias[part // len(fp8.sources.places)]
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), fp8, ends = ctx.saved_tensors, ctx.fp8, ctx.ends
        grad_x = grad_weight = grad_bias = None
        known: dict[Kind, list[Tensor]] = {"input": ctx.input_scales}
        if ctx.needs_input_grad[0]:
            factors = fp8.quantized("gradient", _parts(grad, ends), "MN")
            known["gradient"] = _scales(factors)
            grad_x = products(fp8, grad, ends, factors, weight.transpose(1, 2), "KN")
        if ctx.needs_input_grad[1]:
            grad_weight = _weight_gradient(fp8, x, grad, ends, weight, known)
        if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
            sums = [_wide(rows).sum(0) for rows in _parts(grad, ends)]
            grad_bias = torch.stack(sums).view(len(weight), -1, grad.shape[1]).sum(1).to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, None, None


def products(
    fp8: GroupedFp8, rows: Tensor, ends: list[int], factors: Sequence[Factor], weight: Tensor, dims: str
) -> Tensor:
    """Each part's rows times its expert's weightᵀ; what no expert has is zero."""
    weights = fp8.quantized("weight", weight.unbind(0), dims)
    out = rows.new_zeros(len(rows), weight.shape[1])
    for part, (start, stop) in enumerate(pairwise(ends)):
        if start < stop:
            out[start:stop] = multiplied(factors[part], weights[part // len(fp8.sources.places)], rows.dtype)
    return out


def _weight_gradient(
    fp8: GroupedFp8, x: Tensor, grad: Tensor, ends: list[int], weight: Tensor, known: dict[Kind, list[Tensor]]
) -> Tensor:
    """[E, N, K]: of each expert the sum over its microbatches' products, each quantised along its rows. `known`: scales
    that are those of the transposed parts too."""
    gradients = _turned(fp8, "gradient", _parts(grad, ends), "NM", known)
    inputs = _turned(fp8, "input", _parts(x, ends), "KM", known)
    out = torch.zeros_like(weight, dtype=_wide(weight[:0]).dtype)
    for part, (start, stop) in enumerate(pairwise(ends)):
        if start < stop:
            out[part // len(fp8.sources.places)] += multiplied(gradients[part], inputs[part], out.dtype)
    return out.to(weight.dtype)


def _scales(factors: Sequence[Factor]) -> list[Tensor]:
    """Of whole parts; none where rows or blocks have their own."""
    return [factor.scales for factor in factors if factor.blocks == "tensorwise"]


def _turned(
    fp8: GroupedFp8, kind: Kind, parts: Sequence[Tensor], dims: str, known: dict[Kind, list[Tensor]]
) -> list[Factor]:
    """The factors of the transposed parts."""
    turned = [rows.t() for rows in parts]
    if not (scales := known.get(kind)):
        return fp8.quantized(kind, turned, dims)
    blocks, dtype = fp8.recipe.blocks(kind), fp8.recipe.dtype(kind)
    return [scaled(part, blocks, dtype, scale) for part, scale in zip(turned, scales, strict=True)]


def _parts(rows: Tensor, ends: list[int]) -> list[Tensor]:
    return [rows[start:stop] for start, stop in pairwise(ends)]


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
