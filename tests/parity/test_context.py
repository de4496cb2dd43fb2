"""Context parallelism against the reference attention of one process, in float64: values and gradients, every mask.

On gloo ranks, and for many random masks the same code on threads that hand tensors to each other.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megalite_kernels import reference
from torch import Tensor

from megalite.comm import Call, Communicator
from megalite.mesh import Mesh
from megalite.model import recompute
from megalite.parallel.context import ContextParallel
from megalite.parallel.ring import ring_attention, spans_among, zigzag
from megalite.world import join, world_from_environment
from tests.kernels.support import random
from tests.ranks import joined_world, run_ranks
from tests.thread_ranks import run_threads

SCALE = 0.4
LAYOUTS = {"ring": (2, 1), "ulysses": (1, 2), "ring 4": (4, 1), "ulysses 4": (1, 4), "hybrid": (2, 2)}
HEADS = [(4, 4), (4, 1), (12, 6)]  # query heads, key heads
BATCH, LENGTH, DIM = 2, 32, 6


def documents(*lengths: list[int]) -> Tensor:
    """One row for each list of document lengths; numbers rise, with gaps."""
    return torch.stack([torch.arange(len(row)).mul(3).repeat_interleave(torch.tensor(row)) for row in lengths])


MASKS: dict[str, dict[str, Any]] = {
    "causal": {},
    "window": {"window": 5},
    "window of 1": {"window": 1},
    "softcap": {"softcap": 1.5},
    # Over chunk borders in row 0; in row 1 chunks of 4 or 8 hold whole documents, so most of a ring's blocks are blind.
    "documents": {"documents": documents([1, 13, 2, 16], [4] * 8)},
    "everything": {"documents": documents([30, 2], [8] * 4), "window": 7, "softcap": 2.0},
}


def inputs(heads: int, key_heads: int, length: int = LENGTH, batch: int = BATCH, value_dim: int = DIM) -> list[Tensor]:
    """Whole q, k, v and the gradient of the output."""
    shapes = ((heads, DIM), (key_heads, DIM), (key_heads, value_dim), (heads, value_dim))
    return [random(batch, length, *shape, seed=seed) for seed, shape in enumerate(shapes)]


def with_gradients(op: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    """op(q, k, v) and the gradients of q, k, v, from [q, k, v, gradient of the output]."""
    *leaves, grad = [x.detach().clone() for x in tensors]
    out = op(*(x.requires_grad_() for x in leaves))
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def expected(tensors: list[Tensor], **mask: Any) -> list[Tensor]:
    """Output and gradients on one process, in float64."""
    return with_gradients(lambda *qkv: reference.attention(*qkv, scale=SCALE, **mask), [x.double() for x in tensors])


def one_rank(comm: Any, tensors: list[Tensor], again: bool = False, **mask: Any) -> list[Tensor]:
    """This rank's positions, its output and the gradients of its q, k, v."""
    parallel = ContextParallel(comm)

    def op(*qkv: Tensor) -> Tensor:
        return parallel.attention(*qkv, scale=SCALE, **mask)

    results = with_gradients(lambda *qkv: recompute.run(again, op, *qkv), [parallel.take(x) for x in tensors])
    return [parallel.positions(tensors[0].shape[1]), *results]


def joined(by_rank: list[list[Tensor]]) -> list[Tensor]:
    """Whole tensors from every rank's positions and parts."""
    order = torch.cat([result[0] for result in by_rank]).argsort()
    return [torch.cat(parts, dim=1)[:, order] for parts in list(zip(*by_rank, strict=True))[1:]]


def assert_same(actual: list[Tensor], wanted: list[Tensor], bound: float = 1e-12) -> None:
    # A gradient may be exactly 0 as a difference of terms that are not: the largest result is the measure.
    largest = max(1e-3, *(theirs.abs().max().item() for theirs in wanted))
    for name, ours, theirs in zip(("out", "dq", "dk", "dv"), actual, wanted, strict=True):
        assert ours.shape == theirs.shape and bool(torch.isfinite(ours).all()), name
        error = (ours.double() - theirs).abs().max().item() / largest
        assert error <= bound, f"{name}: error {error:.2e}"


def meshed(ring: int, ulysses: int, rank: int, tp: int = 1) -> Mesh:
    return Mesh({"pp": 1, "dp": 1, "cp": ring * ulysses, "tp": tp}, rank, ulysses=ulysses)


def on_threads(ring: int, ulysses: int, function: Callable[..., Any], *arguments: Any, **options: Any) -> list[Any]:
    """Results of `function(communicator, …)` by rank."""

    def on_rank() -> Any:
        return function(Communicator(meshed(ring, ulysses, joined_world().rank)), *arguments, **options)

    return run_threads(ring * ulysses, on_rank)


