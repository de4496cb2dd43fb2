"""Every deliberate fault is caught by the layout named with it, which is right without the fault."""

from typing import Any

import pytest

from tests.parity import mutations_of_steps  # noqa: F401  registers its faults
from tests.parity.layouts import Layout, Task, alone, errors, results, train, wrong
from tests.parity.mutations import MUTATIONS
from tests.ranks import run_ranks

AT_LEAST = 28


def train_with_faults(names: list[str]) -> list[dict[str, Any]]:
    groups: dict[Any, Any] = {}
    found = []
    for name in names:
        mutation = MUTATIONS[name]
        with mutation.fault():
            found.append(train(mutation.layout, mutation.task, groups=groups))
    return found


def what_is_wrong(layout: Layout, task: Task, ranks: list[dict[str, Any]]) -> list[str]:
    """As `wrong`, where ranks that disagree are a finding too."""
    try:
        return wrong(ranks, alone(layout, task))
    except AssertionError as disagreement:
        return [str(disagreement)]


@pytest.mark.parametrize("world", [2, 4])
def test_every_fault_is_caught(world: int) -> None:
    names = [name for name, mutation in MUTATIONS.items() if mutation.layout.world == world]
    by_rank = run_ranks(world, train_with_faults, names, timeout=300.0)
    caught = {}
    for name, *ranks in zip(names, *by_rank, strict=True):
        caught[name] = what_is_wrong(MUTATIONS[name].layout, MUTATIONS[name].task, ranks)
        print(f"{name}: {MUTATIONS[name].layout}: {'; '.join(caught[name]) or 'NOT CAUGHT'}")
    print(f"{sum(map(bool, caught.values()))} of {len(names)} caught at {world} ranks")
    assert all(caught.values()), f"not caught: {[name for name, found in caught.items() if not found]}"


@pytest.mark.parametrize("world", [2, 4])
def test_nothing_is_wrong_without_a_fault(world: int) -> None:
    jobs = list(dict.fromkeys((m.layout, m.task) for m in MUTATIONS.values() if m.layout.world == world))
    for (layout, task), ranks in zip(jobs, results(jobs), strict=True):
        assert not wrong(ranks, alone(layout, task)), f"{layout}: {errors(ranks, alone(layout, task))}"


def test_there_are_enough_faults() -> None:
    assert len(MUTATIONS) >= AT_LEAST
