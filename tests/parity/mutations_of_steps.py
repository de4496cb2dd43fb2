"""Deliberate faults in what spreads samples and layers: data parallelism, ZeRO, optimizers, pipelines."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from torch import Tensor

from megalite.model.transformer import Losses, Transformer
from megalite.optim.optimizer import Optimizer
from megalite.parallel import data, weights
from megalite.parallel.data import Gradients
from megalite.parallel.deferred import DeferredWeights
from megalite.pipeline import runtime
from megalite.pipeline.runtime import Pipeline
from megalite.pipeline.schedule import Kind
from megalite.train import build
from tests.parity.layouts import Layout, Task
from tests.parity.mutations import (
    DP,
    GPIPE,
    PP,
    RING,
    TP_CLIPPED,
    ZERO_1,
    ZERO_2,
    ZERO_BUBBLE,
    Patch,
    around,
    fault,
    placed_otherwise,
)  # fmt: skip


@fault("dp: the loss is divided by the rank's own token count", DP)
def _() -> Patch:
    def own(original: Any, self: Pipeline, batches: list[Any], tokens: float, *ahead: Any) -> Tensor:
        sums: Tensor = original(self, batches, float(sum((batch.targets >= 0).sum() for batch in batches)), *ahead)
        return sums

    return around(Pipeline, "train", own)


@fault("dp: gradients are averaged over ranks", DP)
def _() -> Patch:
    def averaged(original: Any, self: Gradients) -> None:
        original(self)
        self.scale(1 / self.comm.mesh.size("dp"))

    return around(Gradients, "finish", averaged)


@fault("dp: gradients are not summed over dp", DP)
def _() -> Patch:
    return placed_otherwise(lambda p, declared: replace(p, replicas=("cp",)))


@fault("cp: without dp, gradients are not summed at all", RING)
def _() -> Patch:
    return placed_otherwise(lambda p, declared: replace(p, replicas=("dp",)))


@fault("dp: gradients are reduced after the first microbatch already", DP)
def _() -> Patch:
    @contextmanager
    def early(original: Any, self: Gradients, chunk: int, *_: Any, **options: Any) -> Iterator[None]:
        with original(self, chunk, True, **options):
            yield
        for buffer in self._buffers:
            buffer.settle()

    return around(Gradients, "accumulating", early)


@fault("dp: a rank takes one sample twice and leaves one out", DP)
def _() -> Patch:
    def repeated(original: Any, self: Pipeline, batches: list[Any], tokens: float, *ahead: Any) -> Tensor:
        sums: Tensor = original(self, [*batches[:-1], batches[0]], tokens, *ahead)
        return sums

    return around(Pipeline, "train", repeated)


@fault("z-loss is left out", DP)
def _() -> Patch:
    def without(original: Any, self: Pipeline, *arguments: Any) -> Tensor:
        self.z_loss = 0.0
        sums: Tensor = original(self, *arguments)
        return sums

    return around(Pipeline, "train", without)


@fault("tp: clipping goes by the rank's own norm", TP_CLIPPED)
def _() -> Patch:
    return patch.object(data, "AXES", ())


@fault("zero 1: updated weights are not gathered", ZERO_1)
def _() -> Patch:
    return patch.object(weights.ShardedWeights, "gather", lambda self: None)


@fault("zero 1: the norm is of the rank's own shard", ZERO_1)
def _() -> Patch:
    return patch.object(data, "AXES", ())


@fault("zero 2: a microbatch's sum replaces the one before", ZERO_2)
def _() -> Patch:
    def settle(original: Any, self: Any) -> None:
        if self._got is not None:
            self.shard.zero_()
        original(self)

    return around(data._Buffer, "settle", settle)


@fault("momentum is lost after every step", DP)
def _() -> Patch:
    return _after_step("momentum_buffer")


@fault("AdamW forgets how many steps it has done", ZERO_1)
def _() -> Patch:
    return _after_step("step")


def _after_step(key: str) -> Patch:
    def step(original: Any, self: Optimizer, number: int) -> None:
        original(self, number)
        for rule in self.rules:
            for state in rule.state.values():
                state[key].zero_()

    return around(Optimizer, "step", step)


@fault("pp: the tied embedding's gradients are not summed over its stages", PP)
def _() -> Patch:
    return placed_otherwise(lambda p, declared: replace(p, tied=()))


@fault("pp: the norm counts the tied embedding at both ends", PP)
def _() -> Patch:
    return placed_otherwise(lambda p, declared: replace(p, counted=True))


@fault("pp: the loss weighs microbatches alike, not tokens", PP)
def _() -> Patch:
    def mean(original: Any, self: Transformer, tokens: Tensor, targets: Tensor, *rest: Any, **options: Any) -> Losses:
        found = original(self, tokens, targets, *rest, **options)
        weight = 10 / max(1, int((targets >= 0).sum()))
        return Losses(found.nll_sum * weight, found.z_sum * weight)

    return around(Transformer, "loss", mean)


@fault("pp: gradients are scaled by the token count of the first microbatch", PP)
def _() -> Patch:
    def scaled(original: Any, self: Pipeline, batches: list[Any], tokens: float, *ahead: Any) -> Tensor:
        sums: Tensor = original(self, batches, tokens / int((batches[0].targets >= 0).sum()), *ahead)
        return sums

    return around(Pipeline, "train", scaled)


@fault("pp: two receives change places", GPIPE)
def _() -> Patch:
    def reordered(original: Any, self: Pipeline, *arguments: Any) -> None:
        original(self, *arguments)
        first, second = [op for op in self.row if op.kind == Kind.RECV_F][:2] or (None, None)
        if first is not None and second is not None:
            self.row.remove(second)
            self.row.insert(self.row.index(first), second)

    return around(Pipeline, "__init__", reordered)


@fault("pp: a stage sends the output of the microbatch before", GPIPE)
def _() -> Patch:
    def late(original: Any, self: Any, number: int, microbatch: int) -> None:
        kept = self.left[number, microbatch]
        self.left[number, microbatch] = self.left.get((number, microbatch - 1), kept)
        original(self, number, microbatch)
        self.left[number, microbatch] = kept

    return around(runtime._Step, "_send_forward", late)


@fault("pp: a stage sends back the gradient of the microbatch before", PP)
def _() -> Patch:
    before: dict[int, Tensor] = {}

    def late(original: Any, self: Any, number: int, microbatch: int) -> None:
        gradient = self.entered[number, microbatch]
        self.entered[number, microbatch] = before.get(number, gradient)
        before[number] = gradient
        original(self, number, microbatch)

    return around(runtime._Step, "_send_backward", late)


@fault("pp: a stage begins a layer too early", PP)
def _() -> Patch:
    return _second_stage_from(-1)


@fault("pp: a stage begins a layer too late", (Layout(pp=2), Task(steps=2, layers=4)))
def _() -> Patch:
    return _second_stage_from(1)


def _second_stage_from(shift: int) -> Patch:
    def shifted(original: Any, *arguments: Any) -> list[range]:
        first, second, *rest = original(*arguments)
        return [first, range(second.start + shift, second.stop), *rest]

    return around(build, "layers_of_stages", shifted)


@fault("pp: initial weights depend on the rank", PP)
def _() -> Patch:
    def seeded(original: Any, stages: Any, device: Any, seed: int, dtype: Any) -> None:
        original(stages, device, seed + (dist.get_rank() if dist.is_initialized() else 0), dtype)

    return around(build, "materialize", seeded)


@fault("zero bubble: the weight gradients of one microbatch are left out", ZERO_BUBBLE)
def _() -> Patch:
    def skipping(original: Any, self: DeferredWeights, microbatch: int, gradients: Gradients) -> None:
        if microbatch == 1:
            self.kept.pop(microbatch, None)
        original(self, microbatch, gradients)

    return around(DeferredWeights, "compute", skipping)


@fault("zero bubble: the weight gradients of one microbatch count twice", ZERO_BUBBLE)
def _() -> Patch:
    def twice(original: Any, self: DeferredWeights, microbatch: int, gradients: Gradients) -> None:
        kept = list(self.kept.get(microbatch, []))
        original(self, microbatch, gradients)
        if microbatch == 1:
            self.kept[microbatch] = kept
            original(self, microbatch, gradients)

    return around(DeferredWeights, "compute", twice)


@fault("zero bubble: B computes a weight gradient that W computes again", ZERO_BUBBLE)
def _() -> Patch:
    def both(original: Any, self: DeferredWeights, weight: Any, x: Tensor, grad_y: Tensor) -> None:
        original(self, weight, x, grad_y)
        original(self, weight, x, grad_y)

    return around(DeferredWeights, "keep", both)
