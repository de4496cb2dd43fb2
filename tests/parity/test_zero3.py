"""ZeRO 3 through FSDP2 against one process in float64, alone and beside other axes; its memory, its checkpoints."""

import functools
import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from megalite.checkpoint import dcp
from megalite.comm import Communicator
from megalite.config.schema import ModelConfig
from megalite.data.batch import Batch
from megalite.mesh import AXES, Mesh
from megalite.parallel.fully_sharded import ShardedGradients, rows_of, shard_fully
from megalite.parallel.parameter import Placement, declare, local
from megalite.precision import PRESETS
from megalite.train.evaluate import evaluate
from megalite.world import join, world_from_environment
from tests.parity import layouts
from tests.parity.layouts import Layout, Task, wrong
from tests.ranks import run_ranks

SGD, ADAMW = Task(check=True), Task("untied", "adamw", recompute="full", offload=True)
CASES = [
    (Layout(dp=2, zero=3), ADAMW),
    (Layout(cp=2, zero=3), SGD),
    (Layout(dp=4, zero=3), SGD),
    (Layout(dp=4, zero=3), Task("gpt2", "adamw")),
    (Layout(dp=4, zero=3, shard_ranks=2), ADAMW),
    (Layout(dp=2, cp=2, zero=3, shard_ranks=2), SGD),
    (Layout(dp=2, tp=2, sp=True, zero=3), ADAMW),
    (Layout(dp=2, pp=2, zero=3), SGD),
    (Layout(dp=2, pp=2, zero=3, schedule="gpipe"), ADAMW),
    (Layout(dp=2, pp=2, zero=3, chunks=2, schedule="interleaved"), SGD),
    (Layout(dp=8, zero=3), Task("one kv head", "adamw")),
    (Layout(dp=4, pp=2, zero=3, shard_ranks=2), SGD),
]  # the ranks of dp=8 outnumber the rows of QK-norm: some have none


@pytest.mark.parametrize("world", [2, 4, 8])
def test_same_as_one_process(world: int) -> None:
    jobs = [(layout, task) for layout, task in CASES if layout.world == world]
    for (layout, task), ranks in zip(jobs, layouts.results(jobs), strict=True):
        assert not wrong(ranks, layouts.alone(layout, task)), f"{layout}, {task}"
        sharded = [call for call in ranks[0]["calls"] if call.axes == ("shard",)]
        assert {(call.op, call.phase) for call in sharded} >= {
            ("all_gather", "forward"),
            ("reduce_scatter", "backward"),
        }


def test_one_rank_has_nothing_to_share_out() -> None:
    """Each rank a copy of its own: data parallelism."""
    jobs = [(Layout(dp=2, zero=3, shard_ranks=1), SGD), (Layout(tp=2, zero=3), SGD)]
    for (layout, task), ranks in zip(jobs, layouts.results(jobs), strict=True):
        assert not wrong(ranks, layouts.alone(layout, task)), layout
        assert not [call for call in ranks[0]["calls"] if call.axes == ("shard",)]


def test_bf16_weights_are_rounded_from_sharded_float32_ones() -> None:
    task = Task(precision="bf16")
    whole, sharded = layouts.results([(Layout(dp=2), task), (Layout(dp=2, zero=3), task)])
    for kind, rounding in (("initial", 0.0), ("weights", 2e-3)):
        expected, found = layouts.joined(whole, kind), layouts.joined(sharded, kind)
        for name, values in expected.items():
            rounded = torch.from_numpy(found[name]).bfloat16().double()
            error = torch.linalg.vector_norm(rounded - torch.from_numpy(values))
            assert error <= rounding * torch.linalg.vector_norm(rounded), f"{kind} of {name}: {error:.1e}"


def live_bytes() -> int:
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in map(local, tensors)}
    return sum(storages.values())


def measure(found: list[int], optimizer: Any, **_: Any) -> None:
    """Before every optimizer step: nothing that was gathered may still be there."""
    whole_step = optimizer.step

    def step(number: int) -> None:
        found.append(live_bytes())
        whole_step(number)

    optimizer.step = step


def bytes_of(layout: Layout) -> int:
    layouts.MODELS["wide"] = ModelConfig(layers=2, hidden=64, heads=4, ffn=128)
    before, found = live_bytes(), []
    layouts.train(layout, Task(model="wide", steps=2), functools.partial(measure, found))
    return max(found) - before


def test_weights_gradients_and_state_shrink_with_the_ranks() -> None:
    """SGD in float64: weights, gradients and momenta are all a process holds between two passes."""
    whole, shared = (max(run_ranks(4, bytes_of, layout)) for layout in (Layout(dp=4), Layout(dp=4, zero=3)))
    quarter, half = whole / 4, max(run_ranks(4, bytes_of, Layout(dp=4, zero=3, shard_ranks=2)))
    assert quarter < shared < 1.3 * quarter, "rows are padded to equal numbers"
    assert 2 * quarter < half < 2.4 * quarter


class Toy(nn.Module):
    """A stage whose loss, unlike the engine's fused one, needs the head's weight again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = declare(6, 4, role="head", std=1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 1.0

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        return (self(x) @ self.weight.T).square().sum()


def toy() -> tuple[torch.Tensor, ...]:
    """Two microbatches that both run forward before one runs backward: weight, its gradient, the inputs' gradients."""
    world = world_from_environment()
    join(world)
    comm = Communicator(Mesh({**dict.fromkeys(AXES, 1), "dp": world.size}, world.rank))
    with torch.device("meta"):
        stage = Toy()
    shard_fully(stage, [], comm, torch.device("cpu"), 3, PRESETS["fp64"])
    gradients = ShardedGradients([stage], comm, PRESETS["fp64"], 1e9)
    weight = comm.all_gather(local(stage.weight), "dp")
    xs = [torch.full((3, 4), float(n), dtype=torch.float64, requires_grad=True) for n in (1, 2)]
    losses = [stage.loss(x) for x in xs]
    for loss in losses:
        with gradients.accumulating(last=loss is losses[-1]):
            loss.backward()
    gradients.finish()
    full = comm.all_gather(gradients.full(dict(stage.named_parameters())["weight"]), "dp")
    return weight, full, *(x.grad for x in xs if x.grad is not None)


