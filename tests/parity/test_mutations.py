"""Every deliberate fault is caught by the layout named with it, which is right without the fault."""

from typing import Any

from tests.parity import (  # noqa: F401  register their faults
    mutations_of_attention,
    mutations_of_experts,
    mutations_of_precision,
    mutations_of_steps,
)
from tests.parity.layouts import Layout, Task, alone, train, trained, wrong
from tests.parity.mutations import MUTATIONS

AT_LEAST = 97


def train_with_fault(layout: Layout, task: Task, name: str) -> dict[str, Any]:
    with MUTATIONS[name].fault():
        return train(layout, task)


def what_is_wrong(layout: Layout, task: Task, ranks: list[dict[str, Any]]) -> list[str]:
    """As `wrong`, where ranks that disagree are a finding too."""
    try:
        return wrong(ranks, alone(layout, task))
    except AssertionError as disagreement:
        return [str(disagreement)]


def test_every_fault_is_caught() -> None:
    caught = {}
    for name, mutation in MUTATIONS.items():
        case = mutation.layout, mutation.task
        caught[name] = what_is_wrong(*case, trained(*case, train_with_fault, name))
        print(f"{name}: {mutation.layout}: {'; '.join(caught[name]) or 'NOT CAUGHT'}")
    print(f"{sum(map(bool, caught.values()))} of {len(caught)} caught")
    assert all(caught.values()), f"not caught: {[name for name, found in caught.items() if not found]}"


def test_nothing_is_wrong_without_a_fault() -> None:
    for case in dict.fromkeys((mutation.layout, mutation.task) for mutation in MUTATIONS.values()):
        assert not wrong(trained(*case, threads=True), alone(*case)), case


def test_there_are_enough_faults() -> None:
    assert len(MUTATIONS) >= AT_LEAST
