"""What narrow numbers cost a linear layer, or the experts' products of one matrix, while training runs.

On a step that is looked at everything is multiplied a second time: as it is in training, and in a wider dtype from the
same factors. Every logical element counts once: of what several ranks hold alike one counts, and where a product is a
sum over ranks that sum is looked at. Dimensions: M tokens of a microbatch, N outputs, K inputs; E experts.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from megalite_kernels import linear, weight_gradient
from megalite_kernels.fp8 import dequantize_fp8
from torch import Tensor

from megalite.comm import Communicator
from megalite.model.linear import Linear
from megalite.parallel.fp4 import Fp4
from megalite.parallel.fp8 import KINDS, Factor, Fp8, Kind, multiplied, spread
from megalite.parallel.fp8_grouped import GroupedFp8, products

PRODUCTS = ("output", "input_gradient", "weight_gradient")
OF_FACTOR = ("nonzero", "underflow", "saturation")
OF_PRODUCT = ("signal", "noise", "nonzero", "underflow", "overflow")
SUMS = [(of, name) for of in KINDS for name in OF_FACTOR] + [(of, name) for of in PRODUCTS for name in OF_PRODUCT]
LARGEST = [(of, name) for of in KINDS for name in ("amax", "scale")]
NOISE = 2.0**-40
"""Of the largest value: what is smaller is zero in mathematics (gradients of a first token's query, say) and rounding
here, which is not the same on every layout."""
BEYOND = {torch.float8_e4m3fn: 464.0 / 448.0, torch.float8_e5m2: 61440.0 / 57344.0}
"""Over the largest number of the format, what would round to the next one if there were any."""


class Watched:
    """What was seen of one module in a step: `sums` in the order of SUMS, `largest` in that of LARGEST."""

    def __init__(self, name: str, comm: Communicator, device: torch.device) -> None:
        self.name, self.comm, self.device, self.active = name, comm, device, False
        self.clear()

    def clear(self) -> None:
        self.sums = torch.zeros(len(SUMS), dtype=torch.float64, device=self.device)
        self.largest = torch.zeros(len(LARGEST), dtype=torch.float64, device=self.device)

    def _looks_at(self, y: Tensor) -> bool:
        """Not where backward makes it a second time, nor where nothing is trained."""
        return self.active and torch._C._current_graph_task_id() == -1 and y.requires_grad

    def _factor(self, kind: Kind, values: Tensor, counts: bool, factor: Factor | None = None) -> None:
        if not values.numel():
            return
        self._enlarge(kind, "amax", values.abs().max())
        nonzero = ~zero(values)
        lost = beyond = torch.zeros_like(nonzero)
        if factor is not None:
            wide = dequantize_fp8(factor.codes, factor.scales, recipe=factor.blocks, dtype=torch.float64)
            lost = nonzero & (wide == 0)
            top = factor.codes.float().abs() == torch.finfo(factor.codes.dtype).max
            beyond = top & (values.abs() > wide.abs() * BEYOND[factor.codes.dtype])
            if factor.blocks == "tensorwise":
                self._enlarge(kind, "scale", factor.scales.max())
        if counts:
            self._add(kind, OF_FACTOR, [nonzero.sum(), lost.sum(), beyond.sum()])

    def _product(self, name: str, made: Tensor, exact: Tensor, over: Sequence[str], counts: bool) -> None:
        """`made` beside `exact`; both are terms of sums over the axes `over`."""
        both = torch.stack([made.to(exact.dtype), exact])
        if over:
            self.comm.all_reduce(both, *over)
        got, exact = both
        if counts and exact.numel():
            nonzero, wide = ~zero(exact), exact.double()
            sums = [wide.square().sum(), (got.double() - wide).square().sum(), nonzero.sum()]
            lost, beyond = nonzero & zero(got), exact.isfinite() & ~got.isfinite()
            self._add(name, OF_PRODUCT, [*sums, lost.sum(), beyond.sum()])

    def _add(self, of: str, names: Sequence[str], values: Sequence[Tensor]) -> None:
        places = [SUMS.index((of, name)) for name in names]
        self.sums[places] += torch.stack([value.double() for value in values])

    def _enlarge(self, of: str, name: str, value: Tensor) -> None:
        place = LARGEST.index((of, name))  # type: ignore[arg-type]
        self.largest[place] = torch.maximum(self.largest[place], value.double())


class WatchedLinear(Watched):
    """Of one linear. Communicates over cp and tp while a step runs."""

    def __init__(self, name: str, comm: Communicator, module: Linear) -> None:
        super().__init__(name, comm, module.weight.device)
        self.module, self.over = module, spread(comm.mesh, module.split, module.tp.sp)

    def __call__(self, x: Tensor, y: Tensor) -> None:
        """After y [..., N] was made of x [..., K]."""
        if self._looks_at(y):
            kept = x.detach().flatten(0, -2)
            self._forward(kept)
            y.register_hook(lambda gradient: self._backward(kept, gradient.flatten(0, -2)))

    def _fp8(self) -> Fp8 | None:
        assert not isinstance(self.module.fp8, Fp4), "log.statistics knows no nvfp4"
        return self.module.fp8

    @torch.no_grad()
    def _forward(self, x_MK: Tensor) -> None:
        weight, fp8 = self.module.weight.detach(), self._fp8()
        a = b = None
        if fp8 is None:
            made = linear(x_MK, weight)
        else:
            a, b = fp8.quantized("input", x_MK, "MK"), fp8.quantized("weight", weight, "NK")
            made = multiplied(a, b, x_MK.dtype)
        self._factor("input", x_MK, self._counts("MK"), a)
        self._factor("weight", weight, self._counts("NK", of_microbatch=False), b)
        self._seen("output", "MN", "K", made, x_MK, weight.t())

    @torch.no_grad()
    def _backward(self, x_MK: Tensor, dy_MN: Tensor) -> None:
        weight, fp8 = self.module.weight.detach(), self._fp8()
        gradient = None
        if fp8 is None:
            dx, dw = linear(dy_MN, weight.t()), weight_gradient(x_MK, dy_MN, weight.dtype)
        else:
            gradient = fp8.quantized("gradient", dy_MN, "MN")
            dx, dw = _fp8_gradients(fp8, gradient, x_MK, dy_MN, weight)
        self._factor("gradient", dy_MN, self._counts("MN"), gradient)
        self._seen("input_gradient", "MK", "N", dx, dy_MN, weight)
        self._seen("weight_gradient", "NK", "M", dw, dy_MN.t(), x_MK)

    def _seen(self, name: str, dims: str, summed: str, made: Tensor, a: Tensor, b: Tensor) -> None:
        """`made` beside a · b in a wider dtype."""
        narrow = self.module.fp8 is not None or made.dtype.itemsize < 4
        dtype = torch.float64 if a.dtype == torch.float64 or not narrow else torch.float32
        self._product(name, made, a.to(dtype) @ b.to(dtype), self.over[summed], self._counts(dims))

    def _counts(self, dims: str, of_microbatch: bool = True) -> bool:
        """Whether this rank's part of something with those dims is no copy of another's."""
        different = {axis for dim in dims for axis in self.over[dim]} | ({"dp"} if of_microbatch else set())
        return all(self.comm.mesh.index(axis) == 0 for axis in ("dp", "cp", "tp") if axis not in different)


def _fp8_gradients(fp8: Fp8, gradient: Factor, x: Tensor, dy: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    dx = multiplied(gradient, fp8.quantized("weight", weight.t(), "KN"), x.dtype)
    across = fp8.quantized("gradient", dy.t(), "NM"), fp8.quantized("input", x.t(), "KM")
    return dx, multiplied(*across, weight.dtype)


class WatchedExperts(Watched):
    """Of one matrix of all experts in FP8, where each expert's rows of each microbatch are a product of their own.
    Communicates over etp, and over edp where it has replicas that tokens of one microbatch go to, while a step runs."""

    def __init__(self, name: str, comm: Communicator, fp8: GroupedFp8, device: torch.device) -> None:
        super().__init__(name, comm, device)
        self.fp8, self.sources = fp8, fp8.sources

    def __call__(self, x: Tensor, weight: Tensor, offsets: Tensor, y: Tensor) -> None:
        """After y [M, N] was made of x [M, K] and weight [E, N, K]; rows offsets[p] to offsets[p + 1] are a product."""
        if self._looks_at(y):
            kept, ends = x.detach(), offsets.tolist()
            self._forward(kept, weight, ends)
            y.register_hook(lambda gradient: self._backward(kept, gradient, weight, ends))

    @torch.no_grad()
    def _forward(self, x: Tensor, weight: Tensor, ends: list[int]) -> None:
        rows, experts = [x[start:stop] for start, stop in pairwise(ends)], weight.detach().unbind(0)
        factors = self.fp8.quantized("input", rows, "MK")
        self._factors("input", rows, factors, self._counts("MK"))
        self._factors("weight", experts, self.fp8.quantized("weight", experts, "NK"), self._counts("NK"))
        made = products(self.fp8, x, ends, factors, weight.detach(), "NK")
        exact = self._exact(x, ends, weight.detach().transpose(1, 2))
        self._product("output", made, exact, self._along_etp("K"), self._counts("MN"))

    @torch.no_grad()
    def _backward(self, x: Tensor, dy: Tensor, weight: Tensor, ends: list[int]) -> None:
        given, got = ([of[start:stop] for start, stop in pairwise(ends)] for of in (x, dy))
        factors = self.fp8.quantized("gradient", got, "MN")
        self._factors("gradient", got, factors, self._counts("MN"))
        made = products(self.fp8, dy, ends, factors, weight.detach().transpose(1, 2), "KN")
        exact = self._exact(dy, ends, weight.detach())
        self._product("input_gradient", made, exact, self._along_etp("N"), self._counts("MK"))
        across = (
            self.fp8.quantized("gradient", [rows.t() for rows in got], "NM"),
            self.fp8.quantized("input", [rows.t() for rows in given], "KM"),
        )
        here = self.sources.places
        # Replicas that have tokens of one microbatch have terms of one sum; each counts what no other has.
        places, over = (range(self.comm.mesh.size("dp")), ["edp"]) if self.sources.spread else (here, [])
        counts = not over or self.comm.mesh.index("edp") == 0
        for place in places:
            both = torch.zeros(2, *weight.shape, dtype=_wide(x), device=x.device)
            for expert in range(len(weight)) if place in here else ():
                part = expert * len(here) + here.index(place)
                if len(given[part]):
                    both[0, expert] = multiplied(across[0][part], across[1][part], _wide(x))
                    both[1, expert] = got[part].t().to(_wide(x)) @ given[part].to(_wide(x))
            if over:
                self.comm.all_reduce(both, *over)
            for made, exact in zip(*both, strict=True):
                self._product("weight_gradient", made, exact, [], counts)

    def _factors(self, kind: Kind, values: Sequence[Tensor], factors: Sequence[Factor], counts: bool) -> None:
        for one, factor in zip(values, factors, strict=True):
            self._factor(kind, one, counts, factor)

    def _exact(self, rows: Tensor, ends: list[int], by: Tensor) -> Tensor:
        """Each part's rows times its expert's matrix."""
        out = torch.zeros(len(rows), by.shape[2], dtype=_wide(rows), device=rows.device)
        for part, (start, stop) in enumerate(pairwise(ends)):
            out[start:stop] = rows[start:stop].to(out.dtype) @ by[part // len(self.sources.places)].to(out.dtype)
        return out

    def _along_etp(self, dim: str) -> list[str]:
        return [axis for axis in self.fp8.over[dim] if axis == "etp"]

    def _counts(self, dims: str) -> bool:
        """As of a linear: every rank of edp x ep has rows of its own, and replicas along edp have the same weights."""
        mesh, cut = self.comm.mesh, any(self._along_etp(dim) for dim in dims)
        return (cut or mesh.index("etp") == 0) and ("M" in dims or mesh.index("edp") == 0)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def zero(x: Tensor) -> Tensor:
    """Which values are zero."""
    return x.abs() <= NOISE * torch.where(x.isfinite(), x.abs(), 0).max()
