"""Which layouts the fast matrix trains: few, but any two values of different axes meet in one of them.

Pairwise covering: greedy over all legal layouts of 2 and 4 ranks with tasks drawn for each, most new pairs for its
cost first. Chosen cases are the same everywhere: nothing is random but from a fixed seed.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from itertools import combinations

from tests.parity.layouts import DENSE, OPTIMIZERS, Layout, Task, all_layouts, legal

Case = tuple[Layout, Task]
SIZES = ("dp", "tp", "cp", "pp")
DRAWN = 12
"""Tasks for each layout: a plain one, and drawn ones."""
PLAIN = Task(steps=1, micro=2)
COST = {2: 0.7, 4: 1.2}


def values(case: Case) -> dict[str, str]:
    """axis -> value, of the axes that a case has."""
    layout, task = case
    found = {axis: f"{getattr(layout, axis)}" for axis in SIZES if getattr(layout, axis) > 1}
    found |= {"sp": f"{layout.sp} {layout.overlap}"} if layout.tp > 1 else {}
    found |= {"cp_kind": layout.cp_kind} if layout.cp > 1 else {}
    found |= {"schedule": layout.schedule} if layout.pp > 1 else {}
    found |= {"zero": str(layout.zero)} if layout.dp * layout.cp > 1 else {}
    task_axes = ("model", "optim", "packed", "micro", "recompute", "offload", "bucket_mb", "deterministic")
    return found | {axis: str(getattr(task, axis)) for axis in task_axes}


def pairs(case: Case) -> frozenset[tuple[tuple[str, str], ...]]:
    """What a case covers: each value, and each two of different axes. What is trained is not crossed with itself, nor
    with a schedule, whose ops know nothing of it; and with an axis that is spread, not with how far it is."""
    found, task_axes = sorted(values(case).items()), {field.name for field in fields(Task)}
    covered: set[tuple[tuple[str, str], ...]] = {(value,) for value in found}
    for two in combinations(found, 2):
        trained = [axis in task_axes for axis, _ in two]
        if any(trained) and (all(trained) or any(axis == "schedule" for axis, _ in two)):
            continue
        covered.add(tuple((axis, "several" if any(trained) and axis in SIZES else value) for axis, value in two))
    return frozenset(covered)


def candidates() -> Iterator[Case]:
    draw = random.Random(1)
    for world in COST:
        for layout in all_layouts(world):
            for number in range(DRAWN):
                task = Task(
                    model=draw.choice(DENSE), optim=draw.choice(list(OPTIMIZERS)), steps=draw.choice([1, 1, 2]),
                    packed=draw.random() < 0.7, recompute=draw.choice(["none", "activation", "selective", "full"]),
                    recompute_layers=1, offload=draw.random() < 0.2, bucket_mb=draw.choice([0.0005, 0.002, 1.0]),
                    deterministic=draw.choice(["true", "true", "layout"]), micro=draw.choice([1, 2, 2, 2]),
                )  # fmt: skip
                for case in [(layout, task)] if number else [(layout, PLAIN), (layout, replace(PLAIN, micro=1))]:
                    if legal(*case):
                        yield case
                        break


def covering(first: Sequence[Case]) -> list[Case]:
    """`first` and what it takes to cover every pair that any candidate has."""
    pool = {case: pairs(case) for case in candidates()}
    missing = frozenset[tuple[tuple[str, str], ...]]().union(*pool.values()) - frozenset().union(*map(pairs, first))
    chosen = list(first)
    while missing:
        best = max(pool, key=lambda case: len(pool[case] & missing) / COST[case[0].world])
        chosen.append(best)
        missing -= pool[best]
    return chosen
