"""What narrow numbers cost: beside float64 computed here from the factors alone, and alike on every layout."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from megalite import Trainer, load_config
from megalite.comm import Communicator
from megalite.mesh import Mesh
from megalite.model.experts import Experts
from megalite.model.linear import Linear
from megalite.parallel.fp8 import Fp8, Recipe
from megalite.train.statistics import described
from megalite.train.watched import WatchedExperts, WatchedLinear
from tests.ranks import run_ranks
from tests.tiny_job import tiny_job
from tests.unit.test_fp8_linear import SHAPES, quantized

JOB = (
    *("train.steps=3", "log.statistics=2", "train.micro_batch=2", "train.dry_run=false", "precision=fp64"),
    *("optim.lr=0.01", "checkpoint.every=null", "model.init_std=0.3"),
)
FORMS = {"tensorwise": "e5m2", "delayed": "e5m2", "rowwise": "e4m3", "mxfp8": "e4m3", "blockwise": "e4m3"}


def course(folder: Path, words: list[str]) -> dict[str, Any]:
    """The statistics of step 2, which all other steps are without."""
    rows = list(Trainer(load_config(*tiny_job(*JOB, f"run.dir={folder}", *words)), callbacks=[]))
    assert [row.statistics is None for row in rows] == [True, False, True]
    assert rows[1].statistics is not None
    return rows[1].statistics


def flat(found: dict[str, Any]) -> dict[tuple[str, str, str], float]:
    return {
        (module, part, name): math.nan if value is None else value
        for module, record in found.items()
        for part, numbers in record.items()
        for name, value in numbers.items()
    }


def factor(values: np.ndarray, recipe: str, form: str, weight: bool) -> np.ndarray:
    shape = (128, 128) if recipe == "blockwise" and weight else SHAPES[recipe]
    return quantized(values, *shape, form, recipe == "mxfp8")


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "blockwise", "mxfp8"])
def test_one_process_beside_the_definitions(tmp_path: Path, recipe: str) -> None:
    trainer = Trainer(load_config(*tiny_job(*JOB, f"run.dir={tmp_path}", f"precision.fp8={recipe}")), callbacks=[])
    name = "blocks.1.mlp.down"
    (module,) = (m for n, m in trainer.stages[0].named_modules() if n == name)
    assert isinstance(module, Linear)
    seen: list[list[np.ndarray]] = []

    def keep(_: Linear, arguments: tuple[Tensor, ...], y: Tensor) -> None:
        if trainer.step == 1:
            seen.append([t.detach().flatten(0, -2).numpy().copy() for t in arguments])
            seen[-1].append(module.weight.detach().numpy().copy())  # type: ignore[union-attr]
            y.register_hook(lambda g: seen[len(back)].append(back.append(1) or g.flatten(0, -2).numpy().copy()))

    back: list[int] = []
    module.register_forward_hook(keep)
    found = list(trainer)[1].statistics
    assert found is not None and len(seen) == 4
    assert max(np.abs(x).max() for x, *_ in seen) == found[name]["input"]["amax"]
    as_defined(found[name], [tuple(of) for of in seen], recipe)


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "blockwise", "mxfp8"])
def test_experts_beside_the_definitions(tmp_path: Path, recipe: str) -> None:
    """Every expert's product of every microbatch is one."""
    words = [f"run.dir={tmp_path}", f"precision.fp8={recipe}", *MODELS["experts"]]
    trainer = Trainer(load_config(*tiny_job(*JOB, *words)), callbacks=[])
    name, matrix = "blocks.1.mlp.experts", "down"
    (experts,) = (m for n, m in trainer.stages[0].named_modules() if n == name)
    assert isinstance(experts, Experts)
    watched = experts.fp8[matrix].watch
    assert isinstance(watched, WatchedExperts)
    seen: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def keep(x: Tensor, weight: Tensor, offsets: Tensor, y: Tensor) -> None:
        watched(x, weight, offsets, y)
        if watched.active:
            x, weight = x.detach().clone(), weight.detach().clone()
            y.register_hook(lambda g: parts(x, weight, offsets.tolist(), g.clone()))

    def parts(x: Tensor, weight: Tensor, ends: list[int], g: Tensor) -> None:
        for expert, (start, stop) in enumerate(pairwise(ends)):
            assert start < stop
            seen.append((x[start:stop].numpy(), weight[expert].numpy(), g[start:stop].numpy()))

    experts.fp8[matrix].watch = keep
    found = list(trainer)[1].statistics
    assert found is not None and len(seen) == 4 * 4
    as_defined(found[f"{name}.{matrix}"], seen, recipe)


