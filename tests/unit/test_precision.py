"""bfloat16 alone: rounding that is right on the average, drawn alike on every layout; and what each preset says."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megalite import Trainer, load_config
from megalite.optim.slabs import slabs
from megalite.optim.stochastic import round_stochastically
from megalite.parallel.buckets import Slot
from megalite.parallel.data import Piece
from megalite.parallel.fp8 import WeightFactors
from megalite.parallel.parameter import Declaration, Placement
from megalite.parallel.random import random_bits
from megalite.precision import PRESETS
from megalite.train.memory import predict
from tests.parity.layouts import Layout, Task, joined, trained
from tests.tiny_job import tiny_job

STEP = 2.0**-7
"""Between bfloat16 numbers from 1 to 2."""


def splitmix64(state: int) -> int:
    """The published generator, in Python's whole numbers."""
    word = 2**64 - 1
    z = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & word
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & word
    return z ^ (z >> 31)


def test_bits_are_those_of_splitmix64() -> None:
    start = int.from_bytes(hashlib.blake2b(b"7/1/w", digest_size=8).digest(), "little")
    index = torch.tensor([0, 1, 2, 12345, 2**40])
    expected = [splitmix64((start + i * 0x9E3779B97F4A7C15) % 2**64) >> 48 for i in index.tolist()]
    assert random_bits("7/1/w", index).tolist() == expected


def test_bits_are_spread_evenly() -> None:
    bits = random_bits("seed", torch.arange(2**20)).numpy()
    counts = np.bincount(bits >> 8, minlength=256)
    assert len(counts) == 256 and abs(counts - 4096).max() < 6 * 4096**0.5
    assert abs(np.corrcoef(bits[:-1], bits[1:])[0, 1]) < 5e-3
    assert (random_bits("other", torch.arange(2**20)).numpy() == bits).mean() < 1e-4


