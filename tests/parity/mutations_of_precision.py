"""Deliberate faults in scales: who agrees on them, what they are taken of, what a step remembers, and in the loss's."""

from typing import Any

import torch
from megalite_kernels.fp8 import dequantize_fp8
from torch import Tensor

from megalite.comm import Communicator
from megalite.model.router import Router
from megalite.parallel import collectives, fp8_gather
from megalite.parallel.data import Gradients
from megalite.parallel.experts import Sources
from megalite.parallel.fp8 import FORMATS, Factor, Fp8, History, Recipe, WeightFactors
from megalite.parallel.fp8_grouped import GroupedFp8
from megalite.pipeline.runtime import Pipeline
from megalite.train.fp8_steps import Fp8Steps
from tests.parity.layouts import Layout, Task
from tests.parity.mutations import Patch, around, fault

TENSORWISE = (Layout(tp=2), Task("untied", steps=2, fp8="tensorwise"))
ROWWISE = (Layout(tp=2), Task("untied", steps=2, fp8="rowwise"))
DELAYED = (Layout(dp=2), Task("untied", steps=3, fp8="delayed"))
MEETING = (Layout(dp=2, ep=2), Task("experts", steps=2, fp8="tensorwise"))
EXPERTS_DELAYED = (Layout(dp=2, ep=2), Task("experts", steps=3, fp8="delayed"))
REPLICAS = (Layout(cp=2), Task("experts", steps=2, fp8="tensorwise"))
CUT = (Layout(dp=2, etp=2), Task("gpt-oss", steps=2, fp8="rowwise"))
DISPATCH = (Layout(dp=2, ep=2), Task("experts", steps=2, fp8_dispatch=True))
GATHERED = (Layout(dp=2, zero=3), Task("untied", steps=2, fp8="tensorwise"))
SCALED = (Layout(dp=2, ep=2), Task("deepseek-v3", steps=2, loss_scale=2.0**10))


def over(owner: Any, change: dict[str, Any]) -> Patch:
    """Ranks agree along other axes: `change` maps M, N and K to axes, or to the dim whose axes they take."""

    def made(original: Any, self: Any, *arguments: Any) -> None:
        original(self, *arguments)
        found = dict(self.over)
        self.over = {dim: found.get(change[dim], []) if dim in change else axes for dim, axes in found.items()}

    return around(owner, "__init__", made)


@fault("fp8: where tp cuts outputs, ranks agree on the inputs' scale, and the other way round", TENSORWISE)
def _() -> Patch:
    return over(Fp8, {"N": "K", "K": "N"})


@fault("fp8: a row that tp cuts has a scale of each part", ROWWISE)
def _() -> Patch:
    return over(Fp8, {"N": "", "K": ""})


@fault("fp8: gradients are e4m3, as inputs and weights are", TENSORWISE)
def _() -> Patch:
    return around(Recipe, "dtype", lambda original, self, kind: FORMATS["e4m3"])


@fault("fp8: the transposed weight is made of codes that were scaled along its other dim", ROWWISE)
def _() -> Patch:
    def twice(original: Any, self: Fp8, kind: Any, values: Tensor, dims: str) -> Factor:
        if dims == "KN":
            codes, scales, blocks = original(self, kind, values.t(), "NK")
            values = dequantize_fp8(codes, scales, recipe=blocks, dtype=values.dtype).t()
        found: Factor = original(self, kind, values, dims)
        return found

    return around(Fp8, "quantized", twice)


@fault("fp8: a weight's factors stay as they were in the first step", ROWWISE)
def _() -> Patch:
    first: dict[tuple[int, str], list[Factor]] = {}

    def stale(original: Any, self: WeightFactors, dims: str, make: Any) -> list[Factor]:
        return first.setdefault((id(self), dims), original(self, dims, make))

    return around(WeightFactors, "of", stale)


@fault("delayed: every rank keeps the largest values of its own microbatches", DELAYED)
def _() -> Patch:
    def alone(original: Any, self: Fp8Steps, **words: Any) -> None:
        with around(Communicator, "all_reduce", lambda *_, **__: None):
            original(self, **words)

    return around(Fp8Steps, "update", alone)


