"""The mesh against a brute-force reading of its definition, for every factorisation of small worlds."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations, product
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from megalite.comm import Call, Communicator
from megalite.mesh import AXES, Mesh
from megalite.world import World, join, world_from_environment
from tests.ranks import run_ranks


def factorisations(world: int) -> list[dict[str, int]]:
    divisors = [n for n in range(1, world + 1) if world % n == 0]
    found = []
    for sizes in product(divisors, repeat=len(AXES)):
        total = 1
        for size in sizes:
            total *= size
        if total == world:
            found.append(dict(zip(AXES, sizes, strict=True)))
    return found


@pytest.mark.parametrize("world", [1, 2, 4, 8, 12])
def test_groups_partition_the_world(world: int) -> None:
    for sizes in factorisations(world):
        for count in range(1, len(AXES) + 1):
            for axes in combinations(AXES, count):
                groups = Mesh(sizes).all_ranks(axes)
                assert sorted(rank for ranks in groups for rank in ranks) == list(range(world))
                for ranks in groups:
                    places = [Mesh(sizes, rank).coordinates() for rank in ranks]
                    fixed = {tuple(place[axis] for axis in AXES if axis not in axes) for place in places}
                    assert len(fixed) == 1, "ranks of a group differ on the group's axes alone"
                    assert [Mesh(sizes, rank).index(*axes) for rank in ranks] == list(range(len(ranks)))
                    assert all(Mesh(sizes, rank).ranks(*axes) == ranks for rank in ranks)


def test_tp_ranks_are_neighbours() -> None:
    mesh = Mesh({"pp": 2, "dp": 2, "cp": 1, "tp": 2}, rank=5)
    assert (mesh.ranks("tp"), mesh.ranks("dp"), mesh.ranks("pp")) == ([4, 5], [5, 7], [1, 5])


def collectives() -> dict[str, object]:
    world = world_from_environment()
    join(world)
    calls: list[Call] = []
    comm = Communicator(Mesh({"pp": 1, "dp": 2, "cp": 1, "tp": 2}, world.rank), calls.append)
    over = {axis: torch.tensor([float(world.rank)]) for axis in ("dp", "tp", "cp")}
    for axis, value in over.items():
        comm.all_reduce(value, axis)
    largest = torch.tensor([world.rank])
    comm.all_reduce(largest, *AXES, op="max")
    text = comm.broadcast_json({"from": world.rank})
    return {**{axis: value.item() for axis, value in over.items()}, "max": largest.item(), "text": text, "calls": calls}


def test_collectives_run_over_their_axis_and_are_recorded() -> None:
    for rank, seen in enumerate(run_ranks(4, collectives)):
        assert seen["dp"] == rank + (rank + 2) % 4, "0 with 2, 1 with 3"
        assert seen["tp"] == rank + (rank ^ 1), "0 with 1, 2 with 3"
        assert (seen["cp"], seen["max"], seen["text"]) == (rank, 3, {"from": 0})
        dp, tp = seen["calls"][:2]
        assert (dp.op, dp.axes, dp.dtype, dp.bytes, dp.phase) == ("all_reduce_sum", ("dp",), "float32", 4, "forward")
        assert (tp.axes, tp.group) == (("tp",), (rank - rank % 2, rank - rank % 2 + 1))
        assert dp.site.startswith("test_mesh.py:")


def places(order: tuple[str, ...], shard_ranks: int) -> dict[tuple[str, ...], list[int]]:
    """Every rank's place along some axes, in the order in which a gather over them brings it."""
    world = world_from_environment()
    join(world)
    comm = Communicator(Mesh({"pp": 1, "dp": 2, "cp": 2, "tp": 1}, world.rank, order=order, shard_ranks=shard_ranks))
    chosen = (("dp", "cp"), ("shard",), ("copy",), ("dp", "cp", "tp"))
    return {axes: comm.all_gather(torch.tensor([comm.mesh.index(*axes)]), *axes).tolist() for axes in chosen}


@pytest.mark.parametrize("shard_ranks", [0, 2])
@pytest.mark.parametrize("order", [AXES, ("pp", "cp", "dp", "tp"), ("tp", "cp", "dp", "pp")])
def test_a_gather_has_the_order_of_the_axes_however_they_lie_over_the_ranks(
    order: tuple[str, ...], shard_ranks: int
) -> None:
    for seen in run_ranks(4, places, order, shard_ranks):
        assert all(found == list(range(len(found))) for found in seen.values()), seen


@contextmanager
def recorded(groups: list[list[int]]) -> Iterator[None]:
    """Without processes: `groups` gets the ranks of every group that is made."""
    made = patch.object(dist, "new_group", lambda ranks, **_: groups.append(ranks) or ranks)
    with made, patch.object(type(dist.group), "WORLD", "world"):
        yield


def test_stages_that_communicate_over_less_have_made_as_many_groups() -> None:
    """torch names a group by its ranks and the number of groups before, so the members of one must agree on both: here
    of a tied embedding's, where the first stage has no layers and so no matrices that Muon would gather."""
    made: dict[int, list[list[int]]] = {0: [], 8: []}
    for rank, groups in made.items():
        mesh = Mesh({"pp": 3, "dp": 2, "cp": 1, "tp": 2}, rank)
        with recorded(groups):
            if rank == 8:
                mesh.group("dp", "cp", "tp")
            mesh.group("pp", places=[0, 2])
    assert made[0][-1] == made[8][-1] == [0, 8]
    assert len(made[0]) == len(made[8])


def test_the_world_in_another_order_is_made_before_a_tied_embeddings_group() -> None:
    """The stages between have no such group, and would name the world's by one group less."""
    made: dict[int, list[list[int]]] = {0: [], 1: []}
    for rank, groups in made.items():
        mesh = Mesh({"pp": 4, "dp": 1, "cp": 2, "tp": 1}, rank, order=("tp", "cp", "dp", "pp"))
        with recorded(groups):
            if rank == 0:
                mesh.group("pp", places=[0, 3])
            mesh.group("pp", "dp", "cp", "tp")
    everyone = [0, 4, 1, 5, 2, 6, 3, 7]
    assert made[0].index(everyone) == made[1].index(everyone)


def test_a_group_that_not_all_stages_would_make_is_refused() -> None:
    mesh = Mesh({"pp": 2, "dp": 2, "cp": 1, "tp": 2}, 0)
    with recorded([]), pytest.raises(AssertionError, match="USUAL_GROUPS"):
        mesh.group("pp", "tp")


def test_world_of_a_plain_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert world_from_environment() == World()
