"""Linear layers in FP8: each product beside one written from the formats' definitions, and within the error they allow
of float64; delayed scales; which modules are in it."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from megalite import Trainer, load_config
from megalite.comm import Communicator
from megalite.errors import UserError
from megalite.mesh import Mesh
from megalite.model.linear import Linear
from megalite.parallel.fp8 import KINDS, USUAL_BACKWARD, Factor, Fp8, History, Kind, Recipe
from megalite.train.header import header
from tests.tiny_job import tiny_job

ALONE = Communicator(Mesh({"pp": 1, "dp": 1, "cp": 1, "tp": 1}))
M, N, K = 150, 136, 200
"""Tokens, outputs, inputs; no multiples of a block."""
BITS = {"e4m3": 3, "e5m2": 2}
LARGEST = {"e4m3": 448.0, "e5m2": 57344.0}
SMALLEST = {"e4m3": 2.0**-9, "e5m2": 2.0**-16}
"""Bits behind the point, the largest number, the smallest above zero (OCP FP8 1.0)."""


def rounded(x: np.ndarray, form: str) -> np.ndarray:
    """To the nearest number of a format, ties to even, saturating."""
    x = np.clip(x.astype(np.float64), -LARGEST[form], LARGEST[form])
    exponent = np.floor(np.log2(np.maximum(np.abs(x), 1e-300)))
    step = np.maximum(2.0 ** (exponent - BITS[form]), SMALLEST[form])
    return np.round(x / step) * step


def quantized(x: np.ndarray, rows: int, columns: int, form: str, power: bool) -> np.ndarray:
    """x as the codes and scales of its blocks mean it; 0: a block is all rows, or all columns."""
    y = np.zeros(x.shape)
    rows, columns = rows or x.shape[0], columns or x.shape[1]
    for i in range(0, x.shape[0], rows):
        for j in range(0, x.shape[1], columns):
            block = x[i : i + rows, j : j + columns]
            amax = np.abs(block).max()
            if amax == 0:
                continue
            if power:
                scale = 2.0 ** (np.floor(np.log2(amax)) - np.floor(np.log2(LARGEST[form])))
            else:
                scale = np.float32(amax) / np.float32(LARGEST[form])
            scaled = block.astype(np.float32) * (np.float32(1.0) / np.float32(scale))
            y[i : i + rows, j : j + columns] = rounded(scaled, form) * np.float64(np.float32(scale))
    return y


SHAPES = {"tensorwise": (0, 0), "rowwise": (1, 0), "delayed": (0, 0), "mxfp8": (1, 32), "blockwise": (1, 128)}


def expected(recipe: str, form: str, x: np.ndarray, w: np.ndarray, dy: np.ndarray) -> list[np.ndarray]:
    """y, dx and dw in float64 of what is quantised along the dim that each product sums over."""

    def factor(values: np.ndarray, kind: str, of: str = "e4m3") -> np.ndarray:
        shape = (128, 128) if (recipe, kind) == ("blockwise", "weight") else SHAPES[recipe]
        return quantized(values, *shape, of, recipe == "mxfp8")

    y = factor(x, "input") @ factor(w, "weight").T
    dx = factor(dy, "gradient", form) @ factor(w.T, "weight").T
    dw = factor(dy.T, "gradient", form) @ factor(x.T, "input").T
    return [y, dx, dw]


def heavy_tailed(*shape: int, seed: int) -> Tensor:
    """As activations are: a few columns are a hundred times as large."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    return x * torch.exp(1.5 * torch.randn(shape[-1], generator=generator))


def factors() -> tuple[Tensor, Tensor, Tensor]:
    return heavy_tailed(M, K, seed=0), 0.02 * heavy_tailed(N, K, seed=1), 1e-5 * heavy_tailed(M, N, seed=2)


