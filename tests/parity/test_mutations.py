"""Every deliberate fault is caught by the layout named with it, which is right without the fault."""

import pytest

from tests.parity import (  # noqa: F401  register their faults
    mutations_of_attention,
    mutations_of_experts,
    mutations_of_precision,
    mutations_of_steps,
)
from tests.parity.layouts import Layout, Task, alone, trained, wrong
from tests.parity.mutations import MUTATIONS
from tests.thread_ranks import Deadlock

AT_LEAST = 97


def what_is_wrong(layout: Layout, task: Task) -> list[str]:
    """As `wrong`, where ranks that wait for each other for ever, or hold different values of one tensor, are a finding
    too. A rank that raises is none: the fault is to be noticed, not to break down."""
    try:
        ranks = trained(layout, task, threads=True)
    except Deadlock as waiting:
        return [str(waiting)]
    try:
        return wrong(ranks, alone(layout, task))
    except AssertionError as disagreement:
        return [str(disagreement)]


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_fault_is_caught(name: str) -> None:
    mutation = MUTATIONS[name]
    alone(mutation.layout, mutation.task)  # without it
    with mutation.fault():
        found = what_is_wrong(mutation.layout, mutation.task)
    print(f"{name}: {mutation.layout}: {'; '.join(found)}")
    assert found


CASES = list(dict.fromkeys((of.layout, of.task) for of in MUTATIONS.values()))


@pytest.mark.parametrize(("layout", "task"), CASES, ids=[f"{layout} {task.model}" for layout, task in CASES])
def test_nothing_is_wrong_without_a_fault(layout: Layout, task: Task) -> None:
    assert not what_is_wrong(layout, task)


def test_there_are_enough_faults() -> None:
    assert len(MUTATIONS) >= AT_LEAST
