"""The fast matrix: a covering choice of layouts against one process, in float64.

Loss and norm of every step, every whole gradient, every weight at the end. `python -m tests.parity.full` takes every
layout there is. Then what must agree to the last bit.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megalite.data.batch import Batch
from megalite.mesh import Mesh
from megalite.pipeline.schedule import lower, make_schedule
from megalite.pipeline.schedule.text import write_csv
from tests.parity import (  # noqa: F401  register their faults
    layouts,
    mutations_of_attention,
    mutations_of_experts,
    mutations_of_steps,
)
from tests.parity.covering import candidates, covering, pairs
from tests.parity.layouts import (
    BOUNDS,
    SCHEDULES,
    SEQUENCE,
    WIDE,
    Layout,
    Task,
    alone,
    errors,
    joined,
    trained,
    wrong,
)
from tests.parity.mutations import MUTATIONS

PARTS = 10
EIGHT = [
    (Layout(dp=2, tp=2, sp=True, pp=2, chunks=2, schedule="interleaved", zero=1), Task(optim="adamw", steps=2)),
    (Layout(cp=2, tp=2, pp=2, chunks=2, schedule="zbv", zero=2), Task(steps=1)),
    (Layout(dp=2, cp=2, cp_kind="ulysses", pp=2, zero=3, order="tp,pp,cp,dp"), Task(optim="adamw", steps=2)),
    (Layout(dp=4, cp=2, zero=3, shard_ranks=4), Task(steps=1, micro=2)),
    # Of four stages those between have no part in a tied embedding, and the world stands in no rising order.
    (Layout(cp=2, pp=4, order="tp,cp,dp,pp"), Task(steps=1)),
    (Layout(tp=8, sp=True), Task(WIDE, steps=1)),
    (Layout(cp=8, cp_kind="ulysses", zero=1), Task(WIDE, steps=1)),
]
UNEVEN = [
    # Stages with other numbers of layers, also none beside embedding or head; microbatches that no stage count divides.
    (Layout(pp=2, layers="1,2"), Task(layers=3, samples=3)),
    (Layout(pp=2, layers="0,3", schedule="zb_h1"), Task(layers=3, samples=5)),
    (Layout(pp=2, chunks=2, schedule="zbv", layers="0,2,3,0"), Task(layers=5, samples=3)),
    (Layout(pp=3, schedule="gpipe"), Task(layers=5, samples=4)),
    (Layout(pp=3, chunks=2, schedule="interleaved"), Task(layers=7, samples=7)),
    (Layout(pp=3, tp=2, sp=True, schedule="zb_auto"), Task(layers=4, samples=1)),
    (Layout(pp=4, schedule="1f1b"), Task(layers=6, samples=2)),
]
FAULTY = list(dict.fromkeys((mutation.layout, mutation.task) for mutation in MUTATIONS.values()))
COVERING = covering(FAULTY)
# The layouts of the faults are trained, with a fault and without, in test_mutations.
CASES = COVERING[len(FAULTY) :] + EIGHT


@pytest.mark.parametrize("part", range(PARTS))
def test_same_as_one_process(part: int) -> None:
    for number, case in enumerate(CASES[part::PARTS]):  # every second one on threads: half the time
        found = errors(trained(*case, threads=number % 2 == 1), alone(*case))
        assert all(found[kind] <= bound for kind, bound in BOUNDS.items()), f"{case}: {found}"


@pytest.mark.parametrize(("layout", "task"), UNEVEN, ids=str)
def test_stages_and_microbatches_of_any_number(layout: Layout, task: Task) -> None:
    task = replace(task, optim="adamw", steps=2)
    assert not wrong(trained(layout, task, threads=True), alone(layout, task))


def test_microbatches_of_other_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages make room for each as it is, on its way forward and back."""
    whole = layouts.microbatches

    def cut(batch: Batch, mesh: Mesh, micro: int = 1) -> list[Batch]:
        return [
            Batch(*(None if x is None else x[:, : SEQUENCE - 4 * (number % 3)] for x in vars(of).values()))
            for number, of in enumerate(whole(batch, mesh, micro))
        ]

    task = Task("untied", steps=2, layers=4)
    full = trained(Layout(), task, threads=True)[0]
    monkeypatch.setattr(layouts, "microbatches", cut)
    expected = trained(Layout(), task, threads=True)[0]
    assert errors([full], expected)["losses"] > 1e-3
    for layout in (Layout(pp=2), Layout(pp=2, tp=2, sp=True, schedule="zb_h1"), Layout(pp=2, chunks=2, schedule="zbv")):
        assert not wrong(trained(layout, task, threads=True), expected), layout


SPLIT = """0F0,0F1,0I0,0F2,0W0,0B1,0F3,0I2,0I3,0W2,0W3
1F0,1I0,1F1,1I1,1F2,1I2,1F3,1B3,1W0,1W1,1W2
"""
PLACED = """0F0,0SEND_F0,0F1,0SEND_F1,0RECV_B0,0B0,0RECV_B1,0B1,0REDUCE_GRAD,0OPTIMIZER
1RECV_F0,1F0,1RECV_F1,1B0,1SEND_B0,1F1,1B1,1SEND_B1,1REDUCE_GRAD,1OPTIMIZER
"""


