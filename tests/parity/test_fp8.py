"""FP8 on layouts: where ranks agree on a scale, quantised numbers are those of one process, and so is all that follows.

In float64, where a factor that one rank scaled otherwise would show at 1e-2, and the order of sums at 1e-15.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from megalite.parallel.fp8 import USUAL_BACKWARD, Fp8
from tests.parity.layouts import SAMPLES, Layout, Task, alone, errors, joined, trained, wrong

AGREED = [
    ("tensorwise", "untied", Layout(tp=2, sp=True)),
    ("tensorwise", "deepseek", Layout(tp=2, cp=2, ep=2)),
    ("rowwise", "gpt2", Layout(tp=2)),
    ("rowwise", "mla", Layout(tp=2, sp=True)),
    ("rowwise", "untied", Layout(cp=2, cp_kind="ulysses")),
    ("delayed", "untied", Layout(dp=2, pp=2, schedule="zb_h1")),
    ("delayed", "deepseek-v3", Layout(tp=2, cp=2, ep=2, etp=2)),
    # Blocks lie inside what a rank has as they lie in the whole: these axes cut no tensor of a linear.
    ("blockwise", "untied", Layout(dp=4, zero=2)),
    ("mxfp8", "untied", Layout(dp=2, pp=2, chunks=2, schedule="interleaved")),
    # Experts: a tensor is what one of them computes of one microbatch, wherever its tokens come from.
    ("tensorwise", "experts", Layout(dp=2, pp=2, ep=2, schedule="zb_h1")),
    ("tensorwise", "gpt-oss", Layout(tp=2, sp=True, cp=2, etp=2)),
    ("tensorwise", "dropping", Layout(dp=2, tp=2, ep=2, dispatcher="all_gather", order="tp,cp,dp,pp")),
    ("delayed", "gpt-oss", Layout(dp=4, ep=2, etp=2)),
    ("delayed", "gpt-oss", Layout(dp=4, tp=2, ep=2, etp=2)),
    ("delayed", "experts", Layout(cp=2, cp_kind="ulysses", zero=1)),
    ("delayed", "dropping", Layout(tp=2, pp=2, etp=2, schedule="zbv", chunks=2)),
    ("rowwise", "deepseek", Layout(dp=4, ep=4, dispatcher="node", node_ranks=2)),
    ("rowwise", "expert choice", Layout(dp=2, cp=2, ep=2, zero=2)),
    ("rowwise", "deepseek-v3", Layout(tp=2, sp=True, etp=2)),
    ("rowwise", "experts", Layout(tp=2, pp=2, ep=2, schedule="v_half", chunks=2)),
    ("blockwise", "dropping", Layout(dp=2, ep=2, zero=1)),
    ("blockwise", "gpt-oss", Layout(dp=2, pp=2, ep=2, schedule="dualpipev", chunks=2)),
    ("mxfp8", "experts", Layout(dp=4, ep=2, zero=2)),
    ("mxfp8", "deepseek", Layout(dp=2, pp=2, schedule="zb_h2")),
]


def short(fp8: str, model: str, layout: Layout) -> Task:
    """So many steps that every kind of scale has come from another one, and few samples where they suffice."""
    steps, few = 3 if fp8 == "delayed" else 2, SAMPLES // 2
    return Task(model, steps=steps, fp8=fp8, samples=few if layout.dp * max(2, layout.pp) <= few else SAMPLES)


@pytest.mark.parametrize(("fp8", "model", "layout"), AGREED, ids=lambda of: str(of).replace(" ", ","))
def test_layouts_are_one_process(fp8: str, model: str, layout: Layout) -> None:
    task = short(fp8, model, layout)
    assert wrong(trained(layout, task, threads=True), alone(layout, task)) == []


GATHERED = [
    ("tensorwise", "untied", Layout(dp=2, tp=2, zero=3)),
    ("delayed", "deepseek", Layout(dp=2, ep=2, zero=3)),
    ("rowwise", "gpt-oss", Layout(dp=2, tp=2, etp=2, zero=3)),
    ("blockwise", "deepseek", Layout(dp=2, zero=3)),
    ("mxfp8", "experts", Layout(dp=2, ep=2, zero=3)),
]


@pytest.mark.parametrize(("fp8", "model", "layout"), GATHERED, ids=lambda of: str(of).replace(" ", ","))
def test_gathered_weights_too(fp8: str, model: str, layout: Layout) -> None:
    task = short(fp8, model, layout)
    assert wrong(trained(layout, task, threads=True), alone(layout, task)) == []


def test_the_cases_meet_every_axis() -> None:
    for recipe in USUAL_BACKWARD:
        layouts = [layout for fp8, _, layout in (*AGREED, *GATHERED) if fp8 == recipe]
        assert {3} <= {layout.zero for layout in layouts} and any(layout.pp > 1 for layout in layouts), recipe
        assert any(layout.ep > 1 for layout in layouts), recipe
    shared = [layout for fp8, _, layout in AGREED if fp8 in ("tensorwise", "rowwise", "delayed")]
    assert all(any(getattr(of, axis) > getattr(Layout, axis) for of in shared) for axis in ("tp", "sp", "cp", "etp"))
    assert {layout.zero for layout in (of[2] for of in (*AGREED, *GATHERED))} == {0, 1, 2, 3}


CUT = [
    ("mxfp8", "untied", Layout(tp=2)),
    ("mxfp8", "untied", Layout(cp=2)),
    ("blockwise", "untied", Layout(tp=2, sp=True)),
    ("mxfp8", "experts", Layout(dp=2, etp=2)),
    ("blockwise", "experts", Layout(cp=2, ep=2)),
]


@pytest.mark.parametrize(("fp8", "model", "layout"), CUT, ids=lambda of: str(of).replace(" ", ","))
def test_blocks_that_are_cut_otherwise_err_as_much_as_the_recipe(fp8: str, model: str, layout: Layout) -> None:
    """A rank's part of 8 columns is a block of its own; together they were one of 16. Both gradients are as far from
    the exact one as the recipe is: a rounding to e4m3 errs by up to 2⁻⁴, by 2⁻⁴ / √3 in the root mean square; a product
    has two, and some 28 products lie on the way through two layers, forward and back: 2⁻⁴ · √(2 · 28 / 3) = 0.27."""
    task = Task(model, steps=1, fp8=fp8)
    one, exact = alone(layout, task), alone(layout, Task(model, steps=1))
    ranks = trained(layout, task, threads=True)
    recipe, off = distance([one], [exact]), distance(ranks, [one])
    assert 0 < off < 2 * recipe and recipe < 0.27
    assert errors(ranks, one)["losses"] < 2 * errors([one], exact)["losses"] < 0.02


def distance(ranks: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> float:
    """Of the whole gradients of two runs, over the length of the second."""
    mine, theirs = joined(ranks, "gradients"), joined(others, "gradients")
    squares = [np.square(mine[name] - tensor).sum() for name, tensor in theirs.items()]
    return float(np.sqrt(sum(squares) / sum(np.square(tensor).sum() for tensor in theirs.values())))


def test_ranks_that_do_not_agree_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    layout, task = Layout(tp=2, sp=True), Task("untied", steps=1, fp8="tensorwise")
    expected = alone(layout, task)
    made = Fp8.__init__

    def apart(self: Fp8, *arguments: object) -> None:
        made(self, *arguments)  # type: ignore[arg-type]
        self.over = {dim: [] for dim in "MNK"}

    monkeypatch.setattr(Fp8, "__init__", apart)
    found = errors(trained(layout, task, threads=True), expected)
    assert found["gradients"] > 1e-4 and np.isfinite(found["losses"])


@pytest.mark.parametrize(
    ("model", "recompute", "layout"),
    [
        ("untied", "activation", Layout(dp=4, zero=2)),
        ("untied", "activation", Layout(dp=2, pp=2, schedule="zb_h1")),
        ("mla", "full", Layout(dp=2, pp=2, chunks=2, schedule="interleaved")),
        ("deepseek", "selective", Layout(dp=2, ep=2)),
    ],
    ids=str,
)
def test_four_bits_are_drawn_alike(model: str, recompute: str, layout: Layout) -> None:
    """Random rounding follows the text of a microbatch and the layer's name, whoever computes it, once or again."""
    task = Task(model, steps=2, fp8="nvfp4", recompute=recompute)
    assert wrong(trained(layout, task, threads=True), alone(layout, task)) == []


@pytest.mark.parametrize("layout", [Layout(tp=2, sp=True), Layout(cp=2)], ids=str)
def test_four_bits_in_blocks_that_are_cut_otherwise(layout: Layout) -> None:
    """As above; a rounding to e2m1 errs by up to a quarter."""
    task = Task("untied", steps=1, fp8="nvfp4")
    one, exact = alone(layout, task), alone(layout, Task("untied", steps=1))
    off, recipe = distance(trained(layout, task, threads=True), [one]), distance([one], [exact])
    assert 0 < off < 2 * recipe and recipe < 1
