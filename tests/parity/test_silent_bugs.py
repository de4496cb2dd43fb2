"""What has been silently wrong in other engines, each beside its naive version, which the same comparison refuses."""

import math
from collections import Counter
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from megalite.comm import Communicator
from megalite.errors import RunError
from megalite.mesh import Mesh
from megalite.model.parallelize import parallelize
from megalite.model.transformer import Transformer
from megalite.parallel.data import Gradients
from megalite.parallel.parameter import materialize
from megalite.parallel.ring import merge
from megalite.parallel.tensor import TensorParallel
from megalite.pipeline.runtime import Pipeline
from megalite.pipeline.schedule import lower, make_schedule
from megalite.pipeline.split import split_layers
from megalite.world import join, world_from_environment
from tests.parity import (  # noqa: F401  register their faults
    mutations_of_attention,
    mutations_of_experts,
    mutations_of_steps,
)
from tests.parity.layouts import (
    BOUNDS,
    SCHEDULES,
    VOCAB,
    Layout,
    Task,
    alone,
    configuration,
    errors,
    global_batch,
    joined,
    legal,
    microbatches,
    train,
    trained,
)  # fmt: skip
from tests.parity.mutations import MUTATIONS
from tests.ranks import run_ranks

TASK = Task(steps=1)


def train_with_fault(layout: Layout, task: Task, name: str) -> dict[str, Any]:
    with MUTATIONS[name].fault():
        return train(layout, task)


def gradient_errors(layout: Layout, task: Task, fault: str | None = None) -> dict[str, float]:
    """Of every parameter, the worst relative error of any rank's part of its gradient."""
    how = (train_with_fault, fault) if fault else (train,)
    found: dict[str, float] = {}
    expected = joined([alone(layout, task)], "gradients")
    for rank in trained(layout, task, *how):
        for name, (_, offsets, mine) in rank["gradients"].items():
            theirs = expected[name][tuple(slice(o, o + n) for o, n in zip(offsets, mine.shape, strict=True))]
            error = np.linalg.norm(mine - theirs) / np.linalg.norm(theirs) if mine.size else 0.0
            found[name] = max(found.get(name, 0.0), error)
    return found


def norm_ratio(layout: Layout, task: Task, fault: str | None = None) -> float:
    """The global gradient norm over that of one process."""
    how = (train_with_fault, fault) if fault else (train,)
    ratio: float = trained(layout, task, *how)[0]["norms"][0] / alone(layout, task)["norms"][0]
    return ratio


@pytest.mark.parametrize(
    ("layout", "model", "fault", "names"),
    [
        (Layout(tp=2, sp=True), "tied", "sp: gradients of norm weights are not summed over tp", "final_norm"),
        (Layout(tp=2, sp=True), "tied", "tp: gradients of QK-norm weights are not summed", "query_norm"),
        (Layout(tp=2), "tied", "tp: gradients of QK-norm weights are not summed", "key_norm"),
        (Layout(tp=2), "one kv head", "kv heads < tp: the gathered keys' gradient is cut up, not summed", "key.weight"),
        (Layout(pp=2), "tied", "pp: the tied embedding's gradients are not summed over its stages", "embedding"),
        (Layout(cp=2), "tied", "cp: without dp, gradients are not summed at all", "mlp.up"),
        (Layout(dp=2), "tied", "dp: the loss is divided by the rank's own token count", "mlp.up"),
    ],
)
def test_gradients_are_summed_once(layout: Layout, model: str, fault: str, names: str) -> None:
    task = Task(model, steps=1)
    assert max(gradient_errors(layout, task).values()) <= BOUNDS["gradients"]
    naive = gradient_errors(layout, task, fault)
    assert all(error > 1e-3 for name, error in naive.items() if names in name)


