"""ZeRO and its surroundings, beyond what a layout's parity shows: bits, bytes, hand-made placements, stale weights."""

import pytest
import torch

from megalite.comm import Communicator, Handle
from megalite.config.schema import OptimConfig
from megalite.mesh import Mesh
from megalite.model.transformer import Transformer
from megalite.optim.optimizer import Optimizer
from megalite.parallel.data import Gradients
from megalite.parallel.parameter import materialize
from megalite.world import join, world_from_environment
from tests.parity.test_data_parallel import MODEL, OPTIMIZERS, SEQUENCE, VOCAB, samples, train
from tests.ranks import run_ranks

F32 = torch.float32
CLIPPED = {
    "sgd": OptimConfig(name="sgd", lr=0.1, momentum=0.9, clip=0.05, schedule="constant"),
    "adamw": OPTIMIZERS["adamw"],
    "muon": OptimConfig(name="muon", lr=0.01, clip=0.05, schedule="constant"),
}


@pytest.mark.parametrize("name", CLIPPED)
def test_ordered_sums_give_the_same_bits_on_every_layout(name: str) -> None:
    """float32, clipping active: neither dp, nor bucket sizes, nor ZeRO changes a bit of losses, norms and weights."""
    run = (CLIPPED[name], 3)
    alone = run_ranks(1, train, *run, 2000.0, 0, True, F32, F32)[0]
    layouts = [(2, 1.0, 0), (2, 1e9, 1), (2, 2000.0, 2), (4, 1e9, 0), (4, 2000.0, 1), (4, 1.0, 2)]
    for world, bucket_bytes, zero in layouts:
        for rank in run_ranks(world, train, *run, bucket_bytes, zero, True, F32, F32):
            where = f"world {world}, buckets of {bucket_bytes} bytes, zero {zero}"
            assert (rank["losses"], rank["norms"]) == (alone["losses"], alone["norms"]), where
            for kind in ("gradients", "weights"):
                differing = [key for key, value in alone[kind].items() if not torch.equal(rank[kind][key], value)]
                assert not differing, f"{where}: {kind} of {differing}"


def test_without_order_float32_bits_do_depend_on_the_layout() -> None:
    """Or the test above would show nothing."""
    one, four = (run_ranks(n, train, CLIPPED["sgd"], 3, 2000.0, 0, False, F32, F32)[0] for n in (1, 4))
    assert any(not torch.equal(one["weights"][key], value) for key, value in four["weights"].items())


@pytest.mark.parametrize("zero", [1, 2])
def test_bucket_sizes_change_no_bit_at_two_ranks(zero: int) -> None:
    """Without clipping: the norm of a sharded bucket is made of pieces, whose ends depend on the bucket."""
    small, large = (run_ranks(2, train, OPTIMIZERS["sgd"], 3, size, zero)[0] for size in (1.0, 1e9))
    assert small["calls"] > large["calls"] > 0
    assert all(torch.equal(small["weights"][key], value) for key, value in large["weights"].items())


@pytest.mark.parametrize("zero", [1, 2])
def test_bf16_weights_follow_sharded_float32_ones(zero: int) -> None:
    whole, sharded = (
        run_ranks(2, train, OPTIMIZERS["sgd"], 5, 2000.0, level, False, torch.bfloat16, F32)[1] for level in (0, zero)
    )
    for key, expected in whole["weights"].items():
        assert sharded["weights"][key].dtype == torch.bfloat16
        error = torch.linalg.vector_norm((sharded["weights"][key] - expected).float())
        assert error <= 2e-3 * torch.linalg.vector_norm(expected.float()), key


def test_optimizer_state_and_gradients_shrink_with_the_ranks() -> None:
    """A bucket of everything, so that padding is small beside it."""
    run = (OPTIMIZERS["adamw"], 1, 1e9)
    alone = run_ranks(1, train, *run)[0]
    for zero, gradient_share in ((0, 1), (1, 1), (2, 4)):
        ranks = run_ranks(4, train, *run, zero)
        state, gradients = (max(rank[kind] for rank in ranks) for kind in ("state_bytes", "gradient_bytes"))
        assert state <= alone["state_bytes"] / (4 if zero else 1) * 1.1
        assert gradients <= alone["gradient_bytes"] / gradient_share * 1.1 + (alone["gradient_bytes"] / 4) * (zero == 1)
        if zero:
            assert sum(rank["state_bytes"] for rank in ranks) <= alone["state_bytes"] * 1.02


class _Late:
    """A gather that happens when it is waited for, as late as a slow network may make it."""

    def __init__(self, comm: Communicator, whole: torch.Tensor, shard: torch.Tensor, axes: tuple[str, ...]) -> None:
        self.arguments = (comm, whole, shard.clone(), axes)

    def wait(self) -> None:
        comm, whole, shard, axes = self.arguments
        Communicator.all_gather_into(comm, whole, shard, *axes)


class LateCommunicator(Communicator):
    def all_gather_into(
        self, whole: torch.Tensor, shard: torch.Tensor, *axes: str, async_op: bool = False
    ) -> Handle | None:
        if async_op:
            return _Late(self, whole, shard, axes)
        return super().all_gather_into(whole, shard, *axes)


def read_late(kind: str) -> tuple[list[float], int]:
    """Two steps with late gathers, and what is computed after each; the gathers still under way after the last."""
    world = world_from_environment()
    join(world)
    comm = LateCommunicator(Mesh({"pp": 1, "dp": world.size, "cp": 1, "tp": 1}, world.rank))
    with torch.device("meta"):
        model = Transformer(MODEL, VOCAB, SEQUENCE)
    materialize(model, torch.device("cpu"), seed=3, dtype=torch.float64)
    if kind == "compiled":
        for block in model.blocks.children():
            block.compile(backend="eager")
    gradients = Gradients([model], comm, torch.float64, 2000.0, 0 if kind == "whole" else 1)
    optimizer = Optimizer([model], gradients, OPTIMIZERS["adamw"], 5)
    tokens, targets = samples()
    seen = []
    for step in (1, 2):
        gradients.zero()
        with gradients.accumulating(0, last=True):
            model.loss(tokens, targets).nll_sum.backward()
        gradients.finish()
        optimizer.step(step)
        if kind == "waited":
            optimizer.wait()
        with torch.no_grad():
            seen.append(model.loss(tokens, targets).nll_sum.item())
    optimizer.step(3)
    return seen, len(optimizer.weights._work)


def test_no_forward_pass_reads_stale_weights() -> None:
    expected, none = run_ranks(2, read_late, "whole")[0]
    assert none == 0
    for kind in ("hooks", "compiled", "waited"):
        seen, under_way = run_ranks(2, read_late, kind, timeout=200.0)[1]  # compiling takes a while
        assert under_way > 3, "nothing was late"
        torch.testing.assert_close(seen, expected, rtol=1e-11, atol=0)
