"""Laws of the FP8 kernels on random inputs, interpreted: the chips' two ways of rounding, transposes, powers of two."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="Triton is for Linux")
import megalite_kernels as kernels
from megalite_kernels import reference
from megalite_kernels.gpu import quantize, scaled_mm
from megalite_kernels.gpu.chips import CHIPS
from megalite_kernels.reference.fp8 import BLOCKS

from tests.kernels.test_fp8 import E4M3, E5M2, by_search, hostile

FEW = settings(max_examples=12)
recipes = st.sampled_from(list(BLOCKS))
dtypes = st.sampled_from([E4M3, E5M2])
sizes = st.integers(1, 140)


def matrix(m: int, k: int, seed: int, tails: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, k, generator=generator) * torch.exp(tails * torch.randn(m, k, generator=generator))


def same(a: Tensor, b: Tensor) -> bool:
    a, b = a.view(torch.uint8), b.view(torch.uint8)
    return torch.equal(a, b)


@pytest.mark.parametrize("chip", ["sm_80", "sm_90"])
@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
def test_both_ways_of_rounding_are_the_formats(chip: str, dtype: torch.dtype) -> None:
    """By integers and by the chip's own cast: ties, subnormals, infinities, NaN and 2¹⁶ random numbers."""
    for x in (hostile(dtype)[None], matrix(64, 1024, 0, tails=6.0)):
        codes, *_ = quantize.forward(x, "tensorwise", dtype, False, torch.ones(1, 1), False, CHIPS[chip])
        expected, number = by_search(x, dtype), ~x.isnan()
        assert same(codes.view(torch.uint8)[number], expected[number]) and codes.float()[~number].isnan().all()


@pytest.mark.law("quantize_fp8")
@FEW
@given(
    recipes, dtypes, sizes, sizes, st.booleans(), st.booleans(), st.sampled_from(["sm_80", "sm_90"]), st.integers(0, 9)
)
def test_every_chip_gives_the_references_bits(
    recipe: str, dtype: torch.dtype, m: int, k: int, both: bool, power: bool, chip: str, seed: int
) -> None:
    x = matrix(m, k, seed, tails=8.0)
    ours = quantize.forward(x, recipe, dtype, both, None, power, CHIPS[chip])
    theirs = reference.quantize_fp8(x, recipe=recipe, dtype=dtype, transpose_too=both, power_of_two=power)
    assert all(same(a, b) for a, b in zip(ours, theirs, strict=False))


@pytest.mark.law("quantize_fp8")
@FEW
@given(recipes, dtypes, sizes, sizes, st.booleans(), st.integers(0, 9))
def test_half_a_place_of_the_code_is_lost_at_most(
    recipe: str, dtype: torch.dtype, m: int, k: int, power: bool, seed: int
) -> None:
    x = matrix(m, k, seed, tails=4.0)
    codes, scales = kernels.quantize_fp8(x, recipe=recipe, dtype=dtype, power_of_two=power, backend="triton")
    unit = kernels.dequantize_fp8(torch.ones_like(x).to(dtype), scales, recipe=recipe, dtype=torch.float64)
    error = (x - kernels.dequantize_fp8(codes, scales, recipe=recipe, dtype=torch.float64)).abs() / unit
    mantissa, least = (3, -6) if dtype == E4M3 else (2, -14)
    place = torch.exp2(torch.frexp(x / unit)[1].clamp(min=least + 1).double() - 1 - mantissa)
    saturated = (
        codes.float().abs() == torch.finfo(dtype).max
    )  # only MX: its scale may leave amax above the largest code
    if recipe == "mxfp8":
        limit = torch.where(saturated, (x.double() / unit).abs() - torch.finfo(dtype).max, 0.0)
        error = torch.where(saturated & (limit > 0), 0.0, error)
    assert (error <= place / 2 * (1 + 1e-5)).all()


@pytest.mark.law("quantize_fp8")
@FEW
@given(recipes, dtypes, sizes, sizes, st.integers(-20, 20), st.integers(0, 9))
def test_a_power_of_two_moves_only_the_scales(
    recipe: str, dtype: torch.dtype, m: int, k: int, power: int, seed: int
) -> None:
    x = matrix(m, k, seed)
    codes, scales = kernels.quantize_fp8(x, recipe=recipe, dtype=dtype, backend="triton")
    moved, moved_scales = kernels.quantize_fp8(x * 2.0**power, recipe=recipe, dtype=dtype, backend="triton")
    assert same(codes, moved) and torch.equal(moved_scales.float(), scales.float() * 2.0**power)


@pytest.mark.law("quantize_fp8")
@FEW
@given(recipes, dtypes, sizes, sizes, st.booleans(), st.integers(0, 9))
def test_the_transposed_output_is_the_transpose_quantised(
    recipe: str, dtype: torch.dtype, m: int, k: int, strided: bool, seed: int
) -> None:
    x = matrix(k, m, seed, tails=3.0).t() if strided else matrix(m, k, seed, tails=3.0)
    _, _, *both = kernels.quantize_fp8(x, recipe=recipe, dtype=dtype, transpose_too=True, backend="triton")
    alone = kernels.quantize_fp8(x.t().contiguous(), recipe=recipe, dtype=dtype, backend="triton")
    assert all(same(a, b) for a, b in zip(both, alone, strict=True))


