"""FP8 from the formats' own definition: every code's value by hand, rounding by search, scales by exponent."""

import functools
import math

import megalite_kernels as kernels
import pytest
import torch
from megalite_kernels.dispatch import Machine, Request, backends_of, decide
from megalite_kernels.reference.fp8 import BLOCKS, mx_scale, round_fp8
from torch import Tensor

from tests.kernels.support import random

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
BACKENDS = ["reference", "native"]
LAYOUT = {E4M3: (4, 3, 7), E5M2: (5, 2, 15)}
"""Bits of exponent and mantissa, and the exponent's bias (OCP 8-bit floating point specification 1.0, table 1)."""


def value(code: int, dtype: torch.dtype) -> float:
    """What a code means, by the specification."""
    exponent_bits, mantissa_bits, bias = LAYOUT[dtype]
    sign = -1.0 if code >> 7 else 1.0
    exponent, mantissa = (code & 0x7F) >> mantissa_bits, code & ((1 << mantissa_bits) - 1)
    top = (1 << exponent_bits) - 1
    if dtype == E5M2 and exponent == top:
        return math.nan if mantissa else sign * math.inf
    if dtype == E4M3 and exponent == top and mantissa == 7:
        return math.nan
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias - mantissa_bits)
    return sign * (1 + mantissa / (1 << mantissa_bits)) * 2.0 ** (exponent - bias)


@functools.cache
def ascending(dtype: torch.dtype) -> Tensor:
    values = torch.tensor([value(code, dtype) for code in range(128)], dtype=torch.float64)
    return values[values.isfinite()]


