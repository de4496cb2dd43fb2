"""The pool that the tests of several ranks share: what it says when a rank fails or hangs."""

import threading

import pytest
import torch

from megalite.comm import Communicator
from megalite.mesh import AXES, Mesh
from megalite.world import join, world_from_environment
from tests.ranks import run_ranks


def _some_wait_forever() -> int:
    world = world_from_environment()
    join(world)
    comm = Communicator(Mesh(dict.fromkeys(AXES, 1) | {"dp": 2}, rank=world.rank))
    comm.all_reduce(torch.ones(3), "dp")
    if world.rank == 1:
        threading.Event().wait()
    comm.all_reduce(torch.ones(5), "dp")
    return world.rank


def _fails() -> None:
    raise KeyError("planted")


def test_a_hang_shows_stacks_and_the_last_collectives_of_all() -> None:
    with pytest.raises(AssertionError) as failure:
        run_ranks(2, _some_wait_forever, timeout=3.0)
    said = str(failure.value)
    assert "ranks [0, 1] gave no answer in 3.0 s" in said
    assert said.count("1: all_reduce_sum over dp torch.float32[3] among [0, 1]") == 2
    assert said.count("2: all_reduce_sum over dp torch.float32[5] among [0, 1]") == 1, "rank 1 never began it"
    assert "_some_wait_forever" in said


def test_a_failure_shows_its_traceback() -> None:
    with pytest.raises(AssertionError, match=r"(?s)of 2 failed.*KeyError: 'planted'"):
        run_ranks(2, _fails)
