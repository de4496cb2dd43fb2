"""Experts on every kind of folding against one process, and by name what has been silently wrong elsewhere.

`python -m tests.parity.full` takes every legal folding there is.
"""

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

from megalite.comm import Call, Communicator
from megalite.mesh import Mesh
from megalite.model.router import Router
from megalite.parallel import collectives
from megalite.parallel.experts import DISPATCHERS, make_dispatcher
from megalite.world import join, world_from_environment
from tests.parity.layouts import (
    BOUNDS,
    MODELS,
    SPARSE,
    Layout,
    Task,
    alone,
    configuration,
    errors,
    joined,
    train,
    trained,
    wrong,
)
from tests.parity.mutations import around
from tests.parity.test_silent_bugs import gradient_errors, norm_ratio
from tests.ranks import run_ranks

CASES = [
    (Layout(dp=2, ep=2), "deepseek", "adamw"),
    (Layout(dp=2, etp=2), "dropping", "adamw"),
    (Layout(tp=2, sp=True, ep=2), "experts", "adamw"),
    (Layout(tp=2, etp=2), "deepseek", "sgd"),
    (Layout(tp=2, sp=True), "gpt-oss", "adamw"),
    (Layout(cp=2, ep=2), "expert choice", "sgd"),
    (Layout(cp=2, cp_kind="ulysses", etp=2), "sinkhorn", "adamw"),
    (Layout(dp=2, ep=2, zero=1), "experts", "muon"),
    (Layout(dp=2, zero=2), "deepseek", "adamw"),
    (Layout(dp=2, ep=2, zero=3), "deepseek", "adamw"),
    (Layout(dp=2, zero=3), "gpt-oss", "sgd"),
    (Layout(pp=2, schedule="zb_h1"), "sinkhorn", "sgd"),
    (Layout(dp=2, ep=2, dispatcher="all_gather"), "gpt-oss", "adamw"),
    (Layout(dp=4, ep=2, etp=2), "gpt-oss", "adamw"),
    (Layout(dp=2, tp=2, ep=4), "deepseek", "sgd"),
    (Layout(dp=2, tp=2, sp=True, ep=2, etp=2, zero=1), "experts", "muon"),
    (Layout(dp=2, cp=2, ep=2, zero=2), "expert choice", "adamw"),
    (Layout(dp=2, cp=2, etp=4), "dropping", "sgd"),
    (Layout(tp=2, cp=2, ep=2, zero=3), "experts", "adamw"),
    (Layout(dp=2, pp=2, ep=2, schedule="interleaved", chunks=2), "deepseek", "adamw"),
    (Layout(tp=2, pp=2, etp=2, schedule="zbv", chunks=2), "gpt-oss", "sgd"),
    (Layout(cp=2, pp=2, ep=2, schedule="dualpipev", chunks=2), "experts", "adamw"),
    (Layout(dp=4, ep=4, dispatcher="node", node_ranks=2), "deepseek", "sgd"),
    (Layout(tp=2, sp=True, ep=2), "deepseek-v3", "adamw"),
    (Layout(dp=4, ep=2, etp=2, dispatcher="node", node_ranks=2), "experts", "sgd"),
    (Layout(dp=2, tp=2, ep=2, dispatcher="all_gather", order="tp,cp,dp,pp"), "dropping", "adamw"),
    (Layout(dp=2, tp=2, sp=True, pp=2, ep=2, etp=2, zero=1), "deepseek", "adamw"),
]


@pytest.mark.parametrize(("layout", "model", "optim"), CASES, ids=lambda value: str(value))
def test_same_as_one_process(layout: Layout, model: str, optim: str) -> None:
    task = Task(model, optim, steps=2)
    ranks, expected = trained(layout, task), alone(layout, task)
    found = errors(ranks, expected)
    assert all(found[kind] <= bound for kind, bound in BOUNDS.items()), found
    for rank in ranks:
        for mine, theirs in zip(rank["loads"], expected["loads"], strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-10, atol=1e-12)


def test_the_cases_meet_every_value() -> None:
    assert {model for _, model, _ in CASES} == set(SPARSE)
    layouts = [layout for layout, _, _ in CASES]
    assert {layout.zero for layout in layouts if layout.ep > 1} == {0, 1, 2, 3}
    assert {layout.dispatcher for layout in layouts} == set(DISPATCHERS)
    assert all(any(getattr(of, axis) > 1 and of.ep > 1 for of in layouts) for axis in ("dp", "tp", "cp", "pp", "etp"))