def by_search(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes of the finite values nearest to float32 x, of two as near the one with an even code; NaN is 0x7f."""
    positive = ascending(dtype)
    size = x.double().abs().nan_to_num(posinf=1e300)
    above = torch.searchsorted(positive, size).clamp(max=len(positive) - 1)
    below = (above - 1).clamp(min=0)
    up, down = positive[above] - size, size - positive[below]
    nearest = torch.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    nearest = torch.where(size >= positive[-1], len(positive) - 1, nearest)
    codes = nearest | torch.where(x.signbit(), 0x80, 0)
    return torch.where(x.isnan(), 0x7F, codes).to(torch.uint8)


def hostile(dtype: torch.dtype) -> Tensor:
    """Every code's value, every tie and its neighbours, subnormals, what is too large, infinities and NaN."""
    values = torch.tensor([value(code, dtype) for code in range(128)], dtype=torch.float32)
    values = values[values.isfinite()]
    ties = (values[1:] + values[:-1]) / 2
    large = values[-1] * torch.tensor([1.0, 1.0001, 1.05, 1.2, 2.0, 1e30])
    odd = torch.tensor([0.0, 1e-45, 1e-40, 1.1754944e-38, 3.4028235e38, math.inf, math.nan])
    around = [values, ties, large, odd]
    around += [t.nextafter(torch.tensor(to)) for t in (values, ties) for to in (0.0, 1e38)]
    both = torch.cat(around)
    return torch.cat([both, -both])


@pytest.mark.parametrize("dtype", LAYOUT, ids=str)
def test_every_code_means_what_the_format_says(dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    ours = kernels.dequantize_fp8(codes.view(dtype)[None], torch.ones(1, 1), recipe="tensorwise", dtype=torch.float64)
    truth = torch.tensor([[value(code, dtype) for code in range(256)]], dtype=torch.float64)
    torch.testing.assert_close(ours, truth, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(ours[:, [0, 128]].signbit(), torch.tensor([[False, True]]))


@pytest.mark.parametrize("dtype", LAYOUT, ids=str)
def test_rounding_is_to_nearest_even_and_saturates(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(1_000_000, generator=generator) * torch.exp(4 * torch.randn(1_000_000, generator=generator))
    for x in (hostile(dtype), spread):
        assert torch.equal(round_fp8(x, dtype).view(torch.uint8), by_search(x, dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", LAYOUT, ids=str)
def test_the_quantiser_rounds_the_same(dtype: torch.dtype, backend: str) -> None:
    """With a given scale of a power of two, so that only the rounding is left."""
    x = hostile(dtype)[None]
    codes, _ = kernels.quantize_fp8(x, recipe="tensorwise", dtype=dtype, scale=torch.ones(1, 1), backend=backend)
    assert torch.equal(codes.view(torch.uint8), by_search(x, dtype))


def test_mx_scales_are_the_exponent_of_amax() -> None:
    """2^(⌊log₂ amax⌋ - 8) for e4m3, - 15 for e5m2, at least 2⁻¹²⁷ (OCP microscaling formats 1.0, section 6.3)."""
    generator = torch.Generator().manual_seed(1)
    spread = torch.rand(4096, generator=generator) * 2.0 ** torch.randint(-149, 128, (4096,), generator=generator)
    ends = torch.tensor([0.0, 3.4028235e38, 1.1754944e-38])
    amax = torch.cat([spread, 2.0 ** torch.arange(-149, 128).float(), ends])
    for dtype, largest in ((E4M3, 8), (E5M2, 15)):
        expected = [max((math.frexp(a)[1] - 1 if a else -200) - largest, -127) + 127 for a in amax.tolist()]
        assert mx_scale(amax, dtype=dtype).view(torch.uint8).tolist() == expected
    broken = mx_scale(torch.tensor([math.inf, math.nan]), dtype=E4M3)
    assert broken.view(torch.uint8).tolist() == [255, 255] and broken.float().isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", LAYOUT, ids=str)
@pytest.mark.parametrize("recipe", BLOCKS)
def test_blocks_by_hand(recipe: str, dtype: torch.dtype, backend: str) -> None:
    """Each block cut out by a loop and rounded by search."""
    x = (random(130, 140) * torch.exp(4 * random(130, 140, seed=1))).float()
    codes, scales = kernels.quantize_fp8(x, recipe=recipe, dtype=dtype, backend=backend)
    largest = value(0x7B if dtype == E5M2 else 0x7E, dtype)
    rows, columns = (size or 140 for size in BLOCKS[recipe])
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = x[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
            amax = block.abs().max()
            if recipe == "mxfp8":
                scale = torch.tensor(2.0 ** (math.frexp(amax.item())[1] - 1 - (15 if dtype == E5M2 else 8)))
            else:
                scale = (amax / largest).clamp(min=2.0**-126)
            assert scales[i, j].float() == scale
            found = codes[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
            assert torch.equal(found.view(torch.uint8), by_search(block * (1 / scale), dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("recipe", BLOCKS)
def test_a_block_with_inf_or_nan_is_nan_and_no_other_is(recipe: str, backend: str) -> None:
    x = random(256, 256).float()
    x[3, 5], x[200, 250] = math.inf, math.nan
    wide = kernels.dequantize_fp8(*kernels.quantize_fp8(x, recipe=recipe, backend=backend), recipe=recipe)
    rows, columns = (size or 256 for size in BLOCKS[recipe])
    touched = torch.zeros(256, 256, dtype=torch.bool)
    for i, j in ((3, 5), (200, 250)):
        touched[i // rows * rows : (i // rows + 1) * rows, j // columns * columns : (j // columns + 1) * columns] = True
    assert torch.equal(wide.isnan(), touched)


def test_zeros_and_tiny_numbers_come_back() -> None:
    for recipe in BLOCKS:
        for x in (torch.zeros(4, 8), torch.full((4, 8), 1e-42), torch.full((4, 8), -1e-38)):
            wide = kernels.dequantize_fp8(*kernels.quantize_fp8(x, recipe=recipe), recipe=recipe)
            assert ((wide - x).abs() <= (x.abs() / 16).clamp(min=2.0**-136)).all()


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", LAYOUT, ids=str)
def test_the_c_kernels_are_the_reference_bit_for_bit(dtype: torch.dtype, x_dtype: torch.dtype) -> None:
    """Ragged shapes, numbers of all sizes, inf and NaN; both ways round; widened and multiplied."""

    def bits(x: Tensor) -> Tensor:  # NaN is one, whatever its bits
        return x.view(torch.uint8) if x.element_size() == 1 else x.nan_to_num(nan=-1.0)

    for seed, shape in enumerate([(1, 1), (3, 5), (130, 257), (200, 33)]):
        x = (random(*shape, seed=seed) * torch.exp(20 * random(*shape, seed=seed + 9))).to(x_dtype)
        x[random(*shape, seed=seed + 20) > 3] = math.inf if seed % 2 else math.nan
        for recipe in BLOCKS:
            options = {"recipe": recipe, "dtype": dtype, "transpose_too": True, "power_of_two": seed > 1}
            ours, theirs = (kernels.quantize_fp8(x, **options, backend=backend) for backend in ("native", "reference"))
            assert all(torch.equal(bits(a), bits(b)) for a, b in zip(ours, theirs, strict=True))
            amax = [kernels.fp8_amax(x, recipe=recipe, backend=backend) for backend in ("native", "reference")]
            assert torch.equal(*map(bits, amax))
            both = {"recipe_a": recipe, "recipe_b": recipe, "out_dtype": torch.float32}
            product = [
                kernels.scaled_mm(*ours[:2], *ours[:2], **both, backend=name) for name in ("native", "reference")
            ]
            assert torch.equal(*map(bits, product))


def test_products_of_rows_and_tensors_are_what_pytorch_says() -> None:
    x, w = random(20, 48).float(), random(24, 48, seed=1).float()
    for recipe in ("tensorwise", "rowwise"):
        recipes = {"recipe_a": recipe, "recipe_b": recipe}
        operands = *kernels.quantize_fp8(x, recipe=recipe), *kernels.quantize_fp8(w, recipe=recipe)
        for out in (torch.float32, torch.bfloat16):
            ours = kernels.scaled_mm(*operands, **recipes, out_dtype=out)
            theirs = kernels.scaled_mm(*operands, **recipes, out_dtype=out, backend="torch")
            torch.testing.assert_close(ours, theirs)


def test_what_does_not_belong_together_is_refused() -> None:
    x, codes = torch.ones(4, 8), torch.ones(4, 8).to(E4M3)
    one, rows = torch.ones(1, 1), torch.ones(4, 1)
    quantize, both = kernels.quantize_fp8, {"recipe_a": "tensorwise", "recipe_b": "tensorwise"}
    rowwise, blocks = {"recipe_a": "rowwise", "recipe_b": "tensorwise"}, {**both, "recipe_b": "blockwise_128x128"}
    for call, said in (
        (lambda: quantize(x, recipe="columnwise"), "no recipe 'columnwise'; there are tensorwise"),
        (lambda: quantize(x[0], recipe="rowwise"), "needs a matrix"),
        (lambda: quantize(x, recipe="rowwise", dtype=torch.int8), "codes are float8_e4m3fn or"),
        (lambda: quantize(x, recipe="rowwise", scale=one), "rowwise takes a scale of"),
        (lambda: quantize(x, recipe="rowwise", scale=rows, transpose_too=True), "says nothing of the transpose"),
        (lambda: quantize(x.double(), recipe="rowwise", backend="triton"), "not float64"),
        (lambda: kernels.scaled_mm(x, one, codes, one, **both), "takes FP8 codes"),
        (lambda: kernels.scaled_mm(codes, one, codes, one, **rowwise), "takes FP8 codes"),
        (lambda: kernels.scaled_mm(codes, one, codes[:, :4], one, **both), "b .N, K"),
        (lambda: kernels.scaled_mm(codes, one, codes, one, **blocks, backend="torch"), "scales of tensors and of rows"),
    ):
        with pytest.raises(ValueError, match=said):
            call()


@pytest.mark.parametrize(
    ("chip", "recipe", "aligned", "out", "chosen", "why"),
    [
        ("sm_90", "tensorwise", True, torch.float32, "torch", ""),
        ("sm_90", "rowwise", True, torch.bfloat16, "torch", ""),
        ("sm_90", "rowwise", True, torch.float32, "triton", "scaled rows in bf16 alone"),
        ("sm_100", "tensorwise", False, torch.bfloat16, "triton", "multiples of 16"),
        ("sm_100", "blockwise_1x128", True, torch.bfloat16, "triton", "scales of tensors and of rows"),
        ("sm_80", "rowwise", True, torch.bfloat16, "triton", "no OCP FP8 products on sm_80"),
        ("gfx942", "rowwise", True, torch.bfloat16, "triton", "no OCP FP8 products on gfx942"),
        ("", "tensorwise", True, torch.float32, "native", "no faster"),
        ("", "tensorwise", True, torch.float64, "reference", "not float64"),
    ],
)
def test_who_multiplies(chip: str, recipe: str, aligned: bool, out: torch.dtype, chosen: str, why: str) -> None:
    machine = Machine((("triton", "3.7.1"),), None)
    features = (("recipes", (recipe, recipe)), ("aligned", aligned), ("e5m2", False), ("empty", False))
    request = Request("scaled_mm", "cuda" if chip else "cpu", chip, out, features)
    decision = decide(backends_of("scaled_mm"), request, machine)
    assert decision.backend == chosen and why in str(decision)
