"""Moments in 8 bits: the codes by the paper's own construction, rounding by search, blocks by a loop."""

import itertools
import math

import numpy as np
import pytest
import torch
from megalite_kernels.reference import (
    MOMENT_BLOCK,
    MOMENT_DTYPES,
    dequantize_moment,
    moment_amax,
    quantize_moment,
)
from megalite_kernels.reference.moments import dynamic_code

FORMATS = list(MOMENT_DTYPES)


def by_bits(signed: bool) -> list[float]:
    """arXiv:2110.02861, figure 2: a sign, as many zeros as the exponent, a one, and what bits are left as a fraction of
    0.1 to 1, each at the middle of its step. Nothing but zeros is 0; the last code with a sign and no zero bit that
    would say -0 stands for 1."""
    bits = 7 if signed else 8
    values = [0.0, 1.0]
    for zeros in range(7):
        fraction_bits = bits - zeros - 1
        for fraction in range(2**fraction_bits):
            value = (0.1 + 0.9 * (fraction + 0.5) / 2**fraction_bits) * 10.0**-zeros
            values += [value, -value] if signed else [value]
    return sorted(values)


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_those_of_the_paper(signed: bool) -> None:
    values = dynamic_code(signed)
    assert len(values) == 256 and (values.diff() > 0).all()
    assert values.tolist() == torch.tensor(by_bits(signed)).tolist()
    smallest = values[values > 0].min().item()
    assert math.isclose(smallest, 5.5e-7 if signed else 3.25e-7, rel_tol=1e-6)


def heavy(rows: int, columns: int, format: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, columns, generator=generator) * torch.exp(3 * torch.randn(rows, columns, generator=generator))
    return x.abs() if format in ("dynamic_unsigned", "fp16") else x


def points(format: str) -> np.ndarray:
    """Every finite value of a format, from its definition, over its largest."""
    if format.startswith("dynamic"):
        return np.array(by_bits(format == "dynamic"))
    if format == "fp16":
        values = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float64)
    else:
        values = np.array([m * 2.0**-9 for m in range(8)])
        values = np.concatenate([values, [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)][:-1]])
    return np.unique(np.concatenate([values, -values]) / values.max())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("skip", [0, 40])
def test_each_is_the_nearest_of_its_block(format: str, skip: int) -> None:
    x = heavy(5, 700, format)
    codes, scales = quantize_moment(x, moment_amax(x, skip), format, skip)
    found = dequantize_moment(codes, scales, format, torch.float64, skip).numpy()
    steps = points(format)
    edges = [0, *range(MOMENT_BLOCK - skip, 700, MOMENT_BLOCK), 700]
    assert scales.shape == (5, len(edges) - 1) and codes.dtype == MOMENT_DTYPES[format]
    for row, (low, high) in itertools.product(range(5), itertools.pairwise(edges)):
        block = x[row, low:high].double().numpy()
        amax = abs(block).max()
        off = abs(found[row, low:high] - block)
        best = abs(block[:, None] - steps * amax).min(1)
        kept_from_zero = (format == "dynamic_unsigned") & (block < 1.7e-7 * amax)
        assert (off[~kept_from_zero] <= best[~kept_from_zero] + 1e-6 * abs(block[~kept_from_zero])).all()


def test_what_is_positive_does_not_become_zero() -> None:
    x = torch.tensor([[0.0, 1e-12, 1e-9, 1.0]])
    codes, _ = quantize_moment(x, moment_amax(x), "dynamic_unsigned")
    assert codes.tolist() == [[0, 1, 1, 255]]
    codes, _ = quantize_moment(x, moment_amax(x), "fp16")
    assert codes[0, 0] == 0 and (codes[0, 1:] > 0).all()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zeros_stay_and_what_is_no_number_is_seen(format: str, dtype: torch.dtype) -> None:
    x = torch.zeros(3, 2 * MOMENT_BLOCK, dtype=dtype)
    x[1, 3], x[2, MOMENT_BLOCK + 1] = math.inf, math.nan
    codes, scales = quantize_moment(x, moment_amax(x), format)
    back = dequantize_moment(codes, scales, format, dtype)
    assert back.dtype == dtype and scales.dtype == torch.float32
    touched = torch.zeros_like(x, dtype=torch.bool)
    touched[1, :MOMENT_BLOCK] = touched[2, MOMENT_BLOCK:] = True
    assert torch.equal(back.isnan(), touched) and (back[~touched] == 0).all()


@pytest.mark.parametrize("format", FORMATS)
def test_scaling_by_powers_of_two_changes_no_code(format: str) -> None:
    x = heavy(4, 512, format)
    codes = quantize_moment(x, moment_amax(x), format)[0]
    for power in (2.0**-20, 2.0**9):
        assert torch.equal(quantize_moment(x * power, moment_amax(x * power), format)[0].float(), codes.float())
