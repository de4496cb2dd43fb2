"""Experts in FP8: a whole layer, there and back, beside a loop over experts and microbatches that is written from the
formats' definitions in float64; experts without tokens; whose histories a checkpoint keeps."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megalite.config.schema import ModelConfig, MoEConfig
from megalite.mesh import Mesh
from megalite.model.experts import Experts
from megalite.parallel.experts import Sources, Work
from megalite.parallel.fp8 import KINDS, USUAL_BACKWARD, Recipe
from megalite.parallel.parameter import materialize
from tests.ranks import run_ranks
from tests.unit.test_fp8_linear import ALONE, SHAPES, heavy_tailed, job, quantized

EXPERTS, TOKENS, HIDDEN, FFN, SOURCES = 4, 90, 136, 150, 2
"""No multiples of a block."""
LIMIT, ALPHA = 7.0, 1.702
"""gpt-oss's clamped SwiGLU."""


def experts(recipe: str, **model: Any) -> Experts:
    """Of which the last has no token; every one is met by two microbatches."""
    config = ModelConfig(hidden=HIDDEN, heads=2, init_std=0.05, moe=MoEConfig(experts=EXPERTS, ffn=FFN), **model)
    with torch.device("meta"):
        made = Experts(config, 0.05)
        made.multiply_in(Recipe(recipe, USUAL_BACKWARD[recipe]), ALONE, steps=4)
    materialize(made, torch.device("cpu"), 1, torch.float64)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    for fp8 in made.fp8.values():
        fp8.sources = Sources((0, 1))
    return made


def work() -> Work:
    generator = torch.Generator().manual_seed(4)
    chosen = torch.rand(TOKENS, EXPERTS - 1, generator=generator).argsort(1)[:, :2]
    chosen[::7, 1] = -1
    source = torch.randint(SOURCES, (TOKENS, 1), generator=generator)
    numbers = torch.where(chosen < 0, -1, chosen * SOURCES + source)
    probs = torch.rand(TOKENS, 2, generator=generator, dtype=torch.float64)
    return Work(heavy_tailed(TOKENS, HIDDEN, seed=3).double(), numbers, probs, None, SOURCES)