def test_recompute_and_buckets_change_nothing() -> None:
    layout, task = Layout(dp=2, ep=2), Task("deepseek", steps=2)
    first = trained(layout, task)
    for other in (replace(task, recompute="full"), replace(task, recompute="none"), replace(task, bucket_mb=1.0)):
        ranks = trained(layout, other)
        for kind in ("gradients", "weights"):
            mine, theirs = joined(first, kind), joined(ranks, kind)
            assert all(np.array_equal(mine[name], theirs[name]) for name in mine), other
        assert all(np.array_equal(a, b) for a, b in zip(first[0]["loads"], ranks[0]["loads"], strict=True)), other


def test_tokens_are_waited_for() -> None:
    """Beside the shared expert's products tokens are still on their way: threads show nothing of them before a wait."""
    layout, task = Layout(dp=2, ep=2), Task("deepseek", steps=1)
    assert not wrong(trained(layout, task, threads=True), alone(layout, task))

    def unwaited(ctx: Any, got: Tensor, comm: Communicator, axes: Any, send: Any, receive: Any, flight: Any) -> Tensor:
        ctx.comm, ctx.axes, ctx.send, ctx.receive, ctx.flight = comm, axes, send, receive, flight
        return got.zero_()  # not what lay in memory, which may be the last step's

    with patch.object(collectives._End, "forward", staticmethod(unwaited)):
        assert wrong(trained(layout, task, threads=True), alone(layout, task))


# What has been silently wrong elsewhere.


def test_norm_of_gradients_under_ep_and_tp() -> None:
    """Every expert counts once, though tp ranks hold different ones and etp need not be tp."""
    task = Task("experts", steps=1)
    for layout in (Layout(tp=2, ep=2), Layout(tp=2, sp=True, ep=2), Layout(tp=2, etp=2), Layout(dp=2, tp=2, etp=4)):
        assert norm_ratio(layout, task) == pytest.approx(1, rel=1e-12), layout
    naive = norm_ratio(Layout(tp=2, ep=2), task, "ep: under tp, the norm counts only the experts of the first tp rank")
    assert naive < 0.999


def test_parts_of_experts_need_not_be_those_of_attention() -> None:
    """tp 2 with etp 1, 2 and 4; etp without tp: the same experts, once."""
    task = Task("gpt-oss", steps=2)
    for layout in (Layout(tp=2), Layout(tp=2, etp=2), Layout(dp=2, tp=2, etp=4), Layout(dp=2, etp=2)):
        assert not wrong(trained(layout, task), alone(layout, task)), layout


def test_gradients_of_experts_are_not_larger_by_ep() -> None:
    fault = "ep: gradients of experts are larger by ep"
    assert max(gradient_errors(Layout(dp=2, ep=2), Task("experts", steps=1)).values()) <= BOUNDS["gradients"]
    naive = gradient_errors(Layout(dp=2, ep=2), Task("experts", steps=1), fault)
    assert all(error == pytest.approx(1.0) for name, error in naive.items() if ".experts." in name)


@pytest.mark.parametrize("layout", [Layout(dp=2, ep=2), Layout(tp=2, ep=2), Layout(tp=2, sp=True, ep=2)])
def test_gradient_of_the_router_under_ep(layout: Layout) -> None:
    found = gradient_errors(layout, Task("experts", steps=1))
    assert all(error <= BOUNDS["gradients"] for name, error in found.items() if "router" in name)
    naive = "ep: the gradient of the probabilities does not travel back"
    assert all(
        error > 1e-3
        for name, error in gradient_errors(layout, Task("experts", steps=1), naive).items()
        if "router" in name
    )


@pytest.mark.parametrize("model", ["experts", "deepseek"])
@pytest.mark.parametrize("layout", [Layout(cp=2), Layout(cp=2, cp_kind="ulysses", ep=2), Layout(tp=2)])
def test_balancing_loss_under_cp_and_tp(layout: Layout, model: str) -> None:
    """Of a microbatch and of each sequence, though no rank has one whole."""
    task = Task(model, steps=1)
    found = gradient_errors(layout, task)
    assert all(error <= BOUNDS["gradients"] for name, error in found.items() if "router" in name)
    naive = gradient_errors(layout, task, "cp: the balancing loss counts the load of this rank's positions alone")
    assert any(error > 1e-3 for name, error in naive.items() if "router" in name)


