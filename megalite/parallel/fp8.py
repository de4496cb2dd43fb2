"""Linear layers multiplied in FP8: what each recipe quantises in blocks of what shape, and which ranks agree on scales.

All three products of a layer (y = x wᵀ, dx = dy w, dw = dyᵀ x) take quantised factors and add up in float32 (in float64
for a float64 model, so that layouts can be compared). Where the hardware has no FP8 product, the same numbers come from
factors widened again. Dimensions: M tokens of a microbatch, N outputs, K inputs; a factor is [rows, columns] and its
columns are what the product sums over.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from megalite_kernels.fp8 import fp8_amax, fp8_scale, quantize_fp8, scaled_mm
from torch import Tensor, nn

from megalite.comm import Communicator
from megalite.mesh import Mesh
from megalite.parallel.deferred import DeferredWeights

Kind = Literal["input", "weight", "gradient"]
KINDS: tuple[Kind, ...] = ("input", "weight", "gradient")
FORMATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
BLOCKS = {
    "delayed": ("tensorwise", "tensorwise", "tensorwise"),
    "tensorwise": ("tensorwise", "tensorwise", "tensorwise"),
    "rowwise": ("rowwise", "rowwise", "rowwise"),
    "blockwise": ("blockwise_1x128", "blockwise_128x128", "blockwise_1x128"),  # DeepSeek-V3, arXiv:2412.19437
    "mxfp8": ("mxfp8", "mxfp8", "mxfp8"),
}
"""Recipe -> what shares a scale in inputs, weights and gradients, as `megalite_kernels.fp8` names it."""
SQUARE = ("tensorwise", "blockwise_128x128")
"""What shares a scale in the transposed matrix too."""
USUAL_BACKWARD = {"delayed": "e5m2", "tensorwise": "e5m2", "rowwise": "e4m3", "blockwise": "e4m3", "mxfp8": "e4m3"}


@dataclass(frozen=True)
class Recipe:
    """`backward`: the format of gradients; inputs and weights are e4m3."""

    name: str
    backward: str

    def blocks(self, kind: Kind) -> str:
        return BLOCKS[self.name][KINDS.index(kind)]

    def dtype(self, kind: Kind) -> torch.dtype:
        return FORMATS[self.backward if kind == "gradient" else "e4m3"]


class Factor(NamedTuple):
    """[rows, columns] in FP8; `blocks`: what shares a scale, as `megalite_kernels.fp8` names it."""

    codes: Tensor
    scales: Tensor
    blocks: str

    def transposed(self) -> "Factor":
        """[columns, rows]: the same numbers, where blocks are square."""
        return Factor(self.codes.t().contiguous(), self.scales.t().contiguous(), self.blocks)


class WeightFactors:
    """A weight's factors, or its experts', while they are the same: from `begin` to `end` of a step, made when first
    asked for. Outside of a step, and of weights that ZeRO 3 holds for one use alone, nothing is kept."""

    def __init__(self) -> None:
        self.kept: dict[str, list[Factor]] | None = None

    def begin(self) -> None:
        self.kept = {}

    def end(self) -> None:
        self.kept = None

    def of(self, dims: str, make: Callable[[], list[Factor]]) -> list[Factor]:
        """For a product of those two of N and K."""
        if self.kept is None:
            return make()
        if dims not in self.kept:
            across = self.kept.get(dims[::-1])
            square = across is not None and across[0].blocks in SQUARE
            self.kept[dims] = [one.transposed() for one in across] if across and square else make()
        return self.kept[dims]


def factor(values: Tensor, blocks: str, dtype: torch.dtype, amax: Tensor | None = None) -> Factor:
    """A matrix in FP8, each block scaled by the largest value given for it, else by its own."""
    return scaled(values, blocks, dtype, None if amax is None else fp8_scale(amax, dtype=dtype))


def scaled(values: Tensor, blocks: str, dtype: torch.dtype, scale: Tensor | None) -> Factor:
    """A matrix in FP8 by scales that are known; None: by its own."""
    codes, scales = quantize_fp8(values.contiguous(), recipe=blocks, dtype=dtype, scale=scale)
    return Factor(codes, scales, blocks)


def multiplied(a: Factor, b: Factor, dtype: torch.dtype) -> Tensor:
    """a · bᵀ."""
    return scaled_mm(a.codes, a.scales, b.codes, b.scales, recipe_a=a.blocks, recipe_b=b.blocks, out_dtype=dtype)


def spread(mesh: Mesh, split: str | None, sp: bool) -> dict[str, list[str]]:
    """Dim of a linear's products -> the axes whose ranks hold parts of it. `split`: as of `Linear`; `sp`: as of the
    residual stream."""
    tokens = ["cp", "tp"] if split is None and sp else ["cp"]
    over = {"M": tokens, "N": ["tp"] * (split == "outputs"), "K": ["tp"] * (split == "inputs")}
    return {dim: [axis for axis in axes if mesh.size(axis) > 1] for dim, axes in over.items()}


class History:
    """Delayed scaling (arXiv:2209.05433): a tensor's scale follows from the largest values of the last steps, so that
    nothing is read or agreed on before a product. `values` [kinds, steps], or of each expert [experts, kinds, steps],
    the newest first, the same on all ranks that hold a part of the tensor.

    `begin` reads it once a step; a kind without any history, as in the first step, is scaled by its current values.
    `complete`: by kind, whether all have one. `amax` [..., kinds]: 0 where there is none.
    """

    def __init__(self) -> None:
        self.values: Tensor | None = None  # the module's, which the engine makes and moves
        self.complete = [False] * len(KINDS)
        self.amax: Tensor | None = None
        self.seen = torch.empty(0)

    def begin(self) -> Tensor:
        """By kind, whether all have a history: for `complete`, which the host is told of all modules at once."""
        assert self.values is not None
        self.amax = self.values.detach().amax(-1).float()
        self.seen = torch.zeros_like(self.amax)
        return (self.amax > 0).view(-1, len(KINDS)).all(0)

    def of(self, kind: Kind) -> Tensor | None:
        """The largest value of the last steps, or of each expert [experts]; None where nothing ever began."""
        return None if self.amax is None else self.amax[..., KINDS.index(kind)]

    def knows(self, kind: Kind) -> bool:
        return self.complete[KINDS.index(kind)]

    def note(self, kind: Kind, amax: Tensor) -> None:
        if self.amax is not None:
            seen = self.seen[..., KINDS.index(kind)]
            largest = amax.nan_to_num(torch.inf, torch.inf).reshape(*seen.shape, -1).amax(-1)
            torch.maximum(seen, largest, out=seen)

    def extend(self, seen: Tensor) -> None:
        """Put what a step saw, over all ranks, in front; a kind that saw inf or NaN keeps what it had."""
        assert self.values is not None
        values = self.values.detach()
        moved = torch.cat((seen[..., None].to(values.dtype), values[..., :-1]), dim=-1)
        values.copy_(torch.where(seen.isfinite()[..., None], moved, values))

    def rescale(self, times: float) -> None:
        """The loss scale was multiplied by a power of two, and so will gradients be: no bit of a quotient changes."""
        assert self.values is not None
        self.values.detach()[..., KINDS.index("gradient"), :].mul_(times)


def unless_lost(known: Tensor, amax: Tensor) -> Tensor:
    """The largest values known before, or inf where the present one is inf or NaN: a scale from before would cut it off
    to a number, and hide the step that must be skipped."""
    return torch.where(amax.isfinite(), known, torch.inf)


class Fp8:
    """How one linear multiplies. `split`, `sp`: as of `Linear` and the residual stream; they say which ranks hold parts
    of the same tensor. Where a scale spans more than one rank's part they agree on its amax, so scales are those of one
    process. Blocks of a fixed size are never shared: they start anew with every rank's part.
    """

    multiply = staticmethod(multiplied)

    def __init__(self, recipe: Recipe, comm: Communicator, split: str | None, sp: bool) -> None:
        self.recipe, self.comm = recipe, comm
        self.history = History() if recipe.name == "delayed" else None
        self.over = spread(comm.mesh, split, sp)
        self.gathered: Tensor | None = None
        self.weights = WeightFactors()

    def gather(self, amax: Tensor) -> Tensor:
        """The largest value that scales a weight whose own is `amax` [1], which those who gather it agreed on: it is
        what scales the products of this weight from now on."""
        if self.history is not None:
            self.history.note("weight", amax)
            if self.history.knows("weight") and (known := self.history.of("weight")) is not None:
                amax = unless_lost(known.view(1), amax)
        self.gathered = amax
        return amax

    def linear(
        self, x: Tensor, weight_NK: nn.Parameter, bias_N: Tensor | None, deferred: DeferredWeights | None
    ) -> Tensor:
        """x[..., K] · weightᵀ + bias, in x's dtype. Communicates where scales are agreed on, also going back."""
        y: Tensor = Product.apply(x, weight_NK, self, deferred)
        return y if bias_N is None else y + bias_N

    def quantized(self, kind: Kind, values: Tensor, dims: str) -> Factor:
        """A factor [rows, columns] of a product; its `dims` are two of M, N and K."""
        if kind == "weight":
            return self.weights.of(dims, lambda: [self._quantized(kind, values, dims)])[0]
        return self._quantized(kind, values, dims)

    def _quantized(self, kind: Kind, values: Tensor, dims: str) -> Factor:
        blocks, dtype, values = self.recipe.blocks(kind), self.recipe.dtype(kind), values.contiguous()
        if kind == "weight" and self.gathered is not None:
            return factor(values, blocks, dtype, self.gathered.view(1, 1))
        axes: Sequence[str] = ()
        if blocks == "tensorwise":
            axes = self.over[dims[0]] + self.over[dims[1]]
        elif blocks == "rowwise":
            axes = self.over[dims[1]]
        if self.history is None and not axes:
            return factor(values, blocks, dtype)
        amax = fp8_amax(values, recipe=blocks)
        known = None
        if self.history is not None:
            self.history.note(kind, amax)
            if self.history.knows(kind):
                known = self.history.of(kind)
        if known is None:
            amax = amax.nan_to_num(torch.inf, torch.inf)  # a library's max may lose a NaN
            for axis in axes:
                self.comm.all_reduce(amax, axis, op="max")
            known = amax
        return factor(values, blocks, dtype, unless_lost(known.view_as(amax), amax))

    def scales(self, kind: Kind, made: Factor) -> dict[str, Tensor]:
        """What `weight_gradient` need not find or agree on: a whole tensor's scale is the transposed one's too."""
        return {kind: made.scales} if made.blocks == "tensorwise" else {}

    def weight_gradient(self, x: Tensor, grad_y: Tensor, dtype: torch.dtype, **scales: Tensor) -> Tensor:
        """[N, K] from the input [..., K] and the output's gradient [..., N]; both are quantised along the tokens."""
        gradient = self._turned("gradient", grad_y.flatten(0, -2).t(), "NM", scales)
        return multiplied(gradient, self._turned("input", x.flatten(0, -2).t(), "KM", scales), dtype)

    def _turned(self, kind: Kind, values: Tensor, dims: str, scales: Mapping[str, Tensor]) -> Factor:
        if kind not in scales:
            return self.quantized(kind, values, dims)
        return scaled(values, self.recipe.blocks(kind), self.recipe.dtype(kind), scales[kind])


class Product(torch.autograd.Function):
    """x · weightᵀ from the factors that `how`, an `Fp8` or `Fp4`, makes and multiplies, forward and back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter, how: Any, deferred: DeferredWeights | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.how, ctx.deferred, ctx.weight = how, deferred, None if deferred is None else weight
        factors = how.quantized("input", x.flatten(0, -2), "MK"), how.quantized("weight", weight.detach(), "NK")
        ctx.scales = how.scales("input", factors[0])
        y: Tensor = how.multiply(*factors, x.dtype)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), how, deferred, scales = ctx.saved_tensors, ctx.how, ctx.deferred, ctx.scales
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            gradient = how.quantized("gradient", grad_y.flatten(0, -2), "MN")
            grad_x = how.multiply(gradient, how.quantized("weight", weight.t(), "KN"), x.dtype).view_as(x)
            scales = scales | how.scales("gradient", gradient)
        weight_gradient = partial(how.weight_gradient, **scales)
        if deferred is not None and deferred.waiting is not None:
            deferred.keep(ctx.weight, x, grad_y, weight_gradient)
        else:
            grad_weight = weight_gradient(x, grad_y, weight.dtype)
        return grad_x, grad_weight, None, None
