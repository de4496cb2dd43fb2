"""Gradients, optimizers and checkpoints on placements of every kind, against one process that holds whole tensors.

No model and no autograd: terms of gradients are drawn by name, step and rank and handed over in an order that differs
from rank to rank. So what is summed over which ranks, and counted how often, is tested by itself.
"""

import itertools
import random
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from megalite.checkpoint.dcp import load_tensors, read_metadata, save_tensors
from megalite.comm import Communicator
from megalite.config.schema import OptimConfig
from megalite.errors import UserError
from megalite.mesh import AXES, Mesh
from megalite.optim.optimizer import Optimizer
from megalite.parallel.boxes import Held, boxes
from megalite.parallel.data import Gradients
from megalite.parallel.parameter import attach, declare, declared_parameters, materialize, place, placement
from megalite.world import join, world_from_environment
from tests.ranks import run_ranks

STEPS, MICROBATCHES = 3, 2
TIED = "embedding.weight"


class Layout(NamedTuple):
    pp: int = 1
    dp: int = 1
    cp: int = 1
    tp: int = 1
    zero: int = 0
    bucket_bytes: float = 1500.0
    chunks: int = 1  # two stages on every rank: a pipeline in V shape ends where it begins
    ordered: bool = False


class Layer(nn.Module):
    """A parameter of every kind: split by rows, by columns, a term on each tp rank, the same on each tp rank."""

    def __init__(self) -> None:
        super().__init__()
        self.column = declare(12, 10, role="matrix", std=1.0, shard={"tp": 0})
        self.row = declare(10, 14, role="matrix", std=1.0, shard={"tp": 1})
        self.norm = declare(10, role="norm", std=1.0, sees="heads")
        self.router = declare(6, 10, role="matrix", std=1.0)
        self.bias = declare(7, role="bias", std=1.0, shard={"tp": 0})


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = declare(18, 10, role="embedding", std=1.0, shard={"tp": 0})


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = Tied()
        self.layers = nn.ModuleDict({str(number): Layer() for number in range(4)})

    def stages(self, layout: Layout, mesh: Mesh) -> list[nn.Module]:
        """The stages of this rank: layers dealt out, both ends of the model with the tied embedding."""
        count = layout.pp * layout.chunks
        rows = [
            [stage for stage in range(count) if min(stage, 2 * layout.pp - 1 - stage) == p] for p in range(layout.pp)
        ]
        ends = sorted({next(p for p, row in enumerate(rows) if stage in row) for stage in (0, count - 1)})
        made: dict[nn.Parameter, nn.Parameter] = {}
        for owner in self.modules():
            for name, parameter in owner._parameters.items():
                declared = parameter.declaration
                tied = tuple(ends) if owner is self.embedding and len(ends) > 1 else ()
                placed = place(declared, mesh, False, tied)
                made[parameter] = attach(nn.Parameter(parameter.new_empty(placed.shape)), declared, placed)
                owner._parameters[name] = made[parameter]
        stages = []
        for stage in rows[mesh.index("pp")]:
            kept = Model.__new__(Model)
            nn.Module.__init__(kept)
            if stage in (0, count - 1):
                kept.embedding = self.embedding
            kept.layers = nn.ModuleDict({str(n): self.layers[str(n)] for n in range(4) if n * count // 4 == stage})
            stages.append(kept)
        return stages


def build(layout: Layout, name: str, seed: int) -> tuple[Communicator, list[nn.Module], Gradients, Optimizer]:
    world = world_from_environment()
    join(world)
    mesh = Mesh({axis: getattr(layout, axis) for axis in AXES}, world.rank)
    comm = Communicator(mesh, check=True, ordered=layout.ordered)
    with torch.device("meta"):
        stages = Model().stages(layout, mesh)
    materialize(stages, torch.device("cpu"), seed, torch.float64)
    gradients = Gradients(stages, comm, torch.float64, layout.bucket_bytes, layout.zero)
    optim = OptimConfig(name=name, lr=0.05, momentum=0.9, schedule="constant", weight_decay=0.1)
    return comm, stages, gradients, Optimizer(stages, gradients, optim, STEPS)


def term(name: str, step: int, place: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(hash((len(name), sum(name.encode()), step, *place)) % 2**31)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def train(layout: Layout, name: str, seed: int = 1, folder: str = "") -> dict[str, Any]:
    """STEPS steps over terms of sample, cp place, tp place (where each has its own) and use of the tied weight."""
    comm, stages, gradients, optimizer = build(layout, name, seed)
    mesh, chance = comm.mesh, random.Random(comm.mesh.rank)
    norms, first = [], {}
    for step in range(1, STEPS + 1):
        gradients.zero()
        for micro, (chunk, stage) in itertools.product(range(4 * MICROBATCHES // layout.dp), enumerate(stages)):
            sample = micro * layout.dp + mesh.index("dp")
            arrivals = []
            for key, parameter, declared in declared_parameters(stage):
                placed = placement(parameter)
                uses = [0 if "0" in stage.layers else 1] if key == TIED else [0]
                uses = [0, 1] if key == TIED and len(stage.layers) == 4 else uses
                tp = [mesh.index("tp")] if declared.sees == "heads" else [0]
                tp = [0, 1] if declared.sees == "heads" and layout.tp == 1 else tp
                cps = [mesh.index("cp")] if layout.cp > 1 else [0, 1]
                places = itertools.product([sample], cps, tp, uses)
                whole = sum(term(key, step, place, declared.shape) for place in places)
                region = tuple(slice(o, o + n) for o, n in zip(placed.offsets, placed.shape, strict=True))
                if (sample + step) % 3 or "router" not in key:  # some samples give it no gradient at all
                    arrivals.append((parameter, whole[region]))
            chance.shuffle(arrivals)
            with gradients.accumulating(chunk, last=micro == 4 * MICROBATCHES // layout.dp - 1):
                for parameter, value in arrivals:
                    gradients.add(parameter, value)
        gradients.finish()
        norms.append(gradients.global_norm().item())
        if step == 1:
            first = {
                key: Held.run(
                    d.shape, (placement(p).offsets, placement(p).shape), gradients.full(p).clone(), 0, p.numel(), True
                )
                for key, p, d in declared_parameters(stages)
            }
        optimizer.step(step)
    optimizer.wait()
    states = optimizer.state_tensors()
    if folder:
        save_tensors(Path(folder), states, mesh.group(*AXES))
    model = {
        f"model.{key}": Held.run(d.shape, (placement(p).offsets, placement(p).shape), p.detach(), 0, p.numel(), True)
        for key, p, d in declared_parameters(stages)
    }
    return {"norms": norms, "gradients": first, "states": states, "weights": model}


def load(layout: Layout, name: str, folder: str) -> dict[str, Held]:
    """A run from another seed that takes over what `folder` holds; its state, and what the model then computes with."""
    comm, stages, _, optimizer = build(layout, name, seed=2)
    states = optimizer.state_tensors()
    load_tensors(Path(folder), states, comm)
    optimizer.load_state_tensors(states)
    for key, parameter, declared in declared_parameters(stages):
        placed, values = placement(parameter), parameter.detach()
        states[f"computed.{key}"] = Held.run(
            declared.shape, (placed.offsets, placed.shape), values, 0, values.numel(), True
        )
    return states


def joined(ranks: list[dict[str, Held]]) -> dict[str, torch.Tensor]:
    """Logical tensors from all ranks' boxes; every element is held, and held alike."""
    whole: dict[str, torch.Tensor] = {}
    for held in ranks:
        for name, one in held.items():
            target = whole.setdefault(name, torch.full(one.shape, float("nan"), dtype=one.dtype))
            for (offsets, sizes), values in one.parts:
                region = target[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))]
                known = ~region.isnan()
                assert torch.equal(region[known], values[known]), f"copies of {name} differ"
                region.copy_(values)
    for name, tensor in whole.items():
        assert not tensor.isnan().any(), f"nobody holds some of {name}"
    return whole


LAYOUTS = {
    "dp": Layout(dp=2),
    "dp, zero 1": Layout(dp=4, zero=1),
    "cp, zero 2": Layout(dp=2, cp=2, zero=2),
    "tp": Layout(tp=2),
    "tp, zero 1": Layout(dp=2, tp=2, zero=1),
    "tp, zero 2, small buckets": Layout(dp=2, tp=2, zero=2, bucket_bytes=1.0),
    "pp": Layout(pp=2),
    "pp, zero 1": Layout(pp=2, dp=2, zero=1),
    "pp, zero 2, one bucket": Layout(pp=2, dp=2, zero=2, bucket_bytes=1e9),
    "pp, tp": Layout(pp=2, tp=2),
    "V": Layout(pp=2, chunks=2),
    "V, zero 1": Layout(pp=2, dp=2, zero=1, chunks=2),
    "V, zero 2": Layout(pp=2, dp=2, zero=2, chunks=2),
    "chunks, zero 2, ordered": Layout(dp=2, zero=2, chunks=2, ordered=True),
}


def ranks_of(layout: Layout) -> int:
    return layout.pp * layout.dp * layout.cp * layout.tp


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected))


CASES = [pytest.param(layout, "muon", id=f"{words}, muon") for words, layout in LAYOUTS.items()]
CASES += [pytest.param(LAYOUTS["tp, zero 1"], name, id=f"tp, zero 1, {name}") for name in ("sgd", "adamw")]


@pytest.mark.parametrize(("layout", "name"), CASES)
def test_same_as_whole_tensors_on_one_process(layout: Layout, name: str) -> None:
    """With Muon the rest goes by AdamW, so both are on every layout."""
    alone = train_alone(name)
    ranks = run_ranks(ranks_of(layout), train, layout, name)
    for kind, bound in (("gradients", 1e-12), ("weights", 1e-11), ("states", 1e-11)):
        found = joined([rank[kind] for rank in ranks])
        assert found.keys() == alone[kind].keys()
        for key, expected in alone[kind].items():
            assert error(found[key], expected) <= bound, f"{kind} of {key}"
    for rank in ranks:
        counted_once = pytest.approx(alone["norms"], rel=1e-12, abs=0)
        assert rank["norms"] == counted_once, "the global norm counts an element twice or not at all"


@cache
def train_alone(name: str) -> dict[str, Any]:
    result = run_ranks(1, train, Layout(), name)[0]
    return {kind: joined([result[kind]]) for kind in ("gradients", "weights", "states")} | {"norms": result["norms"]}


def test_the_norm_on_one_process_is_that_of_the_summed_gradients() -> None:
    alone = train_alone("sgd")
    expected = torch.cat([gradient.flatten() for gradient in alone["gradients"].values()]).norm().item()
    assert abs(alone["norms"][0] - expected) <= 1e-12 * expected


SAVED = {
    "one process": Layout(),
    "dp": Layout(dp=2),
    "tp, zero 2": LAYOUTS["tp, zero 2, small buckets"],
    "cp, zero 1": Layout(dp=2, cp=2, zero=1, bucket_bytes=1e9),
    "V, zero 1": LAYOUTS["V, zero 1"],
    "pp, tp": LAYOUTS["pp, tp"],
}


@pytest.mark.parametrize("saved", SAVED)
def test_a_checkpoint_of_any_layout_loads_bit_for_bit_on_any_other(tmp_path: Path, saved: str) -> None:
    folder, layout = str(tmp_path), SAVED[saved]
    written = joined([rank["states"] for rank in run_ranks(ranks_of(layout), train, layout, "muon", 1, folder)])
    assert_stored_once(tmp_path, written)
    order = list(SAVED)
    others = [order[(order.index(saved) + shift) % len(order)] for shift in (1, 2, 3)]
    for words in others:
        found = joined(run_ranks(ranks_of(SAVED[words]), load, SAVED[words], "muon", folder))
        for key, value in written.items():
            assert torch.equal(found[key], value), f"{key} of {saved}, loaded on {words}"
            if key.startswith("model."):
                computed = found[f"computed.{key.removeprefix('model.')}"]
                assert torch.equal(computed, value), f"{words} does not compute with the {key} it loaded"


def assert_stored_once(folder: Path, written: dict[str, torch.Tensor]) -> None:
    """Every element of every tensor is in the files, and in one place only."""
    entries = read_metadata(folder).state_dict_metadata
    assert entries.keys() == written.keys()
    for key, value in written.items():
        times = torch.zeros(value.shape, dtype=torch.int64)
        for chunk in entries[key].chunks:
            times[tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))] += 1
        assert bool((times == 1).all()), f"{key} is stored {times.min()} to {times.max()} times"
    alone = {key: torch.empty_like(value) for key, value in written.items()}
    load_tensors(folder, {key: Held.whole(value) for key, value in alone.items()})
    assert all(torch.equal(alone[key], value) for key, value in written.items())


