"""parallel.check: ranks that are about to do different things are told apart, with where in the code."""

import pytest
import torch

from megalite.comm import Communicator
from megalite.errors import RunError
from megalite.mesh import Mesh
from tests.ranks import joined_world, run_ranks

FINE, SHAPE, DTYPE, OP = "fine", "shape", "dtype", "op"


def said(what: str) -> str:
    """What this rank is told."""
    world = joined_world()
    comm = Communicator(Mesh({"pp": 1, "dp": 2, "cp": 1, "tp": 1}, world.rank), check=True)
    odd = world.rank == 1
    tensor = torch.zeros(3 if odd and what == SHAPE else 2, dtype=torch.float64 if odd and what == DTYPE else None)
    try:
        if odd and what == OP:
            comm.all_gather(tensor, "dp")
        else:
            comm.all_reduce(tensor, "dp")
    except RunError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("what", [SHAPE, DTYPE, OP])
def test_who_differs_is_said_on_every_rank(what: str) -> None:
    for line in run_ranks(2, said, what):
        assert line.startswith("ranks of a group call different collectives: rank 0: all_reduce")
        assert "; rank 1: all_" in line and line.count("test_comm_check.py") == 2


def test_ranks_that_agree_are_told_nothing() -> None:
    assert run_ranks(2, said, FINE) == ["", ""]