def as_defined(record: dict[str, Any], seen: list[tuple[np.ndarray, ...]], recipe: str) -> None:
    """`seen`: inputs, weight and gradients of each product of the step."""
    form = FORMS[recipe]
    sums = {part: np.zeros(3) for part in record}
    for x, w, dy in seen:
        kinds = {"input": (x, "e4m3"), "weight": (w, "e4m3"), "gradient": (dy, form)}
        for kind, (values, of) in kinds.items():
            kept = factor(values, recipe, of, kind == "weight")
            there = np.abs(values) > 1e-12 * np.abs(values).max()
            sums[kind] += [there.sum(), (there & (kept == 0)).sum(), 0]
            assert record[kind]["amax"] >= np.abs(values).max() * (1 - 1e-12)
        exact = {"output": x @ w.T, "input_gradient": dy @ w, "weight_gradient": dy.T @ x}
        qx, qw, qdy = (factor(v, recipe, of, v is w) for v, of in kinds.values())
        across = (
            factor(dy.T, recipe, form, False).T,
            factor(x.T, recipe, "e4m3", False),
            factor(w.T, recipe, "e4m3", True).T,
        )
        made = {"output": qx @ qw.T, "input_gradient": qdy @ across[2], "weight_gradient": across[0].T @ across[1].T}
        for part, whole in exact.items():
            sums[part] += [np.square(whole).sum(), np.square(made[part] - whole).sum(), 0]
    for kind in ("input", "weight", "gradient"):
        assert record[kind]["underflow"] == sums[kind][1] / sums[kind][0]
    for part in ("output", "input_gradient", "weight_gradient"):
        assert record[part]["sqnr_db"] == pytest.approx(10 * np.log10(sums[part][0] / sums[part][1]), abs=1e-6)
        assert 15 < record[part]["sqnr_db"] < 40
    assert sums["input"][1] > 0 or recipe != "tensorwise", "nothing was lost, so nothing was shown"


LAYOUTS = {
    "dp": ["parallel.dp=2", "parallel.zero=2"],
    "zero 3": ["parallel.dp=2", "parallel.zero=3"],
    "tp": ["parallel.tp=2"],
    "sp": ["parallel.tp=2", "parallel.sp=true"],
    "cp": ["parallel.cp=2"],
    "zero bubble": ["parallel.pp=2", "parallel.schedule=zb_h1"],
    "tp and cp, experts": ["parallel.tp=2", "parallel.cp=2", "parallel.ep=2"],
    "ep, experts": ["parallel.dp=2", "parallel.ep=2"],
    "etp, experts": ["parallel.dp=2", "parallel.etp=2"],
    "zero 3, experts": ["parallel.dp=2", "parallel.zero=3"],
    "sp, experts": ["parallel.tp=2", "parallel.sp=true"],
}
MODELS: dict[str, list[str]] = {
    "dense": [],
    "experts": ["model.moe.experts=4", "model.moe.ffn=32", "model.moe.shared_ffn=16"],
}
CASES = [("tensorwise", layout) for layout in LAYOUTS] + [("delayed", "sp"), ("rowwise", "tp"), ("none", "sp")]
CASES += [("rowwise", "sp, experts"), ("delayed", "etp, experts"), ("mxfp8", "ep, experts")]


@pytest.mark.parametrize(("recipe", "layout"), CASES)
def test_every_layout_says_what_one_process_says(tmp_path: Path, recipe: str, layout: str) -> None:
    """In float64; with 16 bits a product that is a sum over ranks is rounded in each. `none`: products are exact but
    for their order, so that there is no ratio to compare."""
    words = [f"precision.fp8={recipe}", *MODELS["experts" if "experts" in layout else "dense"]]
    expected = flat(course(tmp_path / "one", words))
    ranks = run_ranks(4 if "and" in layout else 2, course, tmp_path / "many", [*words, *LAYOUTS[layout]])
    assert all(rank == ranks[0] for rank in ranks)
    found = flat(ranks[0])
    assert found.keys() == expected.keys() and len(expected) >= 14 * 15
    for key, value in expected.items():
        if key[2] != "sqnr_db" or recipe != "none":
            assert found[key] == pytest.approx(value, rel=1e-9, nan_ok=True), key


