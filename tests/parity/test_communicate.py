"""Gradients that travel in bfloat16: how far the sums are from exact ones, that no layout rounds otherwise than it
must, and that half the bytes move."""

from typing import Any

import numpy as np
import pytest

from tests.parity.layouts import Layout, Task, alone, errors, joined, trained

EPSILON = 2.0**-9
"""Largest relative error of one rounding to bfloat16."""


def task(optim: str = "sgd", **others: Any) -> Task:
    return Task("untied", optim, steps=2, communicate="bf16", **others)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_sums_err_as_much_as_their_terms(zero: int) -> None:
    """In float64 all else is exact. A term is off by at most 2⁻⁹ of itself, their sum by that of the sum of their
    lengths: here the terms of four ranks are each not longer than the whole, so 4 · 2⁻⁹; under ZeRO 2 and 3 the same of
    each microbatch's, whose terms are eight."""
    layout = Layout(dp=4, zero=zero)
    found = errors(trained(layout, task(), threads=zero < 3), alone(layout, task()))
    terms = 4 if zero < 2 else 8
    assert EPSILON / 10 < found["gradients"] <= terms * EPSILON
    assert found["losses"] <= terms * EPSILON


def test_whoever_keeps_the_sum_has_the_same_bits() -> None:
    one, other = (joined(trained(Layout(dp=4, zero=zero), task(), threads=True), "weights") for zero in (0, 1))
    assert all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_in_order_no_bit_depends_on_how_data_is_spread(optim: str) -> None:
    """Each microbatch's term is rounded, also on one process, where none travels."""
    chosen = task(optim, precision="bf16", deterministic="layout")
    expected = joined(trained(Layout(), chosen, threads=True), "weights")
    for layout in (Layout(dp=2), Layout(dp=4, zero=1), Layout(dp=2, zero=2)):
        found = joined(trained(layout, chosen, threads=True), "weights")
        assert all(np.array_equal(found[name], expected[name]) for name in expected), layout


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_half_the_bytes_travel(zero: int) -> None:
    layout = Layout(dp=2, zero=zero)

    def sent(communicate: str) -> dict[str, int]:
        chosen = Task("untied", steps=2, precision="bf16", communicate=communicate)
        ranks = trained(layout, chosen, threads=zero < 3)
        found: dict[str, int] = {}
        for call in ranks[0]["calls"]:
            if call.op in ("reduce_scatter", "all_reduce_sum") and call.axes != ("pp", "dp", "cp", "tp"):
                found[call.dtype] = found.get(call.dtype, 0) + call.bytes
        return found

    wide, narrow = sent("auto"), sent("bf16")
    assert set(wide) == {"float32"} and set(narrow) == {"bfloat16"}
    assert 2 * narrow["bfloat16"] == wide["float32"]


def test_with_experts_and_stages() -> None:
    layout = Layout(dp=2, pp=2, ep=2, zero=1)
    chosen = Task("experts", steps=2, communicate="bf16")
    found = errors(trained(layout, chosen, threads=True), alone(layout, chosen))
    assert EPSILON / 10 < found["gradients"] <= 4 * EPSILON