def train_choosing(layout: Layout, task: Task, chosen: tuple[int, ...]) -> dict[str, Any]:
    """Every token goes to the experts `chosen`."""

    def match(original: Any, self: Router, logits: Tensor, tokens: Any) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = self._weights(logits, torch.tensor([chosen] * len(logits)))
        return found

    with around(Router, "_match", match):
        return train(layout, task)


@pytest.mark.parametrize("chosen", [(0, 1), (0, 7), (7, 6)], ids=str)
@pytest.mark.parametrize(
    "layout",
    [
        Layout(dp=2, ep=2), Layout(tp=2, ep=2), Layout(dp=2, ep=2, zero=3), Layout(dp=4, ep=4),
        Layout(dp=2, ep=2, dispatcher="all_gather"), Layout(dp=4, ep=4, dispatcher="node", node_ranks=2),
    ],
    ids=str,
)  # fmt: skip
def test_experts_without_tokens_and_all_tokens_to_a_few(layout: Layout, chosen: tuple[int, ...]) -> None:
    """Also ranks without any token: they still meet the others in every collective, forward and backward."""
    task = Task("experts", steps=2)
    ranks = trained(layout, task, train_choosing, chosen)
    expected = trained(Layout(), replace(task, layers=2), train_choosing, chosen)[0]
    assert not wrong(ranks, expected)
    gradient = joined(ranks, "gradients")["blocks.0.mlp.experts.up"]
    empty = [expert for expert in range(8) if expert not in chosen]
    assert not gradient[empty].any()
    assert all(gradient[expert].any() for expert in chosen)
    assert ranks[0]["loads"][0][0][empty].sum() == 0


def test_initial_weights_do_not_depend_on_ep() -> None:
    task = Task("deepseek", steps=1)
    expected = joined([alone(Layout(), task)], "initial")
    for layout in (Layout(dp=4, ep=4), Layout(dp=2, etp=2), Layout(dp=2, ep=2, zero=3), Layout(pp=2)):
        mine = joined(trained(layout, task), "initial")
        assert mine.keys() == expected.keys()
        assert all(np.array_equal(mine[name], expected[name]) for name in mine), layout


# What every dispatcher and router promises.