@pytest.mark.parametrize("layout", ["parallel.tp=2", "parallel.cp=2"])
def test_a_copy_that_counts_twice_is_noticed(tmp_path: Path, layout: str) -> None:
    """Sums themselves, which shares would hide."""
    words = ["precision.fp8=tensorwise", *MODELS["dense" if "tp" in layout else "experts"]]
    ranks = run_ranks(2, counted, tmp_path, [layout, *words])
    alone = counted(tmp_path / "one", words)
    total = [sum(of) for of in zip(*ranks, strict=True)]
    assert total == pytest.approx(alone, rel=1e-9)


def counted(folder: Path, words: list[str]) -> list[float]:
    """Every sum that this rank adds, over its linears."""
    trainer = Trainer(load_config(*tiny_job(*JOB, f"run.dir={folder}", "train.steps=2", *words)), callbacks=[])
    list(trainer)
    return [float(x) for x in sum(watched.sums for watched in trainer.statistics.watched)]  # type: ignore[union-attr]


@pytest.mark.parametrize("words", [["precision.fp8=delayed"], ["precision=fp16", "recompute=full"]], ids=str)
def test_measuring_changes_no_bit(tmp_path: Path, words: list[str]) -> None:
    courses = []
    for every in (0, 1):
        given = tiny_job(*JOB, f"run.dir={tmp_path / str(every)}", *words, f"log.statistics={every}")
        courses.append([(row.loss, row.grad_norm) for row in Trainer(load_config(*given), callbacks=[])])
    assert courses[0] == courses[1]


def linear_of(dtype: torch.dtype, fp8: Fp8 | None) -> tuple[Linear, WatchedLinear]:
    """A linear whose weight is one everywhere, watched."""
    alone = Communicator(Mesh({"pp": 1, "dp": 1, "cp": 1, "tp": 1}))
    module = Linear(16, 16, split="outputs", std=1.0, bias=False).to(dtype)
    module.weight.detach().fill_(1.0)
    module.fp8 = fp8
    module.watch = watched = WatchedLinear("x", alone, module)
    watched.active = True
    return module, watched


def test_what_leaves_the_range_of_float16_is_counted() -> None:
    """16 rows: of one the sum is beyond 65504, of one below half the smallest number; zeros are no loss."""
    module, watched = linear_of(torch.float16, None)
    x = torch.ones(16, 16, dtype=torch.float16)
    x[0], x[2] = 5000.0, 0.0
    module(x.requires_grad_())
    found = described(watched.sums.tolist(), watched.largest.tolist())
    assert found["output"]["overflow"] == 1 / 15 and found["output"]["underflow"] == 0
    module.weight.detach().fill_(2.0**-20)
    x.detach().fill_(1.0)[1] = 2.0**-20
    watched.clear()
    module(x)
    found = described(watched.sums.tolist(), watched.largest.tolist())
    assert (found["output"]["overflow"], found["output"]["underflow"]) == (0, 1 / 16)
    assert found["input"] == {"amax": 1.0, "underflow": 0.0, "saturation": 0.0}


def test_what_a_delayed_scale_cuts_off_is_counted() -> None:
    """The history knew values up to 1: of 256 values two are beyond, one is lost, one rounds down to the largest."""
    fp8 = Fp8(Recipe("delayed", "e5m2"), Communicator(Mesh({"pp": 1, "dp": 1, "cp": 1, "tp": 1})), "outputs", sp=False)
    module, watched = linear_of(torch.float32, fp8)
    assert fp8.history is not None
    fp8.history.values = nn.Parameter(torch.ones(3, 1))
    fp8.history.complete = fp8.history.begin().tolist()
    x = torch.full((16, 16), 0.5)
    x[0, :4] = torch.tensor([3.0, -1.1, 1e-7, 1.03])
    module(x.requires_grad_())
    found = described(watched.sums.tolist(), watched.largest.tolist())
    assert found["input"] == {
        "amax": 3.0, "underflow": 1 / 256, "saturation": 2 / 256, "scale": pytest.approx(1 / 448)
    }  # fmt: skip
