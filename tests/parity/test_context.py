"""Context parallelism against the reference attention of one process, in float64: values and gradients, every mask.

On gloo ranks, and for many random masks the same code on threads that hand tensors to each other.
"""

from typing import Any

import pytest
import torch
from megalite_kernels import reference
from torch import Tensor

from megalite.comm import Call, Communicator
from megalite.mesh import Mesh
from megalite.parallel.context import ContextParallel
from megalite.world import join, world_from_environment
from tests.kernels.support import random
from tests.ranks import run_ranks

SCALE = 0.4
LAYOUTS = {"ring": (2, 1), "ulysses": (1, 2), "ring 4": (4, 1), "ulysses 4": (1, 4), "hybrid": (2, 2)}
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


def inputs(heads: int, key_heads: int, length: int = LENGTH, seed: int = 0) -> list[Tensor]:
    """Whole q, k, v and the gradient of the output."""
    counts = (heads, key_heads, key_heads, heads)
    return [random(BATCH, length, count, DIM, seed=seed + i) for i, count in enumerate(counts)]


def expected(tensors: list[Tensor], **mask: Any) -> list[Tensor]:
    """Output and the gradients of q, k, v on one process."""
    *leaves, grad = [x.double() for x in tensors]
    leaves = [x.requires_grad_() for x in leaves]
    out = reference.attention(*leaves, scale=SCALE, **mask)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def one_rank(comm: Communicator, tensors: list[Tensor], **mask: Any) -> list[Tensor]:
    """This rank's positions, its output and the gradients of its q, k, v."""
    parallel = ContextParallel(comm)
    *leaves, grad = (parallel.take(x) for x in tensors)
    leaves = [x.requires_grad_() for x in leaves]
    out = parallel.attention(*leaves, scale=SCALE, **mask)
    return [parallel.positions(tensors[0].shape[1]), out.detach(), *torch.autograd.grad(out, leaves, grad)]


def joined(by_rank: list[list[Tensor]]) -> list[Tensor]:
    """Whole tensors from every rank's parts."""
    order = torch.cat([result[0] for result in by_rank]).argsort()
    return [torch.cat(parts, dim=1)[:, order] for parts in list(zip(*by_rank, strict=True))[1:]]


def assert_same(actual: list[Tensor], wanted: list[Tensor], bound: float = 1e-12) -> None:
    # A gradient may be exactly 0 as a difference of terms that are not: the largest result is the measure.
    largest = max(theirs.abs().max() for theirs in wanted)
    for name, ours, theirs in zip(("out", "dq", "dk", "dv"), actual, wanted, strict=True):
        assert ours.shape == theirs.shape and bool(torch.isfinite(ours).all()), name
        error = (ours.double() - theirs).abs().max() / largest
        assert error <= bound, f"{name}: error {error:.2e}"


def meshed(ring: int, ulysses: int, rank: int, **others: int) -> Mesh:
    return Mesh({"pp": 1, "dp": 1, "cp": ring * ulysses, "tp": 1} | others, rank, ulysses=ulysses)


def on_gloo(ring: int, ulysses: int, tp: int, cases: list[tuple[list[Tensor], dict[str, Any]]]) -> Any:
    """Every case on this rank, and the collectives of the first and the last."""
    world = world_from_environment()
    join(world)
    calls: list[Call] = []
    mesh = meshed(ring, ulysses, world.rank, dp=world.size // (ring * ulysses * tp), tp=tp)
    comm = Communicator(mesh, calls.append)
    results, traces = [], []
    for tensors, mask in cases:
        results.append(one_rank(comm, tensors, **mask))
        traces.append([(call.op, call.axes, call.bytes, call.phase) for call in calls])
        calls.clear()
    return results, traces


HEADS = [(4, 4), (4, 1), (8, 2), (12, 6)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_as_one_process(layout: str) -> None:
    ring, ulysses = LAYOUTS[layout]
    cases = [(inputs(*heads), mask) for heads in HEADS for mask in MASKS.values()]
    by_rank = run_ranks(ring * ulysses, on_gloo, ring, ulysses, 1, cases)
    for number, (tensors, mask) in enumerate(cases):
        assert_same(joined([results[number] for results, _ in by_rank]), expected(tensors, **mask))


def test_communication_does_not_depend_on_the_mask() -> None:
    """Blind blocks are skipped by the ranks that find them blind; what goes around must not be."""
    cases = [(inputs(4, 2), MASKS["causal"]), (inputs(4, 2), MASKS["window of 1"])]
    for _, (all_seen, few_seen) in run_ranks(4, on_gloo, 4, 1, 1, cases):
        assert all_seen == few_seen
        key_bytes = 2 * 8 * BATCH * (LENGTH // 4) * 2 * DIM
        sent = [(phase, size) for op, axes, size, phase in all_seen if op == "send" and axes == ("ring",)]
        assert sent.count(("forward", key_bytes)) == 3 and sent.count(("backward", key_bytes)) == 3 + 4