def test_the_loss_may_read_the_heads_weight_in_its_backward() -> None:
    weight, gradient, *of_inputs = run_ranks(2, toy)[0]
    xs = [torch.full((3, 4), float(n), dtype=torch.float64) for n in (1, 2)]
    torch.testing.assert_close(gradient, 2 * sum(2 * weight @ x.T @ x for x in xs), rtol=1e-12, atol=0)
    for x, found in zip(xs, of_inputs, strict=True):
        torch.testing.assert_close(found, 2 * x @ weight.T @ weight, rtol=1e-12, atol=0)


def with_checkpoints(start: Path | None, end: Path | None, optimizer: Any, comm: Communicator, **_: Any) -> None:
    """Train from the checkpoint `start`, and leave one at `end` after two steps."""
    if start is not None:
        dcp.load_tensors(start, tensors := optimizer.state_tensors(), comm)
        optimizer.load_state_tensors(tensors)
    take_step = optimizer.step

    def step(number: int) -> None:
        take_step(number)
        if end is not None and number == 2:
            dcp.save_tensors(end, optimizer.state_tensors(), comm.mesh.group(*AXES))

    optimizer.step = step


def resumed(layout: Layout, start: Path | None, end: Path | None) -> list[dict[str, Any]]:
    prepare = functools.partial(with_checkpoints, start, end)
    return run_ranks(layout.world, layouts.train, layout, Task("untied", "adamw", steps=2), prepare)


def test_checkpoints_load_under_every_other_layout_and_back(tmp_path: Path) -> None:
    one, three = Layout(), Layout(dp=4, zero=3, shard_ranks=2)
    expected = resumed(one, None, tmp_path / "one")
    assert not wrong(resumed(three, None, tmp_path / "three"), expected[0])
    expected = resumed(one, tmp_path / "one", None)
    for layout in (one, Layout(dp=2, zero=2), Layout(dp=2, tp=2, sp=True, zero=3)):
        assert not wrong(resumed(layout, tmp_path / "three", None), expected[0]), layout
    for layout in (Layout(dp=2, zero=3), three):
        assert not wrong(resumed(layout, tmp_path / "one", None), expected[0]), layout


class Validation:
    """Three sequences: two ranks have unequally many."""

    name, n_samples = "three", 3

    def batch(self, samples: range) -> Batch:
        whole = layouts.global_batch(1, packed=True)
        assert whole.documents is not None
        return Batch(whole.tokens[list(samples)], whole.targets[list(samples)], whole.documents[list(samples)])


def evaluated(found: list[float], pipeline: Any, gradients: Any, comm: Communicator, **_: Any) -> None:
    token_bytes = torch.ones(layouts.VOCAB)
    found.append(evaluate(pipeline.evaluate, Validation(), token_bytes, comm, 1, torch.device("cpu")).loss)
    gradients.zero()


def loss_before_training(layout: Layout) -> float:
    found: list[float] = []
    layouts.train(layout, replace(SGD, steps=1), functools.partial(evaluated, found))
    return found[0]


def test_ranks_with_fewer_sequences_evaluate_with_the_others() -> None:
    expected = run_ranks(1, loss_before_training, Layout())[0]
    for loss in run_ranks(2, loss_before_training, Layout(dp=2, zero=3)):
        assert abs(loss - expected) <= 1e-12 * expected


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 5))
def test_rows_are_cut_as_torch_chunks_them(rows: int, ranks: int, start: int) -> None:
    whole = Placement((start, 2), (rows, 3))
    placed = [rows_of(whole, Mesh({**dict.fromkeys(AXES, 1), "dp": ranks}, rank)) for rank in range(ranks)]
    chunks = torch.arange(start, start + rows).chunk(ranks)
    for place, chunk in zip(placed, chunks, strict=False):
        assert (place.offsets, place.shape) == ((int(chunk[0]), 2), (len(chunk), 3))
    assert all(place.shape[0] == 0 for place in placed[len(chunks) :])


@st.composite
def meshes(draw: Callable[..., Any]) -> dict[str, Any]:
    sizes = {axis: draw(st.integers(1, 4)) for axis in AXES}
    replicas = sizes["dp"] * sizes["cp"]
    shard = draw(st.sampled_from([n for n in range(1, replicas + 1) if replicas % n == 0]))
    ulysses = draw(st.sampled_from([n for n in range(1, sizes["cp"] + 1) if sizes["cp"] % n == 0]))
    order = tuple(draw(st.permutations(AXES)))
    return {"sizes": sizes, "shard_ranks": shard, "ulysses": ulysses, "order": order}


@given(meshes())
def test_copies_and_shards_fold_the_replicas(shape: dict[str, Any]) -> None:
    mesh = Mesh(**shape)
    for rank in range(mesh.world_size):
        here = Mesh(**shape, rank=rank)
        shard, copy = here.ranks("shard"), here.ranks("copy")
        assert len(shard) == shape["shard_ranks"], "ranks that share one copy"
        assert set(shard) & set(copy) == {rank}
        assert sorted({r for s in shard for r in Mesh(**shape, rank=s).ranks("copy")}) == sorted(here.ranks("dp", "cp"))
        assert (shard[here.index("shard")], copy[here.index("copy")]) == (rank, rank)