def products(recipe: str, form: str, x: Tensor, w: Tensor, dy: Tensor, dtype: torch.dtype) -> list[np.ndarray]:
    fp8 = Fp8(Recipe(recipe, form), ALONE, "outputs", sp=False)
    x, weight = x.to(dtype).clone().requires_grad_(), nn.Parameter(w.to(dtype))
    y = fp8.linear(x.view(2, M // 2, K), weight, None, None)
    y.backward(dy.to(dtype).view(2, M // 2, N))
    assert x.grad is not None and weight.grad is not None
    return [t.detach().double().numpy() for t in (y.view(M, N), x.grad.view(M, K), weight.grad)]


CASES = [(recipe, USUAL_BACKWARD[recipe]) for recipe in USUAL_BACKWARD] + [("rowwise", "e5m2"), ("tensorwise", "e4m3")]


@pytest.mark.parametrize(("recipe", "form"), CASES)
def test_products_are_those_the_recipe_defines(recipe: str, form: str) -> None:
    found = products(recipe, form, *factors(), torch.float64)
    for mine, theirs in zip(found, expected(recipe, form, *(t.numpy() for t in factors())), strict=True):
        assert np.linalg.norm(mine - theirs) <= 1e-12 * np.linalg.norm(theirs)


@pytest.mark.parametrize(("recipe", "form"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors_are_within_what_the_formats_allow(recipe: str, form: str, dtype: torch.dtype) -> None:
    """|a·b - exact| ≤ Σ (ε_a + ε_b + ε_a ε_b)|a||b| + what underflows: half a step of the smallest numbers, or, with a
    power of two as scale, what saturates: 448 of up to 512, an eighth."""
    x, w, dy = (t.to(dtype).float() for t in factors())
    relative = {f: 2.0 ** -(BITS[f] + 1) if recipe != "mxfp8" else 0.125 for f in BITS}
    pairs = [(x, w, "e4m3"), (dy, w.t(), form), (dy.t(), x.t(), form)]
    for mine, (a, b, of) in zip(products(recipe, form, x, w, dy, dtype), pairs, strict=True):
        a, b = a.double(), b.double()
        full = {f: LARGEST[f] / 1.75 if recipe == "mxfp8" else LARGEST[f] for f in BITS}
        floor = [t.abs().max() / full[f] * SMALLEST[f] / 2 for t, f in ((a, of), (b, "e4m3"))]
        da, db = relative[of] * a.abs() + floor[0], relative["e4m3"] * b.abs() + floor[1]
        bound = da @ b.abs().t() + a.abs() @ db.t() + da @ db.t()
        bound = bound * (1 + 1e-4) + torch.finfo(dtype).eps * (a.abs() @ b.abs().t())
        assert (torch.from_numpy(mine) - a @ b.t()).abs().le(bound).all()


@pytest.mark.parametrize("recipe", USUAL_BACKWARD)
def test_a_power_of_two_changes_no_bit(recipe: str) -> None:
    x, w, dy = factors()
    plain = products(recipe, "e4m3", x, w, dy, torch.float32)
    scaled = products(recipe, "e4m3", x * 2.0**9, w * 2.0**-5, dy * 2.0**7, torch.float32)
    for one, other, power in zip(plain, scaled, (4, 2, 16), strict=True):
        assert np.array_equal(one * 2.0**power, other)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("recipe", USUAL_BACKWARD)
def test_what_is_no_number_is_not_hidden(recipe: str, value: float) -> None:
    x, w, dy = factors()
    x[3, 5] = value
    y, _, dw = products(recipe, "e4m3", x, w, dy, torch.float32)
    assert np.isnan(y[3]).all() and np.isnan(dw[:, 5]).all()


def history(values: list[list[float]]) -> History:
    made = History()
    made.values = nn.Parameter(torch.tensor(values), requires_grad=False)
    return made


def test_a_history_scales_by_the_steps_before() -> None:
    kept = history([[4.0, 8.0, 2.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    kept.note("input", torch.tensor(99.0))  # outside of a step
    known = kept.begin().tolist()
    assert kept.amax is not None
    assert (kept.amax.tolist(), known) == ([8.0, 0.0, 1.0], [True, False, True])
    for kind, amaxes in zip(KINDS, ([1.0, 3.0], [0.5, 0.25], [7.0, torch.nan]), strict=True):
        for amax in amaxes:
            kept.note(kind, torch.tensor([[amax]]))
    kept.extend(kept.seen)
    assert kept.values is not None
    assert kept.values.tolist() == [[3.0, 4.0, 8.0], [0.5, 0.0, 0.0], [1.0, 0.0, 0.0]]
    kept.rescale(0.5)
    assert kept.values.tolist() == [[3.0, 4.0, 8.0], [0.5, 0.0, 0.0], [0.5, 0.0, 0.0]], "of gradients alone"


def test_what_exceeds_the_history_saturates() -> None:
    fp8 = Fp8(Recipe("delayed", "e5m2"), ALONE, None, sp=False)
    fp8.history = history([[1.0], [1.0], [1.0]])
    fp8.history.complete = fp8.history.begin().tolist()
    x = torch.tensor([[0.5, 1.0, 4.0]])
    codes, scales, _ = fp8.quantized("input", x, "MK")
    assert (codes.float() * scales).tolist() == [[0.5, 1.0, 1.0]]
    assert fp8.history.seen.tolist() == [4.0, 0.0, 0.0]


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_a_history_does_not_hide_what_is_no_number(value: float) -> None:
    """A step with one is skipped because its gradients' norm says so; cut off at a scale from before it would not."""
    fp8 = Fp8(Recipe("delayed", "e5m2"), ALONE, None, sp=False)
    fp8.history = history([[1.0], [1.0], [1.0]])
    fp8.history.complete = fp8.history.begin().tolist()
    for kind in KINDS:
        codes, scales, _ = fp8.quantized(kind, torch.tensor([[0.5, value, 4.0]]), "MK")
        assert (codes.float() * scales).isnan().all(), kind
    assert fp8.gather(torch.tensor([value])).isinf().all()


def job(folder: Path, *words: str) -> Trainer:
    usual = ("optim.schedule=constant", "train.dry_run=false", "model.layers=4", f"run.dir={folder}")
    return Trainer(load_config(*tiny_job("precision=fp32", *usual, *words)), callbacks=[])


def test_the_chosen_layers_are_in_it_and_the_header_says_so(tmp_path: Path) -> None:
    words = ("precision.fp8=delayed", "precision.fp8_skip=[1,2]", "model.mtp=1")
    words = (*words, "model.moe.experts=2", "model.moe.shared_ffn=16", "precision.fp8_dispatch=true")
    trainer = job(tmp_path, *words)
    chosen = {name for name, m in trainer.stages[0].named_modules() if isinstance(m, Linear) and m.fp8 is not None}
    attention = {f"blocks.1.attention.{name}" for name in ("query", "key", "value", "output")}
    assert chosen == attention | {f"blocks.1.mlp.shared.{name}" for name in ("gate", "up", "down")}
    said = header(trainer.facts)
    assert "fp8 delayed: linears and experts of layer 1; e4m3, gradients e5m2; a scale a tensor" in said
    assert "fp32: layer 0, layers 2 to 3, embedding, norms" in said
    assert "multi-token modules; fp32 or wider: router" in said
    assert "fp8 dispatch: tokens to experts" in said
    assert "exact emulation" in said


def test_histories_are_kept_and_refused_by_those_without(tmp_path: Path) -> None:
    delayed = "precision.fp8=delayed"
    whole = [row.loss for row in job(tmp_path / "whole", delayed, "train.steps=4")]
    parted = [row.loss for steps in (2, 4) for row in job(tmp_path / "parted", delayed, f"train.steps={steps}")]
    assert parted == whole
    for words, line in (
        (("precision.fp8=rowwise",), "precision.fp8: rowwise, but .* keeps the state of delayed"),
        ((delayed, "precision.fp8_history=4"), "precision.fp8_history: 4, but .* keeps the histories of 16"),
        (
            (delayed, "precision.fp8_skip=[0,1]"),
            r"precision.fp8_skip: \[0, 1\], but .* keeps the histories of \[0, 0\]",
        ),
    ):
        with pytest.raises(UserError, match=line):
            job(tmp_path / "whole", *words, "train.steps=5")


def test_every_recipe_learns_nearly_as_float32(tmp_path: Path) -> None:
    words = ("train.steps=8", "optim.lr=3e-3", "optim.warmup_steps=0", "model.layers=2")
    plain = [row.loss for row in job(tmp_path / "none", *words)]
    assert plain[-1] < plain[0] - 0.5
    for recipe in USUAL_BACKWARD:
        losses = [row.loss for row in job(tmp_path / recipe, *words, f"precision.fp8={recipe}")]
        assert losses != plain and losses[-1] == pytest.approx(plain[-1], rel=0.01), recipe


def test_a_skipped_step_leaves_histories_as_they_were_but_for_the_loss_scale(tmp_path: Path) -> None:
    """What is large, and finite, on its way to an inf would silence later steps; gradients come smaller from now on."""
    words = ("precision=fp16", "precision.fp8=delayed", "precision.loss_scale_hysteresis=1", "train.steps=4")
    trainer = job(tmp_path, *words, f"precision.loss_scale={2**8}")
    histories = [values for name, values in trainer.stages[0].named_parameters() if "amax_history" in name]
    trainer.train_step()
    before = [values.clone() for values in histories]
    norm = trainer.gradients.global_norm
    trainer.gradients.global_norm = lambda: torch.tensor(torch.inf)  # type: ignore[method-assign]
    assert trainer.train_step().skipped and trainer.loss_scale.value == 2**7
    units = torch.tensor([[1.0], [1.0], [0.5]])
    assert histories and all(torch.equal(now, then * units) for now, then in zip(histories, before, strict=True))
    trainer.gradients.global_norm = norm  # type: ignore[method-assign]
    trainer.train_step()
    assert all(now.count_nonzero() == 2 * len(KINDS) for now in histories)


@pytest.mark.parametrize(("before", "after"), [("fp16", "bf16"), ("bf16", "fp16")])
def test_histories_follow_a_loss_scale_that_comes_or_goes(tmp_path: Path, before: str, after: str) -> None:
    """A run goes on in another precision; gradients that a wrong scale cuts off would be far smaller."""
    words = ("precision.fp8=delayed", "precision.fp8_backward=e4m3", "train.steps=2")
    list(job(tmp_path / "changed", *words, f"precision={before}"))
    shutil.copytree(tmp_path / "changed", tmp_path / "same")
    further = (*words, "train.steps=4")
    (same, _), (changed, _) = (
        [row.grad_norm for row in job(tmp_path / name, *further, f"precision={precision}")]
        for name, precision in (("same", before), ("changed", after))
    )
    assert changed == pytest.approx(same, rel=0.01)


def test_an_evaluation_takes_the_scales_that_its_checkpoint_holds(tmp_path: Path) -> None:
    words = ("precision.fp8=delayed", "train.steps=3", "train.final_eval=true", "model.layers=2")
    *_, last = job(tmp_path, *words)
    (found,) = job(tmp_path, *words).evaluate()
    assert last.val_loss == found.loss


def test_a_step_of_the_trainer_makes_a_weights_factors_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its microbatches."""
    made: list[int] = []
    original = Fp8._quantized

    def counted(self: Fp8, kind: Kind, values: Tensor, dims: str) -> Factor:
        if kind == "weight":
            made.append(id(self))
        return original(self, kind, values, dims)

    trainer = job(tmp_path, "precision.fp8=blockwise", "train.micro_batch=2")
    monkeypatch.setattr(Fp8, "_quantized", counted)
    trainer.train_step()
    assert trainer.facts["accumulation"] > 1 and len(made) == len(set(made)) == 4 * 7
