"""ZeRO 3 through FSDP2 against one process in float64, alone and beside other axes; its memory, its checkpoints."""

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._subclasses import FakeTensor

from megalite.checkpoint import dcp
from megalite.comm import Communicator
from megalite.config.schema import ModelConfig
from megalite.data.batch import Batch
from megalite.mesh import AXES, Mesh
from megalite.optim.optimizer import Optimizer
from megalite.parallel.data import Gradients
from megalite.parallel.fully_sharded import ShardedGradients, rows_of, shard_fully
from megalite.parallel.parameter import Placement, declare, local
from megalite.pipeline.runtime import Pipeline
from megalite.precision import PRESETS
from megalite.train.evaluate import evaluate
from megalite.world import join, world_from_environment
from tests.parity import layouts
from tests.parity.layouts import Layout, Task, trained, wrong
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


@pytest.mark.parametrize(("layout", "task"), CASES, ids=[f"{layout} {task.optim}" for layout, task in CASES])
def test_same_as_one_process(layout: Layout, task: Task) -> None:
    ranks = trained(layout, task)
    assert not wrong(ranks, layouts.alone(layout, task))
    over_shard = {(call.op, call.phase) for call in ranks[0]["calls"] if call.axes == ("shard",)}
    assert over_shard >= {("all_gather", "forward"), ("reduce_scatter", "backward")}


@pytest.mark.parametrize("layout", [Layout(dp=2, zero=3, shard_ranks=1), Layout(tp=2, zero=3)], ids=str)
def test_one_rank_has_nothing_to_share_out(layout: Layout) -> None:
    """Each rank a copy of its own: data parallelism."""
    ranks = trained(layout, SGD)
    assert not wrong(ranks, layouts.alone(layout, SGD))
    assert not [call for call in ranks[0]["calls"] if call.axes == ("shard",)]


def test_bf16_weights_are_rounded_from_sharded_float32_ones() -> None:
    task = Task(precision="bf16")
    whole, sharded = trained(Layout(dp=2), task), trained(Layout(dp=2, zero=3), task)
    for kind, rounding in (("initial", 0.0), ("weights", 2e-3)):
        expected, found = layouts.joined(whole, kind), layouts.joined(sharded, kind)
        for name, values in expected.items():
            rounded = torch.from_numpy(found[name]).bfloat16().double()
            error = torch.linalg.vector_norm(rounded - torch.from_numpy(values))
            assert error <= rounding * torch.linalg.vector_norm(rounded), f"{kind} of {name}: {error:.1e}"


def live_bytes() -> int:
    gc.collect()
    tensors = [x for x in gc.get_objects() if isinstance(x, torch.Tensor) and not isinstance(x, FakeTensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in map(local, tensors)}
    return sum(storages.values())


def bytes_of(layout: Layout) -> int:
    """What is there before the second optimizer step, when all that was gathered should be gone."""
    layouts.MODELS["wide"] = ModelConfig(layers=2, hidden=64, heads=4, ffn=128)
    before, found, step = live_bytes(), [], Optimizer.step

    def measured(optimizer: Optimizer, number: int) -> None:
        if number == 2:
            found.append(live_bytes())
        step(optimizer, number)

    with patch.object(Optimizer, "step", measured):
        layouts.train(layout, Task(model="wide", steps=2))
    return found[0] - before


def test_weights_gradients_and_state_shrink_with_the_ranks() -> None:
    """SGD in float64: weights, gradients and momenta are all a process holds between two passes."""
    whole, shared = (max(run_ranks(2, bytes_of, layout)) for layout in (Layout(dp=2), Layout(dp=2, zero=3)))
    assert whole / 2 < shared < 1.1 * whole / 2, "rows are padded to equal numbers"


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


def with_checkpoints(layout: Layout, task: Task, start: Path | None, end: Path | None) -> dict[str, Any]:
    """Train from the checkpoint `start`, and leave one at `end` after the last step."""
    make, step = Optimizer.__init__, Optimizer.step

    def started(optimizer: Optimizer, stages: Any, gradients: Gradients, *rest: Any) -> None:
        make(optimizer, stages, gradients, *rest)
        if start is not None:
            dcp.load_tensors(start, tensors := optimizer.state_tensors(), gradients.comm)
            optimizer.load_state_tensors(tensors)

    def saved(optimizer: Optimizer, number: int) -> None:
        step(optimizer, number)
        if end is not None and number == task.steps:
            dcp.save_tensors(end, optimizer.state_tensors(), dist.group.WORLD if layout.world > 1 else None)

    with patch.object(Optimizer, "__init__", started), patch.object(Optimizer, "step", saved):
        return layouts.train(layout, task)


def resumed(layout: Layout, start: Path | None, end: Path | None) -> list[dict[str, Any]]:
    return trained(layout, Task("untied", "adamw", steps=2), with_checkpoints, start, end)


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


def loss_before_training(layout: Layout) -> float:
    found, train = [], Pipeline.train

    def evaluated(pipeline: Pipeline, *arguments: Any) -> torch.Tensor:
        where = (torch.ones(layouts.VOCAB), pipeline.comm, 1, torch.device("cpu"))
        found.append(evaluate(pipeline.evaluate, Validation(), *where).loss)
        pipeline.gradients.zero()
        return train(pipeline, *arguments)

    with patch.object(Pipeline, "train", evaluated):
        layouts.train(layout, replace(SGD, steps=1))
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
