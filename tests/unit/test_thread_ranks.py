"""Ranks as threads: they compute what gloo processes compute, and say what went wrong."""

from typing import Any

import numpy as np
import pytest
import torch

from megalite.comm import Communicator
from megalite.mesh import AXES, Mesh
from tests.parity.layouts import Layout, Task, errors, joined, trained
from tests.ranks import joined_world, run_ranks
from tests.thread_ranks import run_threads


def _communicator(**sizes: int) -> Communicator:
    return Communicator(Mesh(dict.fromkeys(AXES, 1) | sizes, rank=joined_world().rank))


def collectives() -> dict[str, Any]:
    """Every op of the door over an axis of two and one of four ranks."""
    comm = _communicator(dp=2, tp=4)
    rank, found = comm.mesh.rank, {}
    mine = torch.arange(24, dtype=torch.float64).view(8, 3) + 100 * rank
    for axis in ("dp", "tp"):
        ranks = comm.mesh.size(axis)
        total, largest, source, from_last = mine.clone(), mine.clone(), mine.clone(), torch.empty_like(mine)
        comm.all_reduce(total, axis)
        comm.all_reduce(largest, axis, op="max")
        comm.broadcast(source, axis, source=1)
        uneven = [place + 1 for place in range(ranks)]
        receive = [comm.mesh.index(axis) + 1] * ranks
        incoming, handle = comm.rotate([mine, mine[:2]], axis)
        handle.wait()
        if comm.mesh.index(axis) == ranks - 1:
            comm.send(mine, axis, 0).wait()
        if comm.mesh.index(axis) == 0:
            comm.receive(from_last, axis, ranks - 1).wait()
        found[axis] = [
            total, largest, source, *incoming, comm.all_gather(mine, axis, dim=1), comm.reduce_scatter(mine, axis),
            comm.all_to_all(mine, axis),
            comm.all_to_all(mine.repeat(2, 1)[: sum(uneven)], axis, send=uneven, receive=receive),
            from_last if comm.mesh.index(axis) == 0 else mine,
        ]  # fmt: skip
    return {axis: [x.numpy() for x in tensors] for axis, tensors in found.items()} | {"all": comm.gather_json(rank)}


def test_collectives_give_what_gloo_gives() -> None:
    for thread, process in zip(run_threads(8, collectives), run_ranks(8, collectives), strict=True):
        assert thread["all"] == process["all"] == list(range(8))
        for axis in ("dp", "tp"):
            assert all(np.array_equal(a, b) for a, b in zip(thread[axis], process[axis], strict=True)), axis


@pytest.mark.parametrize("layout", [
    Layout(dp=4), Layout(dp=2, tp=2, sp=True, zero=1), Layout(cp=2, pp=2, chunks=2, schedule="zbv", zero=2),
], ids=str)  # fmt: skip
def test_a_training_has_the_bits_of_processes(layout: Layout) -> None:
    """Where sums over replicas are made in rank order; those over two tp ranks and two stages have one order."""
    task = Task(steps=2, deterministic="layout")
    threads, processes = (trained(layout, task, threads=on) for on in (True, False))
    assert [rank["calls"] for rank in threads] == [rank["calls"] for rank in processes]
    for kind in ("gradients", "weights"):
        mine, theirs = joined(threads, kind), joined(processes, kind)
        assert all(np.array_equal(mine[name], tensor) for name, tensor in theirs.items()), kind


def test_fully_sharded_training_agrees_with_processes() -> None:
    layout, task = Layout(dp=4, zero=3, shard_ranks=2), Task(steps=2)
    found = errors(trained(layout, task, threads=True), _whole(trained(layout, task)))
    assert max(found.values()) < 1e-14


def _whole(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """What one process would hand back, put together from those of several."""
    boxes = {
        kind: {name: (x.shape, (0,) * x.ndim, x) for name, x in joined(ranks, kind).items()}
        for kind in ("gradients", "weights")
    }
    return ranks[0] | boxes


def late() -> tuple[list[float], list[float]]:
    """What is in the tensors before the wait, and what after; the sender changes its tensor in between."""
    comm = _communicator(pp=2)
    tensor, total = torch.ones(1), torch.ones(1)
    handle = comm.all_reduce(total, "pp", async_op=True)
    message = comm.send(tensor, "pp", 1) if comm.mesh.rank == 0 else comm.receive(tensor.zero_(), "pp", 0)
    tensor += 1
    before = [total.item(), tensor.item()]
    assert handle is not None
    handle.wait()
    message.wait()
    return before, [total.item(), tensor.item()]


def test_tensors_move_as_late_as_they_may() -> None:
    sender, receiver = run_threads(2, late)
    assert sender == ([1.0, 2.0], [2.0, 2.0])
    assert receiver == ([1.0, 1.0], [2.0, 2.0]), "not waited for: seen by the receiver"


def never_sent() -> None:
    comm = _communicator(pp=2)
    if comm.mesh.rank == 0:
        comm.receive(torch.empty(1), "pp", 1).wait()
    else:
        comm.all_reduce(torch.empty(3), "pp")


def two_sends() -> None:
    """Each rank waits for the other to take its message: what buffers hide."""
    comm = _communicator(pp=2)
    other = 1 - comm.mesh.rank
    comm.send(torch.ones(1), "pp", other).wait()
    comm.receive(torch.empty(1), "pp", other).wait()


def test_a_deadlock_is_seen_at_once() -> None:
    with pytest.raises(AssertionError, match="no rank can go on") as failure:
        run_threads(2, never_sent)
    said = str(failure.value)
    assert "rank 0 waited for rank 1 to send" in said
    assert "rank 1 waited for all_reduce torch.float32 [3] among [0, 1]" in said
    assert "never_sent" in said
    with pytest.raises(AssertionError, match="rank 1 to receive"):
        run_threads(2, two_sends)


def different() -> None:
    comm = _communicator(dp=2)
    comm.all_reduce(torch.empty(2 + comm.mesh.rank), "dp")


def test_ranks_that_differ_and_fail_say_so() -> None:
    with pytest.raises(AssertionError, match=r"all_reduce torch.float32 \[3\] here, .*\[2\] elsewhere"):
        run_threads(2, different)
    assert len(run_threads(8, collectives)) == 8, "the threads are fit for the next"
