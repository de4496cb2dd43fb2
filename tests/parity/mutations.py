"""Deliberate faults, one at a time, each in the layout of the fast matrix that must notice it: tensor, sequence and
context parallelism here, what spreads samples and layers in `mutations_of_steps`, more in `mutations_of_attention`.

A fault is a context manager around the assembly and the training of every rank. Each leaves the engine running on all
ranks, as the silent errors do that the matrix is there for; none raises.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from megalite.comm import Communicator
from megalite.model.linear import Linear
from megalite.model.transformer import Transformer
from megalite.optim import exchange
from megalite.parallel import collectives, context, parameter, ring, tensor
from megalite.parallel.context import ContextParallel
from megalite.parallel.parameter import Declaration, Placement
from megalite.parallel.tensor import TensorParallel
from tests.parity.layouts import Layout, Task

Patch = AbstractContextManager[Any]
Fault = Callable[[], Patch]


@dataclass(frozen=True)
class Mutation:
    """`layout`, `task`: a case of the fast matrix that must go wrong under `fault`."""

    layout: Layout
    task: Task
    fault: Fault


SGD, ADAMW = Task(steps=2), Task(optim="adamw", steps=2)
DP, ZERO_1, ZERO_2 = (Layout(dp=2), SGD), (Layout(dp=2, zero=1), ADAMW), (Layout(dp=2, zero=2), SGD)
TP, TP_CLIPPED = (Layout(tp=2), SGD), (Layout(tp=2), ADAMW)
SP, OVERLAP = (Layout(tp=2, sp=True), SGD), (Layout(tp=2, sp=True, overlap=True), SGD)
FEW_KEYS, BIASES = (Layout(tp=2), Task("one kv head", steps=2)), (Layout(tp=2, sp=True), Task("gpt2", steps=2))
BIAS, MUON = (Layout(tp=2), Task("gpt2", steps=2)), (Layout(tp=2), Task("untied", "muon", steps=2))
RING, ULYSSES = (Layout(cp=2), SGD), (Layout(cp=2, cp_kind="ulysses"), SGD)
PP, GPIPE = (Layout(pp=2), SGD), (Layout(pp=2, schedule="gpipe"), SGD)
ZERO_BUBBLE = (Layout(pp=2, schedule="zb_h1"), SGD)

MUTATIONS: dict[str, Mutation] = {}


def fault(name: str, case: tuple[Layout, Task]) -> Callable[[Fault], Fault]:
    def register(function: Fault) -> Fault:
        assert name not in MUTATIONS, name
        MUTATIONS[name] = Mutation(*case, function)
        return function

    return register


def around(owner: Any, name: str, change: Callable[..., Any]) -> Patch:
    """`owner.name` replaced by `change(original, *its arguments)`."""
    original = getattr(owner, name)
    return patch.object(owner, name, lambda *arguments, **options: change(original, *arguments, **options))


class Done:
    """A handle of what is over."""

    def wait(self) -> None: ...


def placed_otherwise(change: Callable[[Placement, Declaration], Placement]) -> Patch:
    return around(parameter, "place", lambda place, declared, *rest: change(place(declared, *rest), declared))


@fault("tp: the terms of a row-parallel product are not summed", TP)
def _() -> Patch:
    return patch.object(tensor, "sum_forward", lambda x, comm, axis: x)


@fault("tp: the input gradients of column-parallel products are not summed", TP)
def _() -> Patch:
    return patch.object(tensor, "sum_backward", lambda x, comm, axis: x)


@fault("sp: the gathered tokens' gradient is cut up, not summed", SP)
def _() -> Patch:
    return patch.object(tensor, "gather_for_parts", collectives.gather)


@fault("kv heads < tp: the gathered keys' gradient is cut up, not summed", FEW_KEYS)
def _() -> Patch:
    return patch.object(tensor, "gather_for_parts", collectives.gather)


@fault("kv heads < tp: every rank's queries read the keys of the first", (Layout(tp=4), SGD))
def _() -> Patch:
    def heads(original: Any, self: TensorParallel, *arguments: Any) -> Tensor:
        with patch.object(self, "index", 0):
            found: Tensor = original(self, *arguments)
        return found

    return around(TensorParallel, "heads", heads)


@fault("sp: gradients of norm weights are not summed over tp", SP)
def _() -> Patch:
    return placed_otherwise(lambda p, declared: replace(p, partial=()) if declared.sees == "tokens" else p)


@fault("tp without sp: gradients of replicated norm weights are summed", TP)
def _() -> Patch:
    return placed_otherwise(lambda p, declared: p if declared.shard else replace(p, partial=("tp",)))


@fault("tp: gradients of QK-norm weights are not summed", TP)
def _() -> Patch:
    return placed_otherwise(lambda p, declared: replace(p, partial=()) if declared.sees == "heads" else p)


@fault("tp: the norm counts replicated parameters on every rank", TP)
def _() -> Patch:
    return placed_otherwise(lambda p, declared: replace(p, counted=True))


@fault("sp: the gradient of a row-parallel bias is not summed", BIASES)
def _() -> Patch:
    return placed_otherwise(lambda p, declared: replace(p, partial=()) if declared.role == "bias" else p)


@fault("tp: a row-parallel bias is added before the sum, once a rank", BIAS)
def _() -> Patch:
    def forward(original: Any, self: Linear, x: Tensor) -> Tensor:
        if self.returns and self.bias is not None:
            return self.tp.leave(self._product(x, self.bias))
        result: Tensor = original(self, x)
        return result

    return around(Linear, "forward", forward)


@fault("sp: every rank takes the first rank's learned positions", BIASES)
def _() -> Patch:
    return patch.object(TensorParallel, "tokens", lambda self, x: x.flatten(0, 1).chunk(self.size)[0])


@fault("tp: the loss takes its vocabulary shard to begin a row too early", TP)
def _() -> Patch:
    def shifted(original: Any, *arguments: Any, first: int, **options: Any) -> Any:
        return original(*arguments, first=max(0, first - 1), **options)

    return around(tensor, "vocabulary_parallel_cross_entropy", shifted)


@fault("tp: the loss's log-partition is of this rank's vocabulary alone", TP)
def _() -> Patch:
    def combine(original: Any, self: TensorParallel, lse: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        return lse, original(self, lse, chosen)[1]

    return around(TensorParallel, "_combine", combine)


@fault("tp: tokens of another rank's vocabulary are not masked in the embedding", TP)
def _() -> Patch:
    def lookup(original: Any, self: TensorParallel, index: Tensor, weight: Tensor, rows: int) -> Tensor:
        first, stop = parameter.part(rows, self.size, self.index)
        return self.leave(weight[(index - first).clamp(0, stop - first - 1)])

    return around(TensorParallel, "lookup", lookup)


@fault("tp: the loss is counted on every rank", TP)
def _() -> Patch:
    def every(original: Any, self: TensorParallel, *arguments: Any) -> tuple[Tensor, ...]:
        return tuple(collectives.sum_backward(loss, self.comm, "tp") for loss in original(self, *arguments))

    return around(TensorParallel, "cross_entropy", every)


@fault("sp with overlap: gathered parts stand in each other's place", OVERLAP)
def _() -> Patch:
    def rolled(original: Any, *arguments: Any) -> tuple[Tensor, ...]:
        return tuple(y.roll(y.shape[0] // 2, 0) for y in original(*arguments))

    return around(tensor, "gathered_products", rolled)


@fault("muon: shards are orthogonalised, not the logical matrices", MUON)
def _() -> Patch:
    def shards(original: Any, self: Any, momenta: dict[Any, Tensor]) -> dict[Any, Tensor]:
        return {slot: exchange.newton_schulz(found.view(slot.placed.shape)) for slot, found in momenta.items()}

    return around(exchange.MatrixExchange, "orthogonalized", shards)


@fault("cp: positions for RoPE are shifted by the cp rank", RING)
def _() -> Patch:
    def shifted(original: Any, self: Transformer, *arguments: Any) -> Tensor | None:
        positions: Tensor | None = original(self, *arguments)
        return positions if positions is None or self.cp is None else positions + self.cp.comm.mesh.index("cp")

    return around(Transformer, "_positions", shifted)


@fault("cp: documents are not kept apart", RING)
def _() -> Patch:
    def mixed(original: Any, *arguments: Any, documents: Any, **options: Any) -> Tensor:
        out: Tensor = original(*arguments, documents=None, **options)
        return out

    return around(ContextParallel, "attention", mixed)


@fault("ring: partial results are averaged without their weights", RING)
def _() -> Patch:
    def averaged(original: Any, out: Tensor, lse: Tensor, part: Any, seeing: Tensor) -> None:
        before = out.clone()
        original(out, lse, part, seeing)
        out.copy_((before + part[0]) / 2)

    return around(ring, "merge", averaged)


@fault("ring: the block of the other rank is forgotten", RING)
def _() -> Patch:
    def first(original: Any, out: Tensor, lse: Tensor, part: Any, seeing: Tensor) -> None:
        if not lse.isfinite().any():
            original(out, lse, part, seeing)

    return around(ring, "merge", first)


@fault("ring: the gradients of keys and values stay one rank short of home", RING)
def _() -> Patch:
    calls = [0]

    def rotate(original: Any, self: Communicator, tensors: list[Tensor], axis: str) -> Any:
        incoming, handle = original(self, tensors, axis)
        calls[0] += torch._C._current_graph_task_id() != -1
        if torch._C._current_graph_task_id() != -1 and calls[0] % 3 == 0:  # the last of a backward over two ranks
            handle.wait()
            return [tensor.clone() for tensor in tensors], Done()
        return incoming, handle

    return around(Communicator, "rotate", rotate)


@fault("cp: a rank takes neighbouring tokens, not its two chunks", RING)
def _() -> Patch:
    def neighbours(self: ContextParallel, x: Tensor) -> Tensor:
        return x.chunk(self.comm.mesh.size("cp"), 1)[self.comm.mesh.index("cp")]

    return patch.object(ContextParallel, "take", neighbours)


@fault("ulysses: positions keep the order in which they arrive", ULYSSES)
def _() -> Patch:
    def unordered(original: Any, self: ContextParallel, *qkv: Tensor) -> list[Tensor]:
        chunks = [ring.zigzag(2 * qkv[0].shape[1], 2, rank) for rank in range(2)]
        return [torch.cat([context._columns(x, of) for of in chunks], 1) for x in original(self, *qkv)]

    return around(ContextParallel, "_spread_heads", unordered)
