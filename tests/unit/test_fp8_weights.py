"""Weights' FP8 factors that a step keeps: the bits of factors made anew, made once, and gone when the step is over."""

from collections import Counter
from typing import Any

import numpy as np
import pytest

from megalite.parallel.fp8 import USUAL_BACKWARD, Factor, Fp8, WeightFactors
from megalite.parallel.fp8_grouped import GroupedFp8
from tests.parity.layouts import Layout, Task, train, trained

ONE, STEPS = Layout(), 2
TURNED = {"tensorwise", "delayed", "blockwise"}
"""Recipes whose transposed weights are the same numbers."""


def train_anew(layout: Layout, task: Task) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WeightFactors, "of", lambda self, dims, make: make())
        return train(layout, task)


@pytest.mark.parametrize("recipe", list(USUAL_BACKWARD))
def test_they_change_no_bit(recipe: str) -> None:
    task = Task("experts", steps=STEPS, fp8=recipe)
    (kept,), (anew,) = trained(ONE, task, threads=True), trained(ONE, task, train_anew, threads=True)
    assert kept["losses"] == anew["losses"] and kept["norms"] == anew["norms"]
    for name, (_, _, tensor) in kept["weights"].items():
        assert np.array_equal(tensor, anew["weights"][name][2]), name


@pytest.mark.parametrize("recipe", list(USUAL_BACKWARD))
def test_each_is_made_once_a_step_and_not_kept(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: Counter[tuple[int, str]] = Counter()
    objects: dict[int, Any] = {}
    for owner in (Fp8, GroupedFp8):

        def counted(self: Any, kind: Any, values: Any, dims: str, original: Any = owner._quantized) -> Any:
            if kind == "weight":
                made[id(self), dims] += 1
                objects[id(self)] = self
            return original(self, kind, values, dims)

        monkeypatch.setattr(owner, "_quantized", counted)
    trained(ONE, Task("experts", steps=STEPS, fp8=recipe), threads=True)
    assert len(objects) > 8 and set(made.values()) == {STEPS}
    assert {dims for _, dims in made} == ({"NK"} if recipe in TURNED else {"NK", "KN"})
    assert all(of.weights.kept is None for of in objects.values())


def test_zero_3_keeps_none(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, list[Factor]] | None] = []
    original = WeightFactors.of

    def seen(self: WeightFactors, dims: str, make: Any) -> list[Factor]:
        asked.append(self.kept)
        return original(self, dims, make)

    monkeypatch.setattr(WeightFactors, "of", seen)
    trained(Layout(dp=2, zero=3), Task("untied", steps=1, fp8="rowwise"), threads=True)
    assert asked and set(map(type, asked)) == {type(None)}
