"""Deliberate faults in routers, dispatchers and experts, and in what is summed and counted of them."""

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from megalite.model import experts as model_experts
from megalite.model import router
from megalite.model.experts import Experts
from megalite.model.moe import MoE
from megalite.parallel import experts, parameter
from megalite.parallel.experts import AllGather, AllToAll, ByNode, Dispatcher
from megalite.parallel.parameter import Declaration, Placement
from megalite.parallel.tokens import Tokens
from megalite.train.balance import Balance
from tests.parity.layouts import Layout, Task
from tests.parity.mutations import Patch, around, fault, placed_otherwise

EP = (Layout(dp=2, ep=2), Task("experts", steps=2))
EP_TP = (Layout(tp=2, ep=2), Task("experts", steps=2))
REPLICAS = (Layout(dp=2), Task("experts", steps=2))
EP_CP = (Layout(cp=2, ep=2), Task("experts", steps=2))
ETP = (Layout(dp=2, etp=2), Task("gpt-oss", steps=2))
DROPPING = (Layout(cp=2), Task("dropping", steps=2))
NODES = (Layout(dp=4, ep=4, dispatcher="node", node_ranks=2), Task("experts", steps=2))
GATHER = (Layout(dp=2, ep=2, dispatcher="all_gather"), Task("experts", steps=2))
BALANCED = (Layout(dp=2), Task("deepseek", steps=3))
GLOBAL_AUX = (Layout(dp=2), Task("gpt-oss", steps=3))


def is_expert(declared: Declaration) -> bool:
    return "ep" in declared.shard


@fault("tp: gradients of the router are not summed over tp, whose ranks route tokens of their own", EP_TP)
def _() -> Patch:
    return placed_otherwise(lambda p, declared: replace(p, partial=()) if declared.role == "router" else p)


@fault("ep: gradients of experts are summed over dp and cp, as those of all else", EP)
def _() -> Patch:
    return placed_otherwise(lambda p, declared: replace(p, replicas=("dp", "cp")) if is_expert(declared) else p)


@fault("ep: gradients of replicated experts are not summed", REPLICAS)
def _() -> Patch:
    return placed_otherwise(lambda p, declared: replace(p, replicas=()) if is_expert(declared) else p)


@fault("ep: under tp, the norm counts only the experts of the first tp rank", EP_TP)
def _() -> Patch:
    def first(original: Any, declared: Declaration, mesh: Any, *rest: Any) -> Placement:
        placed: Placement = original(declared, mesh, *rest)
        return replace(placed, counted=mesh.index("tp") == 0) if is_expert(declared) else placed

    return around(parameter, "place", first)


@fault("ep: gradients of experts are larger by ep", EP)
def _() -> Patch:
    def larger(original: Any, x: Tensor, weight: Tensor, *rest: Any, **options: Any) -> Tensor:
        result: Tensor = original(x, _Scaled.apply(weight, 2.0), *rest, **options)
        return result

    return around(model_experts, "grouped_gemm", larger)


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


@fault("cp: the balancing loss counts the load of this rank's positions alone", EP_CP)
def _() -> Patch:
    return around(Tokens, "summed", lambda original, self, x: x.detach().clone())


@fault("tp: the balancing loss is a mean over this rank's tokens", EP_TP)
def _() -> Patch:
    def own(original: Any, scores: Tensor, *rest: Any) -> Tensor:
        tokens = rest[2]
        loss: Tensor = original(scores, *rest) * tokens.total / len(scores)
        return loss

    return around(router, "balancing_loss", own)


@fault("ep: what comes back is added to other tokens", EP)
def _() -> Patch:
    return around(
        experts, "moe_unpermute", lambda original, y, inverse, **rest: original(y, inverse.roll(1, 0), **rest)
    )


@fault("ep: the gradient of the probabilities does not travel back", EP)
def _() -> Patch:
    def begin(original: Any, self: Dispatcher, x: Tensor, indices: Tensor, probs: Tensor) -> Any:
        return original(self, x, indices, probs.detach())

    return around(AllToAll, "begin", begin)


