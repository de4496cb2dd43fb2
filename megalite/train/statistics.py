"""What narrow numbers cost, by module (log.statistics): how much of each factor and product of a linear layer is lost.

On the steps that are asked for, every linear layer multiplies a second time: as it does in training, and in a
wider dtype from the same factors. Dimensions: M tokens of a microbatch, N outputs, K inputs. Every logical element
counts once: of what several ranks hold alike one counts, and where a product is a sum over ranks that sum is looked at.
Sums over microbatches; activations and gradients are those of each of them.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from megalite_kernels import linear, weight_gradient
from megalite_kernels.fp8 import dequantize_fp8
from torch import Tensor

from megalite.comm import Communicator
from megalite.mesh import AXES
from megalite.model.linear import Linear
from megalite.model.transformer import Transformer
from megalite.parallel.fp4 import Fp4
from megalite.parallel.fp8 import KINDS, Factor, Fp8, Kind, multiplied, spread

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


class Statistics:
    """Of this rank's stages, every `every`-th step; 0: never. `begin`, the step, `measure`. Changes no bit of training.

    Communicates while a step runs that is looked at: where ranks agree on scales, and where they hold terms of a sum.
    """

    def __init__(self, stages: Sequence[Transformer], comm: Communicator, every: int) -> None:
        self.comm, self.every, self.active = comm, every, False
        self.watched: list[_Linear] = []
        if every == 0:
            return
        for name, module in (of for stage in stages for of in stage.named_modules()):
            if isinstance(module, Linear) and all(module is not other.module for other in self.watched):
                module.watch = _Linear(self, name, module)
                self.watched.append(module.watch)
        everyone = comm.gather_json([watched.name for watched in self.watched])
        self.names = sorted({name for names in everyone for name in names}, key=_natural)

    def begin(self, step: int) -> None:
        self.active = self.every > 0 and step % self.every == 0
        for watched in self.watched if self.active else ():
            watched.clear()

    @torch.no_grad()
    def measure(self) -> dict[str, Any] | None:
        """By module, over the whole step, the same on every rank; None in a step that is not looked at."""
        if not self.active:
            return None
        self.active = False
        # On the host, where ranks without a linear are too.
        sums = torch.zeros(len(self.names), len(SUMS), dtype=torch.float64)
        largest = torch.zeros(len(self.names), len(LARGEST), dtype=torch.float64)
        for watched in self.watched:
            place = self.names.index(watched.name)
            sums[place], largest[place] = watched.sums.cpu(), watched.largest.cpu()
        self.comm.all_reduce(sums, *AXES)
        self.comm.all_reduce(largest, *AXES, op="max")
        rows = zip(self.names, sums.tolist(), largest.tolist(), strict=True)
        return {name: described(*row) for name, *row in rows}


class _Linear:
    """What one linear has seen in a step: `sums` in the order of SUMS, `largest` in that of LARGEST."""

    def __init__(self, statistics: Statistics, name: str, module: Linear) -> None:
        self.statistics, self.name, self.module, self.comm = statistics, name, module, statistics.comm
        self.over = spread(self.comm.mesh, module.split, module.tp.sp)
        self.clear()

    def clear(self) -> None:
        device = self.module.weight.device
        self.sums = torch.zeros(len(SUMS), dtype=torch.float64, device=device)
        self.largest = torch.zeros(len(LARGEST), dtype=torch.float64, device=device)

    def __call__(self, x: Tensor, y: Tensor) -> None:
        """After y [..., N] was made of x [..., K]; not where backward makes it a second time."""
        if not self.statistics.active or torch._C._current_graph_task_id() != -1 or not y.requires_grad:
            return
        kept = x.detach().flatten(0, -2)
        self._forward(kept)
        y.register_hook(lambda gradient: self._backward(kept, gradient.flatten(0, -2)))

    @torch.no_grad()
    def _forward(self, x_MK: Tensor) -> None:
        weight, fp8 = self.module.weight.detach(), self.module.fp8
        assert not isinstance(fp8, Fp4), "log.statistics knows no nvfp4"
        if fp8 is None:
            self._factor("input", x_MK, "MK")
            self._factor("weight", weight, "NK")
            made = linear(x_MK, weight)
        else:
            a, b = fp8.quantized("input", x_MK, "MK"), fp8.quantized("weight", weight, "NK")
            self._factor("input", x_MK, "MK", a)
            self._factor("weight", weight, "NK", b)
            made = multiplied(a, b, x_MK.dtype)
        self._product("output", "MN", "K", made, x_MK, weight.t())

    @torch.no_grad()
    def _backward(self, x_MK: Tensor, dy_MN: Tensor) -> None:
        weight, fp8 = self.module.weight.detach(), self.module.fp8
        assert not isinstance(fp8, Fp4), "log.statistics knows no nvfp4"
        if fp8 is None:
            self._factor("gradient", dy_MN, "MN")
            dx, dw = linear(dy_MN, weight.t()), weight_gradient(x_MK, dy_MN, weight.dtype)
        else:
            dx, dw = self._fp8_gradients(fp8, x_MK, dy_MN, weight)
        self._product("input_gradient", "MK", "N", dx, dy_MN, weight)
        self._product("weight_gradient", "NK", "M", dw, dy_MN.t(), x_MK)

    def _fp8_gradients(self, fp8: Fp8, x_MK: Tensor, dy_MN: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        gradient = fp8.quantized("gradient", dy_MN, "MN")
        self._factor("gradient", dy_MN, "MN", gradient)
        dx = multiplied(gradient, fp8.quantized("weight", weight.t(), "KN"), x_MK.dtype)
        across = fp8.quantized("gradient", dy_MN.t(), "NM"), fp8.quantized("input", x_MK.t(), "KM")
        return dx, multiplied(*across, weight.dtype)

    def _factor(self, kind: Kind, values: Tensor, dims: str, factor: Factor | None = None) -> None:
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
        if self._counts(dims, of_microbatch=kind != "weight"):
            self._add(kind, OF_FACTOR, [nonzero.sum(), lost.sum(), beyond.sum()])

    def _product(self, name: str, dims: str, summed: str, made: Tensor, a: Tensor, b: Tensor) -> None:
        """`made` beside a · b in a wider dtype; either may be a term of a sum over ranks."""
        narrow = self.module.fp8 is not None or made.dtype.itemsize < 4
        dtype = torch.float64 if a.dtype == torch.float64 or not narrow else torch.float32
        both = torch.stack([made.to(dtype), a.to(dtype) @ b.to(dtype)])
        if axes := self.over[summed]:
            self.comm.all_reduce(both, *axes)
        got, exact = both
        if self._counts(dims, of_microbatch=True):
            nonzero, wide = ~zero(exact), exact.double()
            sums = [wide.square().sum(), (got.double() - wide).square().sum(), nonzero.sum()]
            lost, beyond = nonzero & zero(got), exact.isfinite() & ~got.isfinite()
            self._add(name, OF_PRODUCT, [*sums, lost.sum(), beyond.sum()])

    def _counts(self, dims: str, of_microbatch: bool) -> bool:
        """Whether this rank's part of something with those dims is no copy of another's."""
        different = {axis for dim in dims for axis in self.over[dim]} | ({"dp"} if of_microbatch else set())
        return all(self.comm.mesh.index(axis) == 0 for axis in ("dp", "cp", "tp") if axis not in different)

    def _add(self, of: str, names: Sequence[str], values: Sequence[Tensor]) -> None:
        places = [SUMS.index((of, name)) for name in names]
        self.sums[places] += torch.stack([value.double() for value in values])

    def _enlarge(self, of: str, name: str, value: Tensor) -> None:
        place = LARGEST.index((of, name))  # type: ignore[arg-type]
        self.largest[place] = torch.maximum(self.largest[place], value.double())


def zero(x: Tensor) -> Tensor:
    """Which values are zero."""
    return x.abs() <= NOISE * torch.where(x.isfinite(), x.abs(), 0).max()


def described(sums: list[float], largest: list[float]) -> dict[str, Any]:
    """What metrics.jsonl has of a module. Of each factor: `amax`; the shares of its values that are not zero that
    become zero (`underflow`) or are cut off (`saturation`); `scale` where the whole tensor has one. Of each product:
    `sqnr_db`, the wide product's power over that of the difference (None: there is none); shares of its values that
    become zero, or inf (`overflow`)."""
    of, most = dict(zip(SUMS, sums, strict=True)), dict(zip(LARGEST, largest, strict=True))
    found: dict[str, Any] = {}
    for kind in KINDS:
        values = max(of[kind, "nonzero"], 1.0)
        found[kind] = {"amax": most[kind, "amax"]}
        found[kind] |= {name: of[kind, name] / values for name in ("underflow", "saturation")}
        if most[kind, "scale"]:
            found[kind]["scale"] = most[kind, "scale"]
    for product in PRODUCTS:
        values, signal, noise = max(of[product, "nonzero"], 1.0), of[product, "signal"], of[product, "noise"]
        decibel = 10 * math.log10(signal / noise) if 0 < noise < math.inf and 0 < signal < math.inf else None
        found[product] = {"sqnr_db": decibel, **{n: of[product, n] / values for n in ("underflow", "overflow")}}
    return found


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """So that layer 10 comes behind layer 9."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]