def lacking(layout: Layout, folder: str) -> str:
    """What rank 0 and the last are told when a name of the last stage is not in the checkpoint."""
    comm, _, _, optimizer = build(layout, "sgd", seed=2)
    states = optimizer.state_tensors()
    if comm.mesh.rank == 0:
        save_tensors(Path(folder), {"model.other": Held.whole(torch.zeros(2))}, None)
    comm.on_rank_zero(lambda: None)
    try:
        load_tensors(Path(folder), states, comm)
    except UserError as error:
        return str(error)
    return ""


def test_every_rank_is_told_what_one_stage_misses(tmp_path: Path) -> None:
    told = run_ranks(2, lacking, Layout(pp=2), str(tmp_path))
    assert told[0] == told[1]
    assert "missing" in told[0] and "model.other unexpected" not in told[0]  # the first three problems are named


@given(st.lists(st.integers(1, 5), max_size=4), st.data())
def test_boxes_of_a_run_are_that_run(shape: list[int], data: st.DataObject) -> None:
    size = prod(shape)
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    numbers = torch.arange(size).view(shape)
    cut = list(boxes(shape, start, stop))
    found = [numbers[tuple(slice(o, o + n) for o, n in zip(*box, strict=True))].flatten() for box in cut]
    assert torch.cat([torch.empty(0, dtype=torch.int64), *found]).tolist() == list(range(start, stop))
    assert len(cut) <= max(1, 2 * len(shape) - 1)
