"""Moments in few bits on layouts: no block's scale, no rounding and no bit depends on who holds which part of a tensor.

In float64, where a block that one rank scaled otherwise would show at 1e-3, and the order of sums at 1e-15.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch

from megalite import Trainer, load_config
from megalite.optim.moments import Moments
from megalite.optim.optimizer import Optimizer
from tests.parity.layouts import Layout, Task, alone, errors, joined, trained, wrong
from tests.parity.test_zero3 import with_checkpoints
from tests.tiny_job import tiny_job

BLOCKS_IN = ("megalite.optim.slabs", "megalite.optim.moments", "megalite_kernels.reference.moments")
LAYOUTS = [
    Layout(tp=2, sp=True),
    Layout(dp=2, cp=2, zero=1),
    Layout(dp=4, zero=2),
    Layout(dp=2, tp=2, zero=2),
    Layout(dp=2, pp=2, zero=1, schedule="zb_h1"),
]


@contextmanager
def blocks_of(size: int) -> Iterator[None]:
    """Rows of several blocks, also in so small a model; ranks must be threads."""
    with ExitStack() as patches:
        for module in BLOCKS_IN:
            patches.enter_context(patch(f"{module}.MOMENT_BLOCK", size))
        yield


@pytest.mark.parametrize(
    ("optim", "states"), [("adamw", "bf16"), ("adamw", "fp8"), ("adamw", "int8"), ("muon", "int8"), ("sgd", "fp8")]
)
def test_layouts_are_one_process(optim: str, states: str) -> None:
    task = Task("untied", optim, steps=3, states=states)
    for layout in LAYOUTS:
        assert wrong(trained(layout, task, threads=True), alone(layout, task)) == [], layout


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_blocks_that_ranks_cut_anywhere(optim: str) -> None:
    """Blocks of 5 in rows of 16 and 24, cut by tp into 8 and 12, and by ZeRO at any multiple of 64 elements."""
    with blocks_of(5):
        for model, layout in (
            ("untied", Layout(dp=2, tp=2, zero=1)),
            ("experts", Layout(dp=2, tp=2, ep=2, etp=2, zero=2)),
            ("mla", Layout(tp=4, sp=True)),
        ):
            task = Task(model, optim, steps=3, states="int8")
            expected = trained(Layout(), task, threads=True)[0]
            assert wrong(trained(layout, task, threads=True), expected) == [], layout


@pytest.mark.parametrize("layout", [Layout(dp=2, zero=3), Layout(dp=2, tp=2, zero=3)], ids=str)
def test_gathered_weights_too(layout: Layout) -> None:
    for states in ("bf16", "fp8", "int8"):
        task = Task("untied", "adamw", steps=3, states=states)
        assert wrong(trained(layout, task), alone(layout, task)) == [], states


def test_ranks_that_do_not_agree_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    layout, task = Layout(dp=2, tp=2, zero=1), Task("untied", "adamw", steps=3, states="int8")
    monkeypatch.setattr(Moments, "_find_cut", lambda *_: None)
    assert errors(trained(layout, task, threads=True), alone(layout, task))["weights"] > 1e-5


@pytest.mark.parametrize("optim", ["adamw", "muon", "sgd"])
@pytest.mark.parametrize("precision", ["bf16", "bf16_pure"])
def test_no_bit_depends_on_how_data_is_spread(precision: str, optim: str) -> None:
    for states in ("bf16", "int8") if precision == "bf16" else ("auto",):
        task = Task("untied", optim, steps=3, states=states, precision=precision, deterministic="layout")
        expected = joined(trained(Layout(), task, threads=True), "weights")
        for layout in (Layout(dp=4, zero=1), Layout(dp=2, zero=2)):
            found = joined(trained(layout, task, threads=True), "weights")
            assert all(np.array_equal(found[name], expected[name]) for name in expected), (states, layout)


@pytest.mark.parametrize("states", ["bf16", "fp8", "int8"])
def test_checkpoints_load_under_every_other_layout_and_back(states: str, tmp_path: Path) -> None:
    """The same codes and scales everywhere: what goes on from another layout's is what goes on from its own."""
    task = Task("untied", "adamw", steps=2, states=states)
    one, two, three = Layout(), Layout(dp=2, tp=2, zero=2), Layout(dp=4, zero=3, shard_ranks=2)
    expected = trained(one, task, with_checkpoints, None, tmp_path / "one", threads=True)
    further = trained(one, task, with_checkpoints, tmp_path / "one", tmp_path / "on", threads=True)
    for name, layout in (("two", two), ("three", three)):
        assert not wrong(trained(layout, task, with_checkpoints, None, tmp_path / name), expected[0])
        assert not wrong(trained(layout, task, with_checkpoints, tmp_path / "one", None), further[0])
        assert not wrong(trained(one, task, with_checkpoints, tmp_path / name, None, threads=True), further[0])


def test_a_checkpoint_has_the_codes(tmp_path: Path) -> None:
    made: list[dict[str, torch.dtype]] = []
    tensors = Optimizer.state_tensors

    def noted(self: Optimizer) -> object:
        found = tensors(self)
        made.append({key: held.dtype for key, held in found.items()})
        return found

    with patch.object(Optimizer, "state_tensors", noted):
        for states in ("fp8", "int8"):
            task = Task("untied", "adamw", steps=1, states=states)
            trained(Layout(), task, with_checkpoints, None, tmp_path / states, threads=True)
    kinds = ("exp_avg", "exp_avg_sq", "exp_avg.scale", "exp_avg_sq.scale")
    found = [[of[f"optim.head.weight.{kind}"] for kind in kinds] for of in made]
    assert found == [
        [torch.float8_e4m3fn, torch.float16, torch.float32, torch.float32],
        [torch.uint8, torch.uint8, torch.float32, torch.float32],
    ]
    assert all(of["optim.final_norm.weight.exp_avg"] == torch.float64 for of in made)


@pytest.mark.parametrize(
    "words",
    [("precision.states=int8",), ("precision.states=fp8", "optim=muon"), ("precision=bf16_pure", "optim=muon")],
    ids=str,
)
def test_a_run_goes_on_bit_for_bit(words: tuple[str, ...], tmp_path: Path) -> None:
    def states(name: str, steps: int) -> dict[str, list[torch.Tensor]]:
        usual = f"run.dir={tmp_path / name}", "precision=bf16", "checkpoint.every=2", "train.dry_run=false"
        trainer = Trainer(load_config(*tiny_job(*usual, *words)), callbacks=[])
        for _ in range(steps):
            trainer.train_step()
        trainer.save()
        held = trainer.optimizer.state_tensors()
        return {key: [values.clone() for _, values in of.read] for key, of in held.items()}

    unbroken, _ = states("one", 4), states("two", 2)
    for key, resumed in states("two", 2).items():
        assert all(torch.equal(a.float(), b.float()) for a, b in zip(resumed, unbroken[key], strict=True)), key