@pytest.mark.parametrize(("text", "microbatches"), [(SPLIT, 4), (PLACED, 2), ("lowered", 4)])
@pytest.mark.parametrize("zero", [0, 2])
def test_a_schedule_of_ones_own(tmp_path: Path, text: str, microbatches: int, zero: int) -> None:
    """Computation alone, with sends, and as the engine's own passes write it: what runs is what the file says."""
    file = tmp_path / "rows.csv"
    lowered = write_csv(lower(make_schedule("zb_h1", 2, 1, 4)))
    file.write_text(lowered if text == "lowered" else text)
    layout = Layout(dp=2, pp=2, schedule=str(file), zero=zero)
    task = Task(steps=2, samples=2 * microbatches)
    ranks = trained(layout, task, threads=True)
    assert not wrong(ranks, alone(layout, task))
    if text != SPLIT:
        written = [line.split(",")[:-1] for line in file.read_text().splitlines()]  # the step is the trainer's
        assert [[str(op) for op in ranks[place]["log"]] for place in (0, 3)] == written


def test_any_two_values_of_different_axes_meet() -> None:
    met = frozenset().union(*map(pairs, COVERING))
    wanted = frozenset().union(*map(pairs, candidates()))
    assert wanted <= met
    assert len(wanted) > 500
    assert {("schedule", name) for name, _ in SCHEDULES} <= {pair[0] for pair in met if len(pair) == 1}


SAME_BITS = [
    ("recompute", Layout(dp=2), [Task(recompute=mode) for mode in ("none", "activation", "selective", "full")]),
    ("recompute under sp", Layout(tp=2, sp=True), [Task(recompute=mode) for mode in ("none", "selective", "full")]),
    ("recompute in the ring", Layout(cp=2), [Task(recompute=mode) for mode in ("none", "full")]),
    ("every second layer", Layout(dp=2), [Task(recompute="full", recompute_layers=n) for n in (1, 2)]),
    ("offload", Layout(tp=2), [Task(offload=on) for on in (False, True)]),
    # Over two ranks a sum has one order; from three on, gloo's order depends on where a tensor lies in its bucket.
    ("bucket sizes over two ranks", Layout(dp=2), [Task(bucket_mb=size) for size in (0.0001, 0.002, 1.0)]),
    ("bucket sizes", Layout(dp=4), [Task(bucket_mb=size, deterministic="layout") for size in (1e-4, 1.0)]),
]  # fmt: skip


@pytest.mark.parametrize(("what", "layout", "tasks"), SAME_BITS)
def test_same_bits(what: str, layout: Layout, tasks: list[Task]) -> None:
    first, *others = [trained(layout, replace(task, steps=2)) for task in tasks]
    for task, ranks in zip(tasks[1:], others, strict=True):
        assert_same_bits(first, ranks, f"{what}: {task}")


def assert_same_bits(one: list[dict[str, Any]], other: list[dict[str, Any]], what: str) -> None:
    for kind in ("gradients", "weights"):
        mine, theirs = joined(one, kind), joined(other, kind)
        different = [name for name, tensor in theirs.items() if not np.array_equal(mine[name], tensor)]
        assert not different, f"{what}: {kind} differ in {different}"


V_SHAPED = ("zbv", "v_half", "dualpipev")


@pytest.mark.parametrize(("model", "schedules"), [
    ("untied", SCHEDULES),
    # Under a V one rank has both ends: the two uses of a tied embedding add to one gradient as they come.
    ("tied", [of for of in SCHEDULES if of[0] not in V_SHAPED]),
])  # fmt: skip
def test_schedules_give_the_same_bits(model: str, schedules: list[tuple[str, int]]) -> None:
    """Each stage adds up its microbatches in one order whatever the schedule, and where the layers are cut changes no
    sum inside a layer."""
    jobs = [
        (Layout(pp=2, chunks=chunks, schedule=schedule), Task(model, steps=1, layers=4))
        for schedule, chunks in schedules
    ]
    first, *others = [trained(*job) for job in jobs]
    for (layout, _), ranks in zip(jobs[1:], others, strict=True):
        assert_same_bits(first, ranks, str(layout))


def test_zero_gives_the_same_bits_over_two_ranks() -> None:
    """0, 1 and 3 add up microbatches first, then ranks; 2 adds ranks up after each microbatch, another order."""
    jobs = [(Layout(dp=2, zero=zero), Task(optim="sgd", steps=2)) for zero in (0, 1)]
    first, second = [trained(*job) for job in jobs]
    assert_same_bits(first, second, "zero 1")


def test_sequence_parallelism_gives_the_same_bits() -> None:
    """Over two ranks: a reduce-scatter adds the terms that an all-reduce adds. Only a norm's weight sees part of the
    tokens on each rank, so its gradient is added up in another order."""
    plain, spread = (joined(trained(Layout(tp=2, sp=sp), Task(steps=1)), "gradients") for sp in (False, True))
    of_tokens = ("attention_norm.weight", "mlp_norm.weight", "final_norm.weight")
    same = [name for name in plain if not name.endswith(of_tokens)]
    assert len(same) > 10
    assert not [name for name in same if not np.array_equal(plain[name], spread[name])]