@pytest.mark.law("quantize_fp8")
@FEW
@given(recipes, sizes, sizes, st.integers(0, 9))
def test_amax_is_the_largest_and_gives_the_same_scales(recipe: str, m: int, k: int, seed: int) -> None:
    x = matrix(m, k, seed)
    amax = kernels.fp8_amax(x, recipe=recipe, backend="triton")
    assert torch.equal(amax, kernels.fp8_amax(x, recipe=recipe))
    if recipe != "mxfp8":
        codes, scale = kernels.quantize_fp8(x, recipe=recipe, backend="triton")
        given_scale = kernels.fp8_scale(amax, dtype=E4M3)
        again, _ = kernels.quantize_fp8(x, recipe=recipe, scale=given_scale, backend="triton")
        assert torch.equal(scale, given_scale) and same(codes, again)


@pytest.mark.law("scaled_mm")
@FEW
@given(
    st.sampled_from([(a, b) for a in BLOCKS for b in BLOCKS if (a == "mxfp8") == (b == "mxfp8")]),
    dtypes, dtypes, sizes, sizes, st.integers(0, 300) | st.sampled_from([16, 48, 160, 288]),  # for descriptors, 16 | k
    st.sampled_from(["sm_80", "sm_90"]), st.integers(0, 9),
)  # fmt: skip
def test_products_against_float64(
    pair: tuple[str, str], dtype_a: torch.dtype, dtype_b: torch.dtype, m: int, n: int, k: int, chip: str, seed: int
) -> None:
    """The error of a sum of k products is at most k roundings of the sum of their sizes."""
    operands = []
    for recipe, dtype, rows in ((pair[0], dtype_a, m), (pair[1], dtype_b, n)):
        operands += reference.quantize_fp8(matrix(rows, k, seed + rows), recipe=recipe, dtype=dtype)
    given_scales = [x.view(torch.uint8) if x.dtype == torch.float8_e8m0fnu else x for x in operands]
    ours = scaled_mm.forward(*given_scales, *pair, torch.float32, CHIPS[chip])
    a, b = (
        reference.dequantize_fp8(codes, scales, recipe=recipe, dtype=torch.float64)
        for codes, scales, recipe in ((*operands[:2], pair[0]), (*operands[2:], pair[1]))
    )
    assert ((ours - a @ b.t()).abs() <= (k + 3) * 2.0**-24 * (a.abs() @ b.abs().t())).all()


@pytest.mark.law("quantize_fp8", "scaled_mm")
@FEW
@given(recipes, st.integers(0, 9))
def test_reruns_are_the_same_bits(recipe: str, seed: int) -> None:
    x = matrix(70, 130, seed)
    runs = []
    for _ in range(2):
        codes, scales = kernels.quantize_fp8(x, recipe=recipe, backend="triton")
        c = kernels.scaled_mm(codes, scales, codes, scales, recipe_a=recipe, recipe_b=recipe, backend="triton")
        runs.append((codes.view(torch.uint8), c))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_registered_ops_are_sound() -> None:
    x = matrix(20, 40, 0)
    for recipe in BLOCKS:
        for both in (False, True):
            arguments = (x, recipe, E4M3, both, None, False)
            torch.library.opcheck(torch.ops.megalite.triton_quantize_fp8.default, arguments)
    torch.library.opcheck(torch.ops.megalite.triton_fp8_amax.default, (x, "rowwise"))
    codes, scale = reference.quantize_fp8(x, recipe="rowwise")
    product = (codes, scale, codes, scale, "rowwise", "rowwise", torch.bfloat16)
    only = ("test_faketensor", "test_autograd_registration")  # the others compare inputs by sums that FP8 lacks
    torch.library.opcheck(torch.ops.megalite.triton_scaled_mm.default, product, test_utils=only)


@pytest.mark.parametrize(("dtype", "cast"), [(E4M3, "e4m3x2"), (E5M2, "e5m2x2")], ids=str)
def test_hopper_rounds_by_the_instruction_that_is_interpreted(dtype: torch.dtype, cast: str) -> None:
    """One cast, to nearest even and saturating; divisions rounded properly, nothing flushed to zero."""
    import triton
    from megalite_kernels.gpu.compile import signature
    from megalite_kernels.gpu.launch import recording
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    with recording() as launches:
        x = torch.empty((256, 256), dtype=torch.bfloat16, device="meta")
        quantize.forward(x, "blockwise_1x128", dtype, False, None, False, CHIPS["sm_90"])
    types, constants, attributes = signature(launches[0])
    source = ASTSource(fn=launches[0].kernel, signature=types, constexprs=constants, attrs=attributes)
    assembly = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    assert f"cvt.rn.satfinite.{cast}.f32" in assembly and "div.rn.f32" in assembly
    assert "div.full" not in assembly and ".ftz" not in assembly