def there_and_back(kind: str, ep: int, etp: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(what comes back, what should, gradient, what it should be) of identity experts, each an equal part over etp."""
    world = world_from_environment()
    join(world)
    mesh = Mesh({"pp": 1, "dp": world.size, "cp": 1, "tp": 1}, world.rank, ep=ep, etp=etp)
    comm = Communicator(mesh)
    dispatcher = make_dispatcher(kind, comm, 8, node_ranks=max(1, ep * etp // 2) if kind == "node" else 0)
    generator = torch.Generator().manual_seed(world.rank)
    x = torch.randn(5 + world.rank if kind != "all_gather" else 6, 3, dtype=torch.float64, generator=generator)
    scores = torch.rand(len(x), 8, dtype=torch.float64, generator=generator)
    probs, indices = scores.topk(3)
    indices = indices.masked_fill(torch.rand(indices.shape, generator=generator) < 0.3, -1)  # dropped
    x.requires_grad_()
    work, combine = dispatcher.begin(x, indices, probs)()
    here = work.indices_RK >= 0
    assert work.slots in (None, int(here.sum()))
    y = combine(work.rows_RD * (work.probs_RK * here).sum(-1, keepdim=True) / etp)
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    weight = (probs * (indices >= 0)).sum(-1, keepdim=True)
    expected = x * weight
    return y.detach(), expected.detach(), gradient, (2 * expected * weight).detach()


@pytest.mark.parametrize(("ep", "etp"), [(4, 1), (2, 2), (1, 4), (2, 1)])
@pytest.mark.parametrize("kind", DISPATCHERS)
def test_identity_experts_are_the_identity(kind: str, ep: int, etp: int) -> None:
    """Forward and backward, with unequal numbers of tokens on the ranks and some slots dropped."""
    for back, expected, gradient, expected_gradient in run_ranks(4, there_and_back, kind, ep, etp):
        torch.testing.assert_close(back, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-12)


def train_noting_choices(layout: Layout, task: Task) -> dict[str, Any]:
    """With `chosen`: (token numbers, experts kept) of every forward pass of the first layer, by microbatch."""
    chosen: list[tuple[np.ndarray, np.ndarray]] = []

    def noted(original: Any, self: Router, x: Tensor, tokens: Any, text: Tensor) -> Any:
        routing = original(self, x, tokens, text)
        if self.layer == 0 and torch._C._current_graph_task_id() == -1:
            chosen.append((tokens.numbers_N.numpy().copy(), routing.indices_NK.numpy().copy()))
        return routing

    with around(Router, "forward", noted):
        return train(layout, task) | {"chosen": chosen}


@pytest.mark.parametrize("model", ["experts", "dropping", "sinkhorn", "expert choice", "gpt-oss"])
def test_routing_does_not_depend_on_the_layout(model: str) -> None:
    """Each token of each microbatch goes to the same experts, whoever has it."""
    task = Task(model, steps=1)
    expected = trained(Layout(), replace(task, layers=2), train_noting_choices)[0]["chosen"]
    for layout in (Layout(dp=2, ep=2), Layout(tp=2, sp=True), Layout(cp=2, etp=2), Layout(dp=2, cp=2, ep=4)):
        ranks = trained(layout, task, train_noting_choices)
        for microbatch, (numbers, experts) in enumerate(expected):
            whole = np.full_like(experts, -2)
            for rank, result in enumerate(ranks):
                place = Mesh({"pp": 1, "dp": layout.dp, "cp": layout.cp, "tp": layout.tp}).coordinates(rank)
                if microbatch % layout.dp == place["dp"]:
                    mine, found = result["chosen"][microbatch // layout.dp]
                    whole[mine] = found
            assert np.array_equal(whole[numbers], experts), (layout, microbatch)


# What is moved.


def moved(layout: Layout, task: Task) -> dict[str, int]:
    """Bytes that rank 0 hands in at dispatch and combine in a step, forward, by the op."""
    calls: list[Call] = trained(layout, task)[0]["calls"]
    found: dict[str, int] = {}
    for call in calls:
        if call.site.startswith("experts.py") and call.phase == "forward" and call.dtype == "float64":
            found[call.op] = found.get(call.op, 0) + call.bytes
    return found


def test_tokens_moved_are_counted() -> None:
    """Where all tokens choose experts of one rank, all-to-all moves each once there and once back, with its two
    probabilities; all-gather moves every token to every rank."""
    hidden, tokens = MODELS["experts"].hidden, 8 * 16 // 2  # of this rank, a step

    ranks = trained(Layout(dp=2, ep=2), Task("experts", steps=2), train_choosing, (0, 1))
    calls = [c for c in ranks[0]["calls"] if c.site.startswith("experts.py") and c.op == "all_to_all"]
    there = sum(c.bytes for c in calls if c.phase == "forward" and c.dtype == "float64")
    layers = configuration(Layout(), Task("experts", steps=2)).model.layers
    # Rank 0 has the experts: it keeps its own tokens, gets the other's, and sends the sums of both.
    assert there == layers * 8 * (tokens * hidden + tokens * 2 + 2 * tokens * hidden)
    assert "all_gather" in moved(Layout(dp=2, ep=2, dispatcher="all_gather"), Task("experts", steps=2))


def test_a_node_gets_a_token_once() -> None:
    """With as many experts a token as there are, plain all-to-all sends it to every other rank; by node, once a node,
    and there once to each rank."""
    mesh = Mesh({"pp": 1, "dp": 4, "cp": 1, "tp": 1}, ep=4)
    assert mesh.ranks("ep") == [0, 1, 2, 3]
    task = Task("experts", steps=2)
    chosen = (0, 2, 4, 6)  # one of each rank
    plain, by_node = (
        trained(layout, task, train_choosing, chosen)[0]["calls"]
        for layout in (Layout(dp=4, ep=4), Layout(dp=4, ep=4, dispatcher="node", node_ranks=2))
    )

    def rows(calls: list[Call]) -> int:
        hops = [c for c in calls if c.site.startswith("experts.py") and c.op == "all_to_all" and c.phase == "forward"]
        return sum(c.bytes for c in hops if c.dtype == "int64")

    # Indices travel with their tokens: 4 int64s a row; and of a hop, for each of 4 ranks, how many rows and slots.
    tokens, layers, microbatches = 8 * 16 // 4, 2, 2
    counts = 4 * 2 * 8 * layers * microbatches
    assert rows(plain) == layers * tokens * 4 * 4 * 8 + counts
    assert rows(by_node) == layers * tokens * 4 * 8 * (2 + 4) + 2 * counts