@fault("ep: with all-gather, a rank keeps the sums of the first rank's tokens", GATHER)
def _() -> Patch:
    def first(original: Any, self: Dispatcher, x: Tensor, indices: Tensor, probs: Tensor) -> Any:
        finish = original(self, x, indices, probs)

        def arrived() -> Any:
            work, combine = finish()
            return work, lambda y: combine(torch.cat([y[: len(x)]] * (len(y) // len(x))))

        return arrived

    return around(AllGather, "begin", first)


@fault("etp: every part of an expert adds the output's bias", ETP)
def _() -> Patch:
    def every(original: Any, self: Experts, *arguments: Any) -> Tensor:
        self.first_part = True
        result: Tensor = original(self, *arguments)
        return result

    return around(Experts, "forward", every)


@fault("etp: the gradient of the output's bias is not summed over the parts", ETP)
def _() -> Patch:
    def last(original: Any, declared: Declaration, mesh: Any, *rest: Any) -> Placement:
        placed: Placement = original(declared, mesh, *rest)
        own = is_expert(declared) and declared.sees == "own"
        return replace(placed, partial=(), counted=mesh.index("etp") == 1) if own else placed

    return around(parameter, "place", last)


@fault("capacity: every rank drops among its own tokens", DROPPING)
def _() -> Patch:
    return around(router, "over_capacity", lambda original, i, p, moe, total: original(*_cut(i, p), moe, total // 2))


def _cut(*everyone: Tensor) -> list[Tensor]:
    return [torch.cat([x[: len(x) // 2]] * 2) for x in everyone]


@fault("node: a token is not handed on inside its node", NODES)
def _() -> Patch:
    def own(original: Any, self: ByNode, x: Tensor, indices: Tensor, probs: Tensor) -> Any:
        finish = original(self, x, indices, probs)

        def arrived() -> Any:
            here = torch.arange(self.ep * self.etp) == self.comm.mesh.index("ep", "etp")
            wanted = self._wanted
            with patch.object(self, "_wanted", lambda indices: wanted(indices) * here):  # this rank's: they take turns
                return finish()

        return arrived

    return around(ByNode, "begin", own)


def own_load(original: Any, self: Balance) -> Tensor:
    return torch.stack([self.routers[layer].seen.take(self.config.moe.experts) for layer in self.layers])


@fault("bias: the load is that of this rank's tokens", BALANCED)
def _() -> Patch:
    return around(Balance, "measure", own_load)


@fault("balancing loss of the global batch: the load is that of this rank's tokens", GLOBAL_AUX)
def _() -> Patch:
    return around(Balance, "measure", own_load)


@fault("ep: every rank starts with the first experts' weights", EP)
def _() -> Patch:
    def first(original: Any, declared: Declaration, name: str, seed: int, placed: Placement) -> Tensor:
        moved = replace(placed, offsets=(0, *placed.offsets[1:])) if is_expert(declared) else placed
        values: Tensor = original(declared, name, seed, moved)
        return values

    return around(parameter, "initial_values", first)


@fault("jitter: every rank draws the noise of the first tokens", (Layout(cp=2), Task("gpt-oss", steps=2)))
def _() -> Patch:
    def first(original: Any, text: Tensor, tokens: Tokens, *rest: Any) -> Tensor:
        numbers = torch.arange(len(tokens.numbers_N), device=tokens.numbers_N.device)
        found: Tensor = original(text, tokens._replace(numbers_N=numbers), *rest)
        return found

    return around(router, "noise", first)


@fault("tp: both ranks of a tp group compute the same tokens' experts", EP_TP)
def _() -> Patch:
    def twice(original: Any, self: MoE, x: Tensor, context: Any) -> Tensor:
        return _Scaled.apply(original(self, x, context), 2.0)  # type: ignore[no-any-return]

    return around(MoE, "forward", twice)