def activation(kind: str, gate: np.ndarray, up: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """act(gate, up) and its derivatives by both."""
    slope = ALPHA if kind == "swiglu_clamped" else 1.0
    g, u, open_g, open_u = gate, up, np.ones_like(gate), np.ones_like(up)
    if kind == "swiglu_clamped":
        g, u = np.minimum(gate, LIMIT), np.clip(up, -LIMIT, LIMIT)
        open_g, open_u, u = gate <= LIMIT, np.abs(up) <= LIMIT, u + 1
    sigmoid = 1 / (1 + np.exp(-slope * g))
    by_gate = sigmoid * (1 + slope * g * (1 - sigmoid))
    return g * sigmoid * u, by_gate * u * open_g, g * sigmoid * open_u


def by_definition(
    made: Experts, recipe: str, kind: str, given: Work, grad: np.ndarray
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The output and all gradients: of rows, probabilities, weights and biases."""
    form = USUAL_BACKWARD[recipe]
    values = {name: p.detach().double().numpy() for name, p in made.named_parameters() if p.requires_grad}
    found = {name: np.zeros(value.shape) for name, value in values.items()}
    rows, numbers, probs = given.rows_RD.numpy(), given.indices_RK.numpy(), given.probs_RK.detach().numpy()
    out, found["rows"], found["probs"] = np.zeros(rows.shape), np.zeros(rows.shape), np.zeros(probs.shape)

    def q(matrix: np.ndarray, what: str) -> np.ndarray:
        shape = (128, 128) if (recipe, what) == ("blockwise", "weight") else SHAPES[recipe]
        return quantized(matrix, *shape, form if what == "gradient" else "e4m3", recipe == "mxfp8")

    def forward(name: str, x: np.ndarray, e: int) -> np.ndarray:
        y = q(x, "input") @ q(values[name][e], "weight").T
        return y + values[f"{name}_bias"][e] if f"{name}_bias" in values else y

    def backward(name: str, x: np.ndarray, dy: np.ndarray, e: int) -> np.ndarray:
        found[name][e] += q(dy.T, "gradient") @ q(x.T, "input").T
        if f"{name}_bias" in values:
            found[f"{name}_bias"][e] += dy.sum(0)
        return q(dy, "gradient") @ q(values[name][e].T, "weight").T

    for e in range(EXPERTS):
        for s in range(SOURCES):
            token, slot = np.nonzero(numbers == e * SOURCES + s)
            if not len(token):
                continue
            x, p, dout = rows[token], probs[token, slot], grad[token]
            gate, up = forward("gate", x, e), forward("up", x, e)
            h, by_gate, by_up = activation(kind, gate, up)
            y = forward("down", h, e)
            np.add.at(out, token, p[:, None] * y)
            found["probs"][token, slot] = (dout * y).sum(1)
            dh = backward("down", h, p[:, None] * dout, e)
            dx = backward("gate", x, dh * by_gate, e) + backward("up", x, dh * by_up, e)
            np.add.at(found["rows"], token, dx)
    return out, found


@pytest.mark.parametrize("again", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize(
    ("recipe", "kind", "padded"),
    [
        *((recipe, "swiglu", False) for recipe in USUAL_BACKWARD),
        ("tensorwise", "swiglu_clamped", False),
        ("rowwise", "swiglu_clamped", True),
        ("blockwise", "swiglu", True),
        ("mxfp8", "swiglu_clamped", True),
    ],
)
def test_layer_is_what_the_recipe_defines(recipe: str, kind: str, padded: bool, again: bool) -> None:
    made = experts(recipe, activation=kind, mlp_bias=kind == "swiglu_clamped" and not padded)
    made.recompute = again
    given = work()
    rows, probs = given.rows_RD.requires_grad_(), given.probs_RK.requires_grad_()
    y = made(given._replace(rows_RD=rows, probs_RK=probs), TOKENS * SOURCES if padded else None)
    grad = heavy_tailed(TOKENS, HIDDEN, seed=5).double()
    y.backward(grad)
    mine = {name: p.grad for name, p in made.named_parameters() if p.requires_grad} | {
        "rows": rows.grad,
        "probs": probs.grad,
    }
    out, expected = by_definition(made, recipe, kind, given._replace(rows_RD=rows.detach()), grad.numpy())
    assert relative(y.detach(), out) < 1e-12
    assert mine.keys() == expected.keys()
    for name, found in mine.items():
        assert found is not None and relative(found, expected[name]) < 1e-12, name
    assert not mine["up"][-1].any() and mine["up"][:-1].any()  # type: ignore[index]


def relative(mine: Tensor, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(mine.numpy() - theirs) / np.linalg.norm(theirs))


@pytest.mark.parametrize("recipe", USUAL_BACKWARD)
def test_no_tokens_at_all(recipe: str) -> None:
    made = experts(recipe)
    for rows in (0, 3):
        x = torch.ones(rows, HIDDEN, dtype=torch.float64, requires_grad=True)
        none = torch.full((rows, 2), -1)
        y = made(Work(x, none, torch.ones(rows, 2, dtype=torch.float64), None, SOURCES))
        y.sum().backward()
        assert x.grad is not None and y.shape == x.shape and not y.any() and not x.grad.any()
    assert all(not p.grad.any() for p in made.parameters() if p.grad is not None)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("recipe", USUAL_BACKWARD)
def test_what_is_no_number_stays_with_its_expert(recipe: str, value: float) -> None:
    """A token that is no number reaches its own experts' weights, and no other expert."""
    made, given = experts(recipe), work()
    token = int((given.indices_RK[:, 1] < 0).nonzero()[0])
    expert = int(given.indices_RK[token, 0]) // SOURCES
    given.rows_RD[token, 5] = value
    y = made(given)
    y.sum().backward()
    others = [e for e in range(EXPERTS) if e != expert]
    assert made.up.grad is not None and y[token].isnan().all()
    assert made.up.grad[expert].isnan().any() and not made.up.grad[others].isnan().any()


def test_each_expert_has_a_history_of_its_own() -> None:
    made, given = experts("delayed"), work()
    fp8 = made.fp8["up"]
    assert fp8.history is not None
    fp8.history.values = made.amax_history.detach()[:, 1]
    fp8.history.values[0, 0] = 1.0  # the first expert's inputs were small
    assert fp8.history.begin().tolist() == [False, False, False]
    parts = [given.rows_RD[i : i + 9] for i in range(0, 72, 9)]
    factors = fp8.quantized("input", parts, "MK")
    largest = [part.abs().max().item() for part in parts]
    scales = [factor.scales.item() * 448 for factor in factors]
    assert scales == pytest.approx([1.0, 1.0, *largest[2:]], rel=1e-6)
    assert fp8.history.seen[:, KINDS.index("input")].tolist() == pytest.approx(
        [max(largest[i : i + 2]) for i in range(0, 8, 2)], rel=1e-6
    )


def test_a_history_does_not_hide_what_is_no_number() -> None:
    fp8 = experts("delayed").fp8["up"]
    assert fp8.history is not None
    fp8.history.values = torch.ones(EXPERTS, len(KINDS), 2)
    fp8.history.complete = fp8.history.begin().tolist()
    parts = [torch.ones(2, 3) for _ in range(EXPERTS * SOURCES)]
    parts[1][0, 0] = torch.inf
    lost = [not factor.scales.isfinite().all() for factor in fp8.quantized("input", parts, "MK")]
    assert fp8.history.complete == [True] * len(KINDS)
    assert lost == [part == 1 for part in range(EXPERTS * SOURCES)]


def test_histories_of_experts_are_kept(tmp_path: Path) -> None:
    words = ("precision.fp8=delayed", "model.moe.experts=4", "model.layers=2", "precision.fp8_history=3")
    whole = [row.loss for row in job(tmp_path / "whole", *words, "train.steps=4")]
    parted = [row.loss for row in job(tmp_path / "parted", *words, "train.steps=2")]
    again = job(tmp_path / "parted", *words, "train.steps=4")
    kept = [p for name, p in again.stages[0].named_parameters() if "experts.amax_history" in name]
    assert len(kept) == 2 and all((p[..., :2] > 0).all() and not p[..., 2].any() for p in kept)
    assert parted + [row.loss for row in again] == whole


def test_histories_of_experts_are_kept_by_the_ranks_that_have_them(tmp_path: Path) -> None:
    """Goes on with two ranks as if never stopped, bit for bit, and with one as two would."""
    words = ["precision=fp64", "precision.fp8=delayed", "model.moe.experts=4", "model.layers=2", "train.micro_batch=2"]
    spread = [*words, "parallel.ep=2"]
    whole = run_ranks(2, course, tmp_path / "whole", [*spread, "train.steps=4"])[0]
    first = run_ranks(2, course, tmp_path / "parted", [*spread, "train.steps=2"])[0]
    shutil.copytree(tmp_path / "parted", tmp_path / "one")
    assert first + run_ranks(2, course, tmp_path / "parted", [*spread, "train.steps=4"])[0] == whole
    assert first + course(tmp_path / "one", [*words, "train.steps=4"]) == pytest.approx(whole, rel=1e-9)


def course(folder: Path, words: list[str]) -> list[float]:
    return [number for row in job(folder, *words) for number in (row.loss, row.grad_norm)]


def test_microbatches_that_meet_are_those_of_the_mesh() -> None:
    def of(rank: int, ep: int = 1, etp: int = 1, **sizes: int) -> Sources:
        return Sources.of(Mesh({"pp": 1, "dp": 1, "cp": 1, "tp": 1} | sizes, rank, ep=ep, etp=etp))

    assert of(1, dp=2) == Sources((1,), 0, False)
    assert of(1, dp=2, ep=2) == Sources((0, 1), 1, False)
    assert of(1, tp=2) == Sources((0,), 0, True)
    assert of(1, tp=2, etp=2) == Sources((0,), 0, False)
    assert of(5, dp=2, cp=2, tp=2, ep=2, etp=2) == Sources((1,), 0, False)
    assert of(3, dp=3, tp=2, ep=3) == Sources((1, 2), 0, True)


def test_experts_learn_nearly_as_in_float32(tmp_path: Path) -> None:
    words = ("train.steps=8", "optim.lr=3e-3", "optim.warmup_steps=0", "model.layers=2", "model.moe.experts=4")
    plain = [row.loss for row in job(tmp_path / "none", *words)]
    assert plain[-1] < plain[0] - 0.5
    for recipe, sent in (("delayed", False), ("blockwise", True)):
        fp8 = (f"precision.fp8={recipe}", f"precision.fp8_dispatch={str(sent).lower()}")
        losses = [row.loss for row in job(tmp_path / recipe, *words, *fp8)]
        assert losses != plain and losses[-1] == pytest.approx(plain[-1], rel=0.01), recipe