def on_gloo(ring: int, ulysses: int, cases: list[tuple[list[Tensor], dict[str, Any]]]) -> Any:
    """Every case on this rank, with what it communicated; spare ranks go to tp, which takes its part of the heads."""
    world = world_from_environment()
    join(world)
    calls: list[Call] = []
    tp = world.size // (ring * ulysses)
    comm = Communicator(meshed(ring, ulysses, world.rank, tp), calls.append)
    results, traces = [], []
    for tensors, mask in cases:
        results.append(one_rank(comm, [x.chunk(tp, dim=2)[comm.mesh.index("tp")] for x in tensors], **mask))
        traces.append([(call.op, call.axes, call.bytes, call.phase) for call in calls])
        calls.clear()
    return results, traces


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_as_one_process(layout: str) -> None:
    ring, ulysses = LAYOUTS[layout]
    cases = [(inputs(8, 2), mask) for mask in MASKS.values()]
    cases += [(inputs(*heads), MASKS["everything"]) for heads in HEADS]
    cases += [(inputs(8, 2, value_dim=size), MASKS["everything"]) for size in (4, 7)]
    by_rank = run_ranks(ring * ulysses, on_gloo, ring, ulysses, cases)
    for number, (tensors, mask) in enumerate(cases):
        assert_same(joined([results[number] for results, _ in by_rank]), expected(tensors, **mask))


def test_beside_tensor_parallel_ranks() -> None:
    tensors, mask = inputs(8, 2), MASKS["everything"]
    by_rank = [results[0] for results, _ in run_ranks(8, on_gloo, 2, 2, [(tensors, mask)])]
    parts = [joined(by_rank[tp::2]) for tp in range(2)]
    assert_same([torch.cat(x, dim=2) for x in zip(*parts, strict=True)], expected(tensors, **mask))


def with_sinks(ring: int, ulysses: int, tensors: list[Tensor], sinks: Tensor, mask: dict[str, Any]) -> list[Tensor]:
    """Positions, output and gradients of q, k, v on this rank, and its term of the sinks' gradient."""
    world = world_from_environment()
    join(world)
    comm, leaf = Communicator(meshed(ring, ulysses, world.rank)), sinks.clone().requires_grad_()
    parallel = ContextParallel(comm)
    *qkv, grad = [parallel.take(x) for x in tensors]
    (term,) = torch.autograd.grad(parallel.attention(*qkv, scale=SCALE, sinks=leaf, **mask), leaf, grad)
    return [*one_rank(comm, tensors, sinks=sinks, **mask), term]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sink_counts_once(layout: str) -> None:
    """Though every rank of a ring has it beside keys of its own; its gradient's terms add up to the whole one."""
    ring, ulysses = LAYOUTS[layout]
    for mask in (MASKS["causal"], MASKS["everything"]):
        tensors, sinks = inputs(8, 2, value_dim=4), random(8, seed=9) * 2
        by_rank = run_ranks(ring * ulysses, with_sinks, ring, ulysses, tensors, sinks, mask)
        assert_same(joined([result[:5] for result in by_rank]), expected(tensors, sinks=sinks, **mask))
        leaf, (*qkv, grad) = sinks.clone().requires_grad_(), tensors
        (wanted,) = torch.autograd.grad(reference.attention(*qkv, scale=SCALE, sinks=leaf, **mask), leaf, grad)
        assert torch.allclose(sum(result[5] for result in by_rank), wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_narrower_precisions(dtype: torch.dtype, bound: float) -> None:
    cases = [([x.to(dtype) for x in inputs(8, 2)], mask) for mask in MASKS.values()]
    for ring, ulysses in ((2, 1), (2, 2)):
        by_rank = run_ranks(ring * ulysses, on_gloo, ring, ulysses, cases)
        for number, (tensors, mask) in enumerate(cases):
            whole = joined([results[number] for results, _ in by_rank])
            assert all(x.dtype == dtype for x in whole)
            assert_same(whole, expected(tensors, **mask), bound)


def test_recompute_gives_the_same_bits() -> None:
    cases = [(inputs(4, 2), MASKS["everything"] | {"again": again}) for again in (False, True)]
    for (kept, again), _ in run_ranks(4, on_gloo, 2, 2, cases):
        assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


def test_communication_does_not_depend_on_the_mask() -> None:
    """Blind blocks are skipped by the ranks that find them blind; what goes around must not be."""
    cases = [(inputs(4, 2), MASKS["causal"]), (inputs(4, 2), MASKS["window of 1"])]
    for _, (all_seen, few_seen) in run_ranks(4, on_gloo, 4, 1, cases):
        assert all_seen == few_seen
        block = 2 * BATCH * (LENGTH // 4) * 2 * DIM * 8
        sent = [phase for op, axes, size, phase in all_seen if (op, axes, size) == ("send", ("ring",), block)]
        assert sent == ["forward"] * 3 + ["backward"] * (3 + 4)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The definition, for any intervals of keys; a row of the softmax that is all masked becomes 0."""
    key = torch.arange(k.shape[1])
    seen = (key >= low[..., None]) & (key < high[..., None])
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    scores = (SCALE * torch.einsum("bshd,bthd->bhst", q, k)).masked_fill(~seen[:, None], -1e300)
    return torch.einsum("bhst,bthd->bshd", scores.softmax(-1) * seen[:, None], v)


def spans_on_ranks(comm: Any, tensors: list[Tensor], low: Tensor, high: Tensor) -> list[Tensor]:
    parallel = ContextParallel(comm)
    low, high = parallel.take(low), parallel.take(high)
    results = with_gradients(
        lambda *qkv: ring_attention(*qkv, low, high, comm, scale=SCALE)[0], [parallel.take(x) for x in tensors]
    )
    return [parallel.positions(tensors[0].shape[1]), *results]


def spans_on_gloo(tensors: list[Tensor], low: Tensor, high: Tensor) -> list[Tensor]:
    world = world_from_environment()
    join(world)
    return spans_on_ranks(Communicator(meshed(world.size, 1, world.rank)), tensors, low, high)


@pytest.mark.parametrize("world", [2, 4])
def test_fully_masked_rows_under_cp_give_no_nan(world: int) -> None:
    """Queries that see nothing: some of row 0, all of row 1; next to ones that see only keys of another rank."""
    low = torch.zeros(BATCH, LENGTH, dtype=torch.int32)
    high = low.clone()
    high[0, LENGTH // 2 :] = 3
    tensors = inputs(4, 2)
    whole = joined(run_ranks(world, spans_on_gloo, tensors, low, high))
    assert_same(whole, with_gradients(lambda *qkv: masked_attention(*qkv, low, high), tensors))
    assert not whole[0][0, : LENGTH // 2].any() and not any(x[1].any() for x in whole)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_spans(data: st.DataObject) -> None:
    """Any intervals with rising ends, empty ones too, and keys after the query: the ring's merge alone."""
    ranks, batch = data.draw(st.integers(2, 4)), data.draw(st.integers(1, 2))
    length = 2 * ranks * data.draw(st.integers(1, 4))
    ends = st.lists(st.integers(0, length), min_size=length, max_size=length).map(sorted)
    bounds = torch.tensor([[data.draw(ends), data.draw(ends)] for _ in range(batch)], dtype=torch.int32)
    low, high = bounds.amin(1), bounds.amax(1)
    tensors = inputs(2, 1, length, batch)
    by_rank = on_threads(ranks, 1, spans_on_ranks, tensors, low, high)
    assert_same(joined(by_rank), with_gradients(lambda *qkv: masked_attention(*qkv, low, high), tensors))


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_documents_and_window(data: st.DataObject) -> None:
    ring, ulysses = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    length = 2 * ring * ulysses * data.draw(st.integers(1, 4))
    key_heads, batch = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 2))
    heads = math.lcm(key_heads, ulysses) * data.draw(st.integers(1, 2))
    begins = st.lists(st.booleans(), min_size=length, max_size=length)
    numbers = torch.tensor([data.draw(begins) for _ in range(batch)]).int().cumsum(1)
    mask = {
        "documents": data.draw(st.sampled_from([None, numbers])),
        "window": data.draw(st.none() | st.integers(0, length + 1)),
        "softcap": data.draw(st.none() | st.just(1.5)),
    }
    tensors = inputs(heads, key_heads, length, batch)
    assert_same(joined(on_threads(ring, ulysses, one_rank, tensors, **mask)), expected(tensors, **mask))


