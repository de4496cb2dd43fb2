"""Deliberate faults in attention's forms and in multi-token prediction, each in a layout that must notice it."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megalite.data.batch import Batch
from megalite.model import transformer
from megalite.parallel import context, ring
from megalite.parallel.context import ContextParallel
from megalite.parallel.parameter import Declaration, Placement
from megalite.parallel.tensor import TensorParallel
from megalite.pipeline.runtime import Pipeline
from tests.parity.layouts import MODELS, Layout, Task
from tests.parity.mutations import Patch, around, fault, placed_otherwise

SINKS_RING, SINKS_ULYSSES = ((Layout(cp=2, cp_kind=kind), Task("sinks", steps=2)) for kind in ("ring", "ulysses"))
MLA, MLA_SP = (Layout(tp=2), Task("mla", steps=2)), (Layout(tp=2, sp=True), Task("mla", steps=2))
MTP_DP, MTP_RING, MTP_PP = ((layout, Task("mtp", steps=2)) for layout in (Layout(dp=2), Layout(cp=2), Layout(pp=2)))


@fault("sinks: every rank of the ring counts them", SINKS_RING)
def _() -> Patch:
    return around(context, "add_sinks", lambda add, out, lse, sinks: add(out, lse, sinks + math.log(2)))


@fault("sinks: what they take is not taken from the ring's gradients", SINKS_RING)
def _() -> Patch:
    def forgetful(original: Any, *arguments: Any) -> Any:
        return original(*arguments[:10], None, *arguments[11:])

    return around(ring, "attention_backward", forgetful)


@fault("sinks: ulysses ranks take those of other heads", SINKS_ULYSSES)
def _() -> Patch:
    def others(original: Any, self: ContextParallel, *qkv: Tensor, sinks: Tensor, **options: Any) -> Tensor:
        out: Tensor = original(self, *qkv, sinks=sinks.roll(1), **options)
        return out

    return around(ContextParallel, "attention", others)


@fault("latents: their gradient is that of this tp rank's heads", MLA)
def _() -> Patch:
    mla = MODELS["mla"].mla

    def alone(original: Any, self: TensorParallel, x: Tensor) -> Tensor:
        return x if x.shape[-1] == mla.kv_rank + mla.rope_dim else original(self, x)

    return around(TensorParallel, "enter", alone)


@fault("latents: under sp the down projections' gradients are of this rank's tokens", MLA_SP)
def _() -> Patch:
    def unsummed(placed: Placement, declared: Declaration) -> Placement:
        return replace(placed, partial=()) if declared.role == "matrix" and not declared.shard else placed

    return placed_otherwise(unsummed)


@fault("multi-token: divided by the model's own targets", MTP_DP)
def _() -> Patch:
    def divided(
        original: Any, self: Pipeline, batches: Sequence[Batch], tokens: float, ahead: Sequence[float], *rest: Any
    ) -> Tensor:
        sums: Tensor = original(self, batches, tokens, [tokens] * len(ahead), *rest)
        return sums

    return around(Pipeline, "train", divided)


@fault("multi-token: tokens move up inside each piece of a cp rank", MTP_RING)
def _() -> Patch:
    def inside(original: Any, tokens: Tensor, depth: int) -> Tensor:
        return torch.cat([original(piece, depth) for piece in tokens.chunk(4, dim=1)], dim=1)

    return around(transformer, "tokens_ahead", inside)


@fault("multi-token: the last stage's embedding goes its own way", MTP_PP)
def _() -> Patch:
    return placed_otherwise(lambda placed, declared: replace(placed, tied=()))
