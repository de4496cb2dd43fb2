"""ZeRO 3 gathers weights of FP8 products as codes: what arrives beside what the format defines, of shards of any shape;
products that find the same codes again; how many bytes moved. That training is that of one process: `test_fp8.py`."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megalite.comm import Communicator
from megalite.mesh import Mesh
from megalite.parallel.fp8 import Fp8, Recipe
from megalite.parallel.fp8_gather import Part, gather_codes
from megalite.parallel.fp8_grouped import GroupedFp8
from tests.parity.layouts import Layout, Task, trained
from tests.ranks import joined_world
from tests.thread_ranks import run_threads
from tests.unit.test_fp8_linear import heavy_tailed, quantized

RANKS, EXPERTS = 2, 3
SHAPES = {"wide": (6, 5), "linear": (10, 7), "experts": (EXPERTS, 4, 9), "rows of experts": (EXPERTS, 4, 9)}
"""The experts are more than the ranks can share evenly; the last time each expert's rows are shared out."""


def tensors(dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        name: heavy_tailed(shape[0], int(np.prod(shape[1:])), seed=n).view(shape).to(dtype)
        for n, (name, shape) in enumerate(SHAPES.items())
    }


def shards(name: str, x: Tensor) -> list[Tensor]:
    """Each rank's flat part, as FSDP2 cuts and pads it."""
    dim = int(name == "rows of experts")
    each = -(-x.shape[dim] // RANKS)
    padding = x.new_zeros(*x.shape[:dim], each * RANKS - x.shape[dim], *x.shape[dim + 1 :])
    return [part.flatten() for part in torch.cat((x, padding), dim).split(each, dim)]


def gathered(dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """(what a rank has gathered, the factors that its products make of the whole weights as they arrive)."""
    world = joined_world()
    comm = Communicator(Mesh({"pp": 1, "dp": RANKS, "cp": 1, "tp": 1}, world.rank))
    whole, recipe = tensors(dtype), Recipe("tensorwise", "e5m2")
    linear = Fp8(recipe, comm, "outputs", sp=False)
    apart, together = GroupedFp8(recipe, comm, "outputs"), GroupedFp8(recipe, comm, "outputs")
    parts = [Part(15), Part(35, linear), Part(72, apart, EXPERTS, 2, True), Part(54, together, EXPERTS, EXPERTS, False)]
    mine = torch.cat([shards(name, x)[world.rank] for name, x in whole.items()])
    out = mine.new_empty(RANKS * len(mine))
    gather_codes(comm, "shard", parts, out, mine)
    linear_arrived = torch.from_numpy(expected("linear", whole["linear"])).to(dtype)
    experts_arrived = torch.from_numpy(expected("experts", whole["experts"])).to(dtype)
    factors = [linear.quantized("weight", linear_arrived, "NK"), *apart.quantized("weight", experts_arrived, "NK")]
    return out, [of.codes.float() * of.scales for of in factors]


def expected(name: str, x: Tensor) -> np.ndarray:
    """A scale for the matrix, or for each expert's."""
    if name == "wide":
        return x.double().numpy()
    matrices = [x] if x.dim() == 2 else list(x)
    found = [quantized(of.double().numpy(), 0, 0, "e4m3", power=False) for of in matrices]
    return np.stack(found).reshape(x.shape)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_arrives_is_what_the_format_defines(dtype: torch.dtype) -> None:
    for out, factors in run_threads(RANKS, gathered, dtype):
        places = out.view(RANKS, -1).split([15, 35, 72, 54], 1)
        for (name, x), got in zip(tensors(dtype).items(), places, strict=True):
            theirs = torch.from_numpy(expected(name, x)).to(dtype)
            assert torch.equal(got, torch.stack(shards(name, theirs))), name
        whole = tensors(dtype)
        made = [expected("linear", whole["linear"]), *expected("experts", whole["experts"])]
        assert all(
            np.array_equal(mine.double().numpy(), np.float32(of)) for mine, of in zip(factors, made, strict=True)
        )


def gathers(model: str, **words: Any) -> list[int]:
    calls = trained(Layout(dp=2, zero=3), Task(model, steps=2, **words))[0]["calls"]
    return [call.bytes for call in calls if call.op == "all_gather"]


@pytest.mark.parametrize("fp8", ["tensorwise", "delayed"])
def test_a_weight_is_a_byte_a_number(fp8: str) -> None:
    """Each rank of two hands in half of a block: attention's 16 x 16, 8 x 16 twice and 16 x 16, and of 8 experts three
    matrices of 12 x 16, where float64 has eight bytes."""
    plain, narrow = gathers("experts"), gathers("experts", fp8=fp8)
    assert len(plain) == len(narrow) > 0
    saved = {before - after for before, after in zip(plain, narrow, strict=True)}
    assert saved == {0, 7 * (256 + 128 + 128 + 256) // 2, 7 * 3 * 8 * 12 * 16 // 2}