def test_tied_embedding_counts_once_in_the_norm() -> None:
    """Were it the only tensor, counting it twice would be a factor of √2; so the excess is its own square."""
    expected = alone(Layout(pp=2), TASK)
    embedding = np.linalg.norm(joined([expected], "gradients")["embedding.weight"])
    twice = math.sqrt(1 + (embedding / expected["norms"][0]) ** 2)
    assert norm_ratio(Layout(pp=2), TASK) == pytest.approx(1, rel=1e-12)
    assert norm_ratio(Layout(pp=2), TASK, "pp: the norm counts the tied embedding at both ends") == pytest.approx(twice)


def test_gradients_are_not_scaled_by_tokens_under_pp() -> None:
    valid = int((microbatches(global_batch(1, True), Mesh({"pp": 1, "dp": 1, "cp": 1, "tp": 1}))[0].targets >= 0).sum())
    assert norm_ratio(Layout(pp=2), TASK) == pytest.approx(1, rel=1e-12)
    fault = "pp: gradients are scaled by the token count of the first microbatch"
    assert norm_ratio(Layout(pp=2), TASK, fault) == pytest.approx(valid)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_every_strategy_has_the_same_factor_of_dp(zero: int) -> None:
    assert norm_ratio(Layout(dp=2, zero=zero), TASK) == pytest.approx(1, rel=1e-12)
    assert norm_ratio(Layout(dp=2, zero=zero), TASK, "dp: gradients are averaged over ranks") == pytest.approx(0.5)