@pytest.mark.parametrize(("ring", "ulysses"), [(2, 1), (2, 2), (4, 2), (3, 1)])
def test_causal_work_is_balanced(ring: int, ulysses: int) -> None:
    """In every step of the ring each rank has the same number of pairs of a query and a key it sees, and a group that
    exchanged heads holds just the positions that the ring counts on."""
    length = 4 * ring * ulysses
    end = torch.arange(length, dtype=torch.int32)[None] + 1
    for step in range(ring):
        pairs = set()
        for place in range(ring):
            group = [ContextParallel(Communicator(meshed(ring, ulysses, place * ulysses + u))) for u in range(ulysses)]
            held = torch.cat([parallel.positions(length) for parallel in group]).sort().values
            own, other = (zigzag(length, ring, p) for p in (place, (place - step) % ring))
            assert held.tolist() == [position for start, stop in own for position in range(start, stop)]
            low, high = spans_among(torch.zeros_like(end), end, other)
            pairs.add(int((high - low)[:, held].sum()))
        assert len(pairs) == 1


def test_one_rank_holds_rows_of_any_length_as_they_are() -> None:
    tensors = inputs(4, 2, length=7)
    positions, *results = one_rank(Communicator(meshed(1, 1, 0)), tensors, window=3)
    assert positions.tolist() == list(range(7))
    assert_same(results, expected(tensors, window=3))


def test_what_does_not_fit_is_refused() -> None:
    parallel = ContextParallel(Communicator(meshed(2, 2, 0)))
    with pytest.raises(ValueError, match="sequence of 30 does not divide into 2 x 4 chunks; use 24 or 32"):
        parallel.positions(30)
    q, k, v, _ = inputs(3, 3, length=4)
    with pytest.raises(ValueError, match="3 query heads do not divide by 2 ulysses ranks"):
        parallel.attention(q, k, v, scale=SCALE)
    with pytest.raises(ValueError, match=r"documents are \[2, 4\], rows \[2, 16\]"):
        parallel.attention(q, k, v, scale=SCALE, documents=torch.zeros(2, 4, dtype=torch.int64))
