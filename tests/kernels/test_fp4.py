"""NVFP4 from the format's definition: every code by hand, rounding by search, chances counted, blocks by a loop."""

import itertools
import math

import pytest
import torch
from megalite_kernels.reference.fp4 import dequantize_nvfp4, hadamard, nvfp4_amax, quantize_nvfp4, round_fp4

from tests.kernels.test_fp8 import E4M3, by_search, value


def meaning(code: int) -> float:
    """E2M1 (OCP microscaling formats 1.0, section 5.3.3): bias 1; exponent 0 is subnormal; no inf, no NaN."""
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    size = mantissa * 0.5 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
    return -size if sign else size


POSITIVE = [meaning(code) for code in range(8)]


def nearest(x: float) -> int:
    """The code nearest to x, of two as near the one with an even mantissa."""
    code = min(range(8), key=lambda n: (abs(min(abs(x), 1e9) - POSITIVE[n]), n % 2))
    return code + 8 * (math.copysign(1.0, x) < 0)


def hostile() -> torch.Tensor:
    ties = [(a + b) / 2 for a, b in itertools.pairwise(POSITIVE)]
    points = torch.tensor([*POSITIVE, *ties, 7.0, 100.0, 1e38, math.inf, 1e-45, 1e-40])
    around = [points, *(points.nextafter(torch.tensor(to)) for to in (0.0, math.inf))]
    both = torch.cat(around)
    return torch.cat([both, -both])


def test_every_code_means_what_the_format_says() -> None:
    codes = torch.arange(16, dtype=torch.uint8)[None]
    one = torch.ones(1, 1).to(E4M3)
    found = dequantize_nvfp4(codes, one, torch.tensor(1.0), dtype=torch.float64)
    assert found[0].tolist() == [meaning(code) for code in range(16)] and max(POSITIVE) == 6
    assert found.signbit().tolist() == [[False] * 8 + [True] * 8]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_is_to_nearest_even_and_saturates(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    spread = 3 * torch.randn(20_000, generator=generator)
    for x in (hostile(), spread):
        assert round_fp4(x.to(dtype)).tolist() == [nearest(number) for number in x.tolist()]


def test_a_million_numbers_fall_where_a_search_says() -> None:
    x = 3 * torch.randn(1_000_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values = torch.tensor([meaning(code) for code in range(16)], dtype=torch.float64)
    off = (x[:, None].abs() - values[:8]).abs().min(1).values
    assert torch.equal((values[round_fp4(x).int()] - x).abs(), off)


@pytest.mark.parametrize("x", [0.2, 0.75, 1.1, 2.9, 3.01, 5.5, 6.0, 7.5, 0.0])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_random_rounding_goes_to_a_neighbour_and_is_right_on_the_average(x: float, sign: float) -> None:
    bits = torch.arange(2**16, dtype=torch.int32)  # each chance once
    codes = round_fp4(torch.full((2**16,), sign * x), bits)
    found = torch.tensor([meaning(code) for code in range(16)], dtype=torch.float64)[codes.int()]
    low = max(v for v in POSITIVE if v <= x)
    high = min((v for v in POSITIVE if v >= x), default=6.0)
    assert set(found.abs().tolist()) <= {low, high}
    assert found.mean().item() == pytest.approx(sign * min(x, 6.0), abs=2.0**-15)


@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("shape", [(33, 70), (16, 16), (1, 5)])
def test_blocks_by_hand(rows: int, shape: tuple[int, int]) -> None:
    """Both scales and every code by a loop, each rounded by search."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(shape, generator=generator) * torch.exp(3 * torch.randn(shape, generator=generator))
    codes, blocks, scale = quantize_nvfp4(x, rows=rows)
    assert scale == x.abs().max() / (6 * 448)
    for i, j in itertools.product(range(blocks.shape[0]), range(blocks.shape[1])):
        where = slice(i * rows, (i + 1) * rows), slice(j * 16, (j + 1) * 16)
        share = x[where].abs().max() / 6 / scale
        code = by_search(share[None], E4M3)
        assert blocks[i, j].view(torch.uint8) == code
        each = torch.tensor(value(int(code), E4M3)) * scale
        expected = [nearest(n) for n in (x[where] / each).flatten().tolist()] if each else [0] * x[where].numel()
        assert codes[where].flatten().tolist() == expected


def test_weights_in_square_blocks_are_the_same_both_ways() -> None:
    x = torch.randn(40, 56, generator=torch.Generator().manual_seed(3))
    wide = dequantize_nvfp4(*quantize_nvfp4(x, rows=16), rows=16, dtype=torch.float32)
    other = dequantize_nvfp4(*quantize_nvfp4(x.t().contiguous(), rows=16), rows=16, dtype=torch.float32)
    assert torch.equal(wide.t(), other)


@pytest.mark.parametrize("rows", [1, 16])
def test_a_block_with_inf_or_nan_is_nan_and_no_other_is(rows: int) -> None:
    """The tensor's scale is then given, as agreed on before: its own would be NaN too."""
    x = torch.randn(32, 48)
    x[3, 5], x[20, 40] = math.inf, math.nan
    wide = dequantize_nvfp4(*quantize_nvfp4(x, rows=rows, amax=torch.tensor(4.0)), rows=rows, dtype=torch.float32)
    touched = torch.zeros(32, 48, dtype=torch.bool)
    for i, j in ((3, 5), (20, 40)):
        touched[i // rows * rows : (i // rows + 1) * rows, j // 16 * 16 : (j // 16 + 1) * 16] = True
    assert torch.equal(wide.isnan(), touched)
    assert dequantize_nvfp4(*quantize_nvfp4(x, rows=rows), rows=rows, dtype=torch.float32).isnan().all()


def test_zeros_tiny_and_huge_numbers_come_back() -> None:
    for size in (0.0, 1e-30, 1e30):
        x = torch.full((4, 32), -size)
        back = dequantize_nvfp4(*quantize_nvfp4(x), dtype=torch.float32)
        torch.testing.assert_close(back, x, rtol=1e-6, atol=0)
    x = torch.tensor([[1.0] * 16 + [1e-9] * 16])  # beside such a tensor, a block of nothing
    assert dequantize_nvfp4(*quantize_nvfp4(x), dtype=torch.float32)[0, 16:].eq(0).all()


def test_scaling_by_powers_of_two_changes_no_code() -> None:
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(4))
    for power in (2.0**-30, 2.0**20):
        codes, blocks, _ = quantize_nvfp4(x * power)
        assert torch.equal(codes, quantize_nvfp4(x)[0])
        assert torch.equal(blocks.view(torch.uint8), quantize_nvfp4(x)[1].view(torch.uint8))


def test_the_hadamard_transform_is_orthogonal_and_spreads_an_outlier() -> None:
    generator = torch.Generator().manual_seed(5)
    signs = torch.randint(0, 2, (16,), generator=generator) * 2 - 1
    a, b = (torch.randn(n, 37, generator=generator, dtype=torch.float64) for n in (5, 7))
    torch.testing.assert_close(hadamard(a, signs) @ hadamard(b, signs).t(), a @ b.t(), rtol=1e-12, atol=1e-12)
    spike = torch.zeros(1, 16, dtype=torch.float64)
    spike[0, 3] = 8.0
    assert hadamard(spike, signs).abs().tolist() == [[2.0] * 16]
    assert nvfp4_amax(hadamard(spike, signs)).item() == 2.0