def vocabulary_losses() -> tuple[float, float, float]:
    """Of one process, of naive ranks that take replicated logits for shards, of ours; ours refuses a whole weight."""
    world = world_from_environment()
    join(world)
    comm = Communicator(Mesh({"pp": 1, "dp": 1, "cp": 1, "tp": world.size}, world.rank))
    tp = TensorParallel(comm)
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((6, 4), (VOCAB, 4)))
    targets = torch.arange(6)
    logits = x @ weight.T
    whole = torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
    lse, _ = tp._combine(logits.logsumexp(1), torch.zeros(6, dtype=torch.float64))
    naive = (lse - logits.gather(1, targets[:, None])[:, 0]).sum().item()
    with pytest.raises(ValueError, match="no shard"):
        tp.cross_entropy(x, weight, targets, VOCAB, 0.0, None)
    shard = weight.tensor_split([VOCAB // 2])[world.rank]
    return whole, naive, tp.cross_entropy(x, shard, targets, VOCAB, 0.0, None)[0].item()


def test_a_replicated_weight_in_the_vocabulary_parallel_loss_raises() -> None:
    for whole, naive, ours in run_ranks(2, vocabulary_losses):
        assert naive - whole == pytest.approx(6 * math.log(2))
        assert ours == pytest.approx(whole, rel=1e-12)


def test_the_reported_loss_is_not_divided_in_place() -> None:
    """The divisor reaches gradients, never the sums that are reported."""
    config = configuration(Layout(), TASK)
    with torch.device("meta"):
        model = Transformer(config.model, VOCAB, 16)
    materialize(model, torch.device("cpu"), 3, torch.float64)
    comm = Communicator(Mesh({"pp": 1, "dp": 1, "cp": 1, "tp": 1}))
    gradients = Gradients([model], comm, torch.float64, 1e9)
    batches = microbatches(global_batch(1, True), comm.mesh)
    pipeline = Pipeline([model], lower(make_schedule("1f1b", 1, 1, len(batches))), comm, gradients, 0.0)
    sums, norms = [], []
    for tokens in (1.0, 7.0):
        gradients.zero()
        sums.append(pipeline.train(batches, tokens))
        gradients.finish()
        norms.append(gradients.global_norm().item())
    assert torch.equal(*sums)
    assert norms[0] == pytest.approx(7 * norms[1])


@pytest.mark.parametrize("layers", [4, 5, 7, 8])
def test_layers_built_are_layers_asked(layers: int) -> None:
    """All ranks together hold every layer once; as many a stage as divides evenly would lose the rest."""
    lost = 0
    for pp, (schedule, chunks) in product([1, 2, 4], SCHEDULES):
        layout = Layout(pp=pp, chunks=chunks, schedule=schedule)
        if not legal(layout) or pp * chunks > layers:
            continue
        config = configuration(layout, Task(layers=layers))
        assert config.model.layers == layers
        placement = make_schedule(schedule, pp, chunks, 8).placement
        split = split_layers(layers, len(placement))
        held: Counter[str] = Counter()
        for rank in range(pp):
            with torch.device("meta"):
                model = Transformer(config.model, VOCAB, 16)
            comm = Communicator(Mesh({"pp": pp, "dp": 1, "cp": 1, "tp": 1}, rank))
            for stage in parallelize(model, comm, config, split, placement):
                held.update(stage.blocks.keys())
        assert held == Counter(map(str, range(layers))), layout
        lost += layers // len(placement) * len(placement) != layers
    assert lost > 0 or layers in (4, 8)


@pytest.mark.parametrize(
    "layout",
    [
        Layout(pp=2), Layout(pp=2, chunks=2, schedule="zbv"), Layout(pp=4, schedule="gpipe"), Layout(tp=2, sp=True),
        Layout(dp=2, zero=1), Layout(dp=2, zero=3), Layout(cp=2, tp=2),
    ],
    ids=str,
)  # fmt: skip
def test_initial_weights_do_not_depend_on_the_layout(layout: Layout) -> None:
    mine, theirs = joined(trained(layout, TASK), "initial"), joined([alone(layout, TASK)], "initial")
    assert mine.keys() == theirs.keys()
    assert all(np.array_equal(mine[name], tensor) for name, tensor in theirs.items())


def test_a_rank_without_any_valid_token() -> None:
    """Rank 2 of 8 has one sample, without a target: a mean of its own would be 0 / 0."""
    layout = Layout(dp=8)
    assert not (global_batch(1, True).targets[2] >= 0).any()
    assert torch.zeros(0).mean().isnan()
    found = errors(trained(layout, TASK), alone(layout, TASK))
    assert all(found[kind] <= bound for kind, bound in BOUNDS.items()), found


def test_rows_that_see_nothing_of_a_block() -> None:
    """Merging two results of a query that saw nothing yet: -inf minus -inf is NaN where it is not asked for."""
    lse = torch.full((1, 1, 2), -math.inf)
    assert torch.exp(lse - torch.logaddexp(lse, lse)).isnan().all()
    out, part = torch.zeros(1, 2, 1, 3), (torch.zeros(1, 2, 1, 3), torch.zeros(1, 1, 2))
    merge(out, lse, part, torch.zeros(1, 2, dtype=torch.bool))
    assert torch.equal(out, torch.zeros(1, 2, 1, 3))
    assert lse.eq(-math.inf).all()
    found = errors(trained(Layout(cp=4), TASK), alone(Layout(cp=4), TASK))
    assert all(found[kind] <= bound for kind, bound in BOUNDS.items()), found


def complaint(layout: Layout, task: Task, name: str) -> dict[str, Any]:
    try:
        train_with_fault(layout, task, name)
    except RunError as error:
        return {"said": str(error), "log": [], "row": []}
    return {"said": "", "log": [], "row": []}


@pytest.mark.parametrize(
    ("fault", "border"),
    [
        ("tp: the terms of a row-parallel product are not summed", "the residual stream"),
        ("tp: the loss's log-partition is of this rank's vocabulary alone", "the loss"),
    ],
)
def test_checking_names_the_border_where_ranks_differ(fault: str, border: str) -> None:
    for rank in trained(Layout(tp=2), Task(steps=1, check=True), complaint, fault):
        assert rank["said"].startswith(f"tensor parallelism: {border}")
        assert "must be the same on all tp ranks" in rank["said"]


@pytest.mark.parametrize(
    "layout", [Layout(tp=2, zero=1, dp=2), Layout(tp=2, sp=True, pp=2), Layout(cp=2, tp=2)], ids=str
)
def test_checking_finds_nothing_where_nothing_is_wrong(layout: Layout) -> None:
    task = Task(steps=1, check=True)
    found = errors(trained(layout, task), alone(layout, task))
    assert all(found[kind] <= bound for kind, bound in BOUNDS.items()), found