@fault("delayed: a run that was resumed has forgotten its histories", DELAYED)
def _() -> Patch:
    def begin(original: Any, self: Fp8Steps) -> None:
        self.begun = getattr(self, "begun", 0) + 1  # type: ignore[attr-defined]
        if self.begun == 3:
            for histories in self.histories.values():
                for history in histories:
                    assert history.values is not None
                    history.values.detach().zero_()
        original(self)

    return around(Fp8Steps, "begin", begin)


@fault("delayed: scales are those of the steps before the last", DELAYED)
def _() -> Patch:
    kept: dict[int, Tensor] = {}

    def late(original: Any, self: History, seen: Tensor) -> None:
        original(self, kept.get(id(self), torch.zeros_like(seen)))
        kept[id(self)] = seen.clone()

    return around(History, "extend", late)


@fault("delayed: the histories of experts are those of the first", EXPERTS_DELAYED)
def _() -> Patch:
    def first(original: Any, self: History, kind: Any) -> Tensor | None:
        found: Tensor | None = original(self, kind)
        return found if found is None or not found.dim() else found[:1].expand_as(found)

    return around(History, "of", first)


@fault("fp8, ep: microbatches that meet at an expert share a scale", MEETING)
def _() -> Patch:
    return around(Sources, "of", lambda original, mesh: Sources())


@fault("fp8, cp: replicas of an expert scale a microbatch each by their own tokens", REPLICAS)
def _() -> Patch:
    return over(GroupedFp8, {"M": ""})


@fault("fp8, etp: parts of an expert do not agree on rows that are cut", CUT)
def _() -> Patch:
    return over(GroupedFp8, {"N": "", "K": ""})


@fault("fp8, ep: transposed weights have the next expert's scales", MEETING)
def _() -> Patch:
    def rolled(original: Any, self: GroupedFp8, kind: Any, parts: Any, dims: str) -> list[Factor]:
        found: list[Factor] = original(self, kind, parts, dims)
        if dims != "KN":
            return found
        scales = [of.scales for of in found]
        moved = [*scales[1:], scales[0]]
        return [of._replace(scales=scale) for of, scale in zip(found, moved, strict=True)]

    return around(GroupedFp8, "quantized", rolled)


@fault("fp8 dispatch: scales arrive with other rows", DISPATCH)
def _() -> Patch:
    def rolled(original: Any, packed: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
        scales = packed[:, columns:].roll(1, 0)
        found: Tensor = original(torch.cat((packed[:, :columns], scales), 1), columns, dtype)
        return found

    return around(collectives, "unpack", rolled)


@fault("fp8 dispatch: sums of experts travel back in FP8 too", DISPATCH)
def _() -> Patch:
    def forward(original: Any, ctx: Any, x: Tensor, *rest: Any) -> Tensor:
        result: Tensor = original(ctx, collectives.rounded(x) if rest[-1] else x, *rest)
        return result

    return around(collectives._Exchange, "forward", forward)


@fault("fp8, zero 3: ranks make codes of their rows each by their own largest value", GATHERED)
def _() -> Patch:
    def apart(original: Any, *arguments: Any) -> Any:
        with around(Communicator, "all_reduce", lambda *_, **__: None):
            return original(*arguments)

    return around(fp8_gather, "_agreed", apart)


@fault("loss scale: not all ranks have the same", SCALED)
def _() -> Patch:
    def otherwise(original: Any, self: Pipeline, batches: Any, tokens: float, ahead: Any, scale: float) -> Tensor:
        factor = 2.0 ** self.comm.mesh.index("dp")
        result: Tensor = original(self, batches, tokens, ahead, scale * factor)
        return result

    return around(Pipeline, "train", otherwise)


@fault("loss scale: the routers' own losses are not scaled", SCALED)
def _() -> Patch:
    return around(
        Router,
        "__setattr__",
        lambda original, self, name, value: original(self, name, 1.0 if name == "loss_scale" else value),
    )


@fault("loss scale: gradients are divided by it twice", SCALED)
def _() -> Patch:
    def twice(original: Any, self: Gradients, factor: float) -> None:
        original(self, factor)
        original(self, factor)

    return around(Gradients, "scale", twice)
