"""The loss scale: its state machine, that it scales every gradient alike, that all ranks and resumes agree on it."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite import Trainer, load_config
from megalite.comm import Communicator
from megalite.config.schema import PrecisionConfig
from megalite.mesh import Mesh
from megalite.pipeline.runtime import Pipeline
from megalite.precision import PRESETS
from megalite.train import build
from megalite.train.loss_scale import LossScale
from tests.parity.layouts import VOCAB, Layout, Task, configuration, further_targets, global_batch, microbatches
from tests.ranks import run_ranks
from tests.tiny_job import tiny_job


def scale(window: int = 3, hysteresis: int = 2, value: float = 16.0) -> LossScale:
    config = PrecisionConfig("fp16", loss_scale=value, loss_scale_window=window, loss_scale_hysteresis=hysteresis)
    return LossScale.of(config, scaled=True)


def course(machine: LossScale, seen: str) -> list[float]:
    """The scale after each step; `seen`: f a finite one, x an overflow."""
    values = []
    for step in seen:
        machine.update(step == "f")
        values.append(machine.value)
    return values


def test_it_grows_after_a_window_and_falls_after_the_tolerated_overflows() -> None:
    assert course(scale(), "fff") == [16, 16, 32]
    assert course(scale(), "ffxfff") == [16, 16, 16, 16, 16, 32]
    assert course(scale(), "xxxff") == [16, 8, 4, 4, 4]
    assert course(scale(), "xffxfffxx") == [16, 16, 16, 8, 8, 8, 16, 16, 8]
    assert course(scale(hysteresis=1, value=2), "xxx") == [1, 1, 1]
    assert course(scale(window=1, value=2.0**31), "fff") == [2.0**32] * 3


@settings(max_examples=200, deadline=None)
@given(st.text("fx", max_size=40), st.integers(1, 4))
def test_without_hysteresis_it_is_torchs(seen: str, window: int) -> None:
    """Beside torch.amp's own update."""
    machine, value, tracker = scale(window, 1, 2.0**10), torch.tensor(2.0**10), torch.tensor(0, dtype=torch.int32)
    for step in seen:
        machine.update(step == "f")
        torch._amp_update_scale_(value, tracker, torch.tensor(float(step == "x")), 2.0, 0.5, window)
        if value < 1 or value > 2.0**32:
            return
        assert machine.value == value.item()


@given(st.text("fx", max_size=40), st.text("fx", max_size=20))
def test_it_goes_on_from_its_state(before: str, after: str) -> None:
    whole, first, second = scale(), scale(), scale()
    course(whole, before)
    course(first, before)
    second.load(first.state())
    assert course(whole, after) == course(second, after)


def test_a_window_may_become_shorter() -> None:
    longer, shorter = scale(window=8), scale(window=4)
    course(longer, "ffffff")
    shorter.load(longer.state())
    assert course(shorter, "ffffff") == [32, 32, 32, 32, 64, 64]


def test_other_precisions_have_none() -> None:
    for name, preset in PRESETS.items():
        machine = LossScale.of(PrecisionConfig(name), preset.scaled)
        assert machine.dynamic == (name == "fp16")
        if not machine.dynamic:
            assert course(machine, "xxffff") == [1.0] * 6


@pytest.mark.parametrize("model", ["deepseek-v3", "gpt-oss", "expert choice", "mtp"])
def test_every_loss_is_scaled_alike(model: str) -> None:
    """A power of two changes no bit: of the model's loss, of the modules further ahead, of the routers' own."""
    task = Task(model, precision="fp64")
    config, comm = configuration(Layout(), task), Communicator(Mesh({"pp": 1, "dp": 1, "cp": 1, "tp": 1}))
    schedule = build.make_schedule(config, comm.mesh)
    device, batch = torch.device("cpu"), global_batch(1, True)
    stages = build.make_stages(config, comm, VOCAB, schedule.placement, PRESETS["fp64"], device)
    gradients = build.make_gradients(config, comm, stages, PRESETS["fp64"])
    pipeline = Pipeline(stages, schedule, comm, gradients, 0.01)
    found, sums = [], []
    for factor in (1.0, 2.0**12):
        gradients.zero()
        ahead = further_targets(batch, config.model.mtp)
        sums.append(pipeline.train(microbatches(batch, comm.mesh), 50.0, ahead, factor))
        gradients.finish()
        found.append([gradients.full(slot.parameter).clone() for slot in gradients.slots])
    assert torch.equal(*sums)
    assert all(torch.equal(one * 2.0**12, scaled) for one, scaled in zip(*found, strict=True))


def job(folder: Path, *words: str) -> Trainer:
    usual = ("precision.name=fp16", "precision.loss_scale_window=2", "precision.loss_scale_hysteresis=1")
    return Trainer(load_config(*tiny_job(*usual, "train.dry_run=false", f"run.dir={folder}", *words)), callbacks=[])


def test_a_scale_that_is_too_large_falls_until_training_goes_on(tmp_path: Path) -> None:
    trainer = job(tmp_path, "precision.loss_scale=4294967296", "train.steps=30", "train.nonfinite_limit=1")
    rows = list(trainer)
    skipped = [row.skipped for row in rows]
    assert skipped[0] and not all(skipped)
    first = skipped.index(False)
    assert all(skipped[:first]) and rows[first].loss_scale == 2.0 ** (32 - first)
    assert rows[-1].loss < rows[0].loss


def overflown(folder: Path, victim: int, words: list[str]) -> list[tuple[bool, float | None, float]]:
    """What a rank notes where, on rank `victim` alone, a gradient of step 2 is infinite."""
    trainer = job(folder, "train.steps=4", *words)

    def spoiled(gradient: torch.Tensor) -> torch.Tensor:
        return torch.full_like(gradient, torch.inf) if trainer.step == 1 else gradient

    if trainer.mesh.rank == victim:
        next(trainer.stages[0].blocks.parameters()).register_hook(spoiled)
    return [(row.skipped, row.loss_scale, trainer.loss_scale.value) for row in trainer]


@pytest.mark.parametrize("victim", [0, 3])
def test_all_ranks_and_stages_agree_when_one_sees_an_overflow(tmp_path: Path, victim: int) -> None:
    words = ["parallel.pp=2", "parallel.dp=2", "train.micro_batch=2", "parallel.schedule=gpipe"]
    ranks = run_ranks(4, overflown, tmp_path, victim, words)
    assert [skipped for skipped, _, _ in ranks[0]] == [False, True, False, False]
    assert [after for _, _, after in ranks[0]] == [65536, 32768, 32768, 65536]
    assert all(rank == ranks[0] for rank in ranks)


def test_a_checkpoint_keeps_it(tmp_path: Path) -> None:
    words = ("train.steps=6", "optim.schedule=constant", "precision.loss_scale_window=3")
    whole = [(row.loss, row.grad_norm, row.loss_scale) for row in job(tmp_path / "whole", *words)]
    parted = [
        (row.loss, row.grad_norm, row.loss_scale)
        for steps in (2, 6)
        for row in job(tmp_path / "parted", *words, f"train.steps={steps}")
    ]
    assert parted == whole and whole[-1][2] == 2.0**17
