"""Laws of rotary positions, whatever the backend: a rotation, its inverse, positions, and pairs either way."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megalite_kernels import apply_rope, reference
from megalite_kernels.dispatch import choose
from torch import Tensor

pytest.importorskip("triton", reason="Triton is for Linux")
from megalite_kernels.gpu.rope import config, rotate

from tests.kernels.support import random

BACKENDS = ("triton", "native", "reference")
SIZES = {
    "heads": st.integers(1, 5),
    "pairs": st.integers(1, 9),
    "passed": st.integers(0, 5),
    "seed": st.integers(0, 99),
}
few = settings(max_examples=15, deadline=None, derandomize=True)


def angles(length: int, pairs: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """cos and sin [length, 2 · pairs] of one angle a pair."""
    angle = random(length, pairs, seed=seed, scale=3.0).repeat(1, 2)
    return angle.cos().float(), angle.sin().float()


def halves(x: Tensor, rotated: int) -> Tensor:
    """The dims of interleaved pairs where half rotation looks for them."""
    return torch.cat((x[..., :rotated:2], x[..., 1:rotated:2], x[..., rotated:]), dim=-1)


@pytest.mark.law("rope")
@pytest.mark.parametrize("interleaved", [False, True])
@few
@given(**SIZES)
def test_a_rotation_keeps_norms_and_has_an_inverse(
    interleaved: bool, heads: int, pairs: int, passed: int, seed: int
) -> None:
    x = random(2, 3, heads, 2 * pairs + passed, seed=seed).float()
    cos, sin = angles(3, pairs, seed)
    y = apply_rope(x, cos, sin, interleaved=interleaved, backend="triton")
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(apply_rope(y, cos, -sin, interleaved=interleaved, backend="triton"), x)
    assert torch.equal(y[..., 2 * pairs :], x[..., 2 * pairs :])


@pytest.mark.law("rope")
@few
@given(**SIZES)
def test_interleaved_is_half_on_permuted_dims(heads: int, pairs: int, passed: int, seed: int) -> None:
    x = random(1, 4, heads, 2 * pairs + passed, seed=seed).float()
    tables = random(2, 4, 2 * pairs, seed=seed + 1).float()
    y = apply_rope(x, *tables, interleaved=True, backend="triton")
    assert torch.equal(halves(y, 2 * pairs), apply_rope(halves(x, 2 * pairs), *tables, backend="triton"))


@pytest.mark.law("rope")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batched", [False, True])
def test_positions_are_rows_of_the_tables(backend: str, batched: bool) -> None:
    x, tables = random(2, 5, 3, 8).float(), random(2, 20, 6, seed=1).float()
    positions = torch.randint(0, 20, (2, 5) if batched else (5,), generator=torch.Generator().manual_seed(0))
    y = apply_rope(x, *tables, positions=positions, backend=backend)
    assert torch.equal(y, apply_rope(x, *(table[positions] for table in tables), backend=backend))


@pytest.mark.law("rope")
@pytest.mark.parametrize("backend", BACKENDS)
def test_relative_positions_alone_decide(backend: str) -> None:
    """Products of turned queries and keys depend on the distance of their positions."""
    q, k = (random(1, 1, 1, 16, seed=seed).float() for seed in (1, 2))
    angle = torch.outer(torch.arange(40.0), 0.5 ** torch.arange(8.0)).repeat(1, 2)

    def at(x: Tensor, position: int) -> Tensor:
        return apply_rope(x, angle.cos(), angle.sin(), positions=torch.tensor([position]), backend=backend)

    products = [(at(q, 7 + shift) * at(k, 2 + shift)).sum() for shift in (0, 5, 30)]
    torch.testing.assert_close(products[0], products[1])
    torch.testing.assert_close(products[0], products[2])


def test_interleaved_pairs_are_complex_numbers() -> None:
    """As the original LLaMA code turns them: (x₀ + i·x₁) · e^(i·angle)."""
    x, angle = random(2, 5, 3, 8), random(5, 4, seed=1)
    numbers = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    turned = torch.view_as_real(numbers * torch.polar(torch.ones_like(angle), angle)[:, None]).flatten(-2)
    tables = angle.repeat(1, 2)
    for op, exact in ((reference.apply_rope, 1e-12), (lambda *a, **k: apply_rope(*a, **k, backend="triton"), 1e-6)):
        y = op(x if exact < 1e-9 else x.float(), tables.cos(), tables.sin(), interleaved=True)
        torch.testing.assert_close(y.double(), turned, rtol=exact, atol=exact)


def test_halves_as_transformers_turns_them() -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    x, (cos, sin) = random(2, 5, 3, 8).float(), angles(5, 4)
    theirs, _ = llama.apply_rotary_pos_emb(x.transpose(1, 2), x.transpose(1, 2), cos[None], sin[None])
    for backend in BACKENDS:
        torch.testing.assert_close(apply_rope(x, cos, sin, backend=backend), theirs.transpose(1, 2))


@pytest.mark.law("rope")
def test_reruns_give_the_same_bits() -> None:
    x, (cos, sin) = random(2, 33, 3, 20).float(), angles(33, 8)
    first, again = (apply_rope(x, cos, sin, interleaved=True, backend="triton") for _ in range(2))
    assert torch.equal(first, again)


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradcheck_of_the_reference(interleaved: bool) -> None:
    x, cos, sin = (random(*s, seed=i).requires_grad_() for i, s in enumerate([(1, 3, 2, 6), (5, 4), (5, 4)]))
    positions = torch.tensor([4, 0, 4])
    assert torch.autograd.gradcheck(
        lambda *a: reference.apply_rope(*a, interleaved=interleaved, positions=positions), (x, cos, sin)
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wrong", [-1, 5])
def test_positions_outside_the_table_are_refused(backend: str, wrong: int) -> None:
    x, (cos, sin) = random(1, 2, 1, 4).float(), angles(5, 2)
    with pytest.raises(ValueError, match=rf"position {wrong} is outside the table's 0 … 4"):
        apply_rope(x, cos, sin, positions=torch.tensor([0, wrong]), backend=backend)


def test_where_positions_are_not_read_they_make_nan() -> None:
    """What a GPU does, whose values nobody looks at: no access outside the table, and no silent number."""
    x, (cos, sin) = random(1, 3, 2, 6).float(), angles(5, 2)
    y = rotate(x, cos, sin, torch.tensor([[-1, 2, 5]]), False, False)
    assert bool(y[0, [0, 2], :, :4].isnan().all()) and bool(y[0, 1].isfinite().all())
    assert torch.equal(y[..., 4:], x[..., 4:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_misfits_are_refused(backend: str) -> None:
    x, (cos, sin) = random(1, 3, 2, 8).float(), angles(3, 4)
    odd, wide = (cos[:, :5], sin[:, :5]), (cos.repeat(1, 2), sin.repeat(1, 2))
    for tables in ((cos[:2], sin[:2]), odd, wide, (cos, sin[:, :6])):
        with pytest.raises((ValueError, RuntimeError)):
            apply_rope(x, *tables, backend=backend)
    with pytest.raises(ValueError, match="integer positions"):
        apply_rope(x, cos, sin, positions=torch.zeros(3), backend=backend)


def test_tables_get_their_gradient_from_the_reference() -> None:
    x, (cos, sin) = random(1, 3, 2, 8).float(), angles(3, 4)
    cos.requires_grad_()
    apply_rope(x, cos, sin).sum().backward()
    assert cos.grad is not None
    with pytest.raises(ValueError, match="give the tables no gradient"):
        apply_rope(x, cos, sin, backend="triton")


def test_reasons() -> None:
    assert choose("rope", "auto", "cpu", torch.float64) == "reference"
    with pytest.raises(ValueError, match="not interleaved pairs"):
        choose("rope", "native", "cpu", torch.float32, (("interleaved", True),))


@few
@given(heads=st.integers(1, 200), rotated=st.integers(1, 128), passed=st.integers(0, 256))
def test_a_program_has_one_tile(heads: int, rotated: int, passed: int) -> None:
    from megalite_kernels.gpu.chips import CHIPS

    for chip in CHIPS.values():
        tile = config(chip, heads, 2 * rotated, passed)
        assert tile["PAIRS"] >= rotated and tile["REST"] >= passed
        assert tile["TOKENS"] * tile["HEADS"] * max(tile["PAIRS"], tile["REST"]) <= 2048 and tile["num_warps"] <= 8