@pytest.mark.parametrize("share", [0.0, 2.0**-16, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_rounding_goes_to_a_neighbour_and_is_right_on_the_average(share: float, sign: float) -> None:
    n = 2**20
    x = torch.full((n,), sign * (1.0 + share * STEP))
    rounded = round_stochastically(x, random_bits("x", torch.arange(n))).double()
    assert set(rounded.unique().tolist()) <= {sign, sign * (1.0 + STEP)}
    up = (rounded.abs() - 1.0).mean().item() / STEP
    assert abs(up - share) <= 5 * (share * (1 - share) / n) ** 0.5


def test_what_is_bfloat16_stays_and_what_is_no_number_too() -> None:
    codes = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    for bits in (0, 0xFFFF):
        rounded = round_stochastically(codes.float(), torch.full((2**16,), bits, dtype=torch.int32))
        assert torch.equal(rounded.isnan(), codes.isnan())
        assert torch.equal(rounded[~codes.isnan()].view(torch.int16), codes[~codes.isnan()].view(torch.int16))


@pytest.mark.parametrize("at_once", [2**20, 8])
def test_each_element_knows_its_place(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megalite.optim.slabs.CHUNK", at_once)
    declared = Declaration((6, 5, 4), "matrix")
    whole = torch.arange(120).view(6, 5, 4)
    placed = Placement((2, 1, 0), (3, 4, 4))
    mine = whole[2:5, 1:5, :].reshape(-1)
    slot = replace_slot(declared, placed)
    for start, stop in ((0, 48), (5, 31), (47, 48), (9, 9)):
        piece = Piece(slot, None, start, stop, torch.zeros(stop - start))  # type: ignore[arg-type]
        found = [slab.index(rows, mine.device) for slab in slabs(piece) for rows in slab.chunks()]
        assert [i for part in found for i in part.flatten().tolist()] == mine[start:stop].tolist()


def replace_slot(declared: Declaration, placed: Placement) -> Slot:
    slot = object.__new__(Slot)
    for name, value in {"declared": declared, "placed": placed, "name": "w"}.items():
        object.__setattr__(slot, name, value)
    return slot


def test_small_updates_are_not_lost() -> None:
    """Nothing of an update of a hundredth of a step survives rounding to nearest; of a thousand, ten steps should."""
    x, n = torch.ones(4096).bfloat16(), torch.arange(4096)
    for step in range(1000):
        x = round_stochastically(x.float() + STEP / 100, random_bits(str(step), n))
    assert (torch.ones(1).bfloat16() + STEP / 100).item() == 1.0
    assert (x.double().mean().item() - 1.0) / STEP == pytest.approx(10, abs=0.3)


PURE = Task("untied", "adamw", steps=3, precision="bf16_pure", deterministic="layout")


@pytest.mark.parametrize("layout", [Layout(dp=2), Layout(dp=4, zero=1), Layout(dp=2, zero=2)], ids=str)
def test_no_bit_depends_on_how_data_is_spread(layout: Layout) -> None:
    alone, ranks = trained(Layout(), PURE, threads=True), trained(layout, PURE, threads=True)
    expected, found = joined(alone, "weights"), joined(ranks, "weights")
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    rounded = trained(Layout(), replace(PURE, precision="bf16"), threads=True)
    off = [np.abs(w - expected[n]).max() / np.abs(w).max() for n, w in joined(rounded, "weights").items()]
    assert 0 < max(off) < 0.05, "near the weights that have float32 behind them, and not those"


BYTES = {"fp64": 32, "fp32": 16, "bf16": 18, "fp16": 18, "bf16_pure": 10}
OF_STATES = {"fp32": 8, "bf16": 4, "fp8": 3 + 2 * 4 / 256, "int8": 2 + 2 * 4 / 256}


@pytest.mark.parametrize(
    ("name", "states", "bytes"),
    [*((name, "auto", of) for name, of in BYTES.items()), *(("bf16", name, 10 + of) for name, of in OF_STATES.items())],
)
def test_bytes_of_a_parameter(name: str, states: str, bytes: float, tmp_path: Path) -> None:
    """As docs/precision.md says, as predicted, and as kept."""
    words = f"precision.name={name}", f"precision.states={states}", f"run.dir={tmp_path}", "train.dry_run=false"
    trainer = Trainer(load_config(*tiny_job(*words, "model.hidden=256", "model.ffn=256", "optim.name=adamw")), [])
    weights = [parameter for stage in trainer.stages for parameter in stage.parameters()]
    kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in weights}
    for key, held in trainer.optimizer.state_tensors().items():
        for _, t in held.parts:
            if not key.endswith(".step"):
                kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
    bytes_kept = sum(kept.values()) + trainer.gradients.kept_bytes()
    elements = sum(parameter.numel() for parameter in weights)
    memory = predict(trainer.config, trainer.vocab, trainer.precision)
    assert memory.weights + memory.gradients + memory.optimizer == bytes * elements
    assert bytes_kept == pytest.approx(bytes * elements, rel=0.01)


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "rowwise", "blockwise", "mxfp8"])
def test_bytes_of_weights_in_fp8(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end of a step there are as many codes as predicted: each matrix of the blocks, and its transpose."""
    codes, end = [], WeightFactors.end

    def counted(self: WeightFactors) -> None:
        codes.extend(factor.codes.nbytes for made in (self.kept or {}).values() for factor in made)
        end(self)

    monkeypatch.setattr(WeightFactors, "end", counted)
    words = f"precision.fp8={recipe}", f"run.dir={tmp_path}", "train.dry_run=false", "precision.name=bf16"
    trainer = Trainer(load_config(*tiny_job(*words, "model.hidden=64", "model.ffn=128")), [])
    trainer.train_step()
    plain = replace(trainer.config, precision=replace(trainer.config.precision, fp8="none"))
    narrow, wide = (predict(config, trainer.vocab, trainer.precision) for config in (trainer.config, plain))
    assert narrow.weights - wide.weights == pytest.approx(sum(codes), rel=1e-9) and codes
    assert narrow.total - wide.total == pytest.approx(sum(codes), rel=1e-6)


def test_presets_say_what_they_keep() -> None:
    assert str(PRESETS["fp32"]) == "fp32"
    assert str(PRESETS["bf16"]) == "bf16 (compute bf16; accumulate fp32; communicate fp32; main fp32; moments fp32)"
    assert "main bf16; moments bf16; updates rounded stochastically" in str(PRESETS["bf16_pure"])
    assert str(replace(PRESETS["bf16"], moments="int8")).endswith("communicate fp32; main fp32; moments int8)")
    assert "dynamic loss scale" in str(PRESETS["fp16"])
