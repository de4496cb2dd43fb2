"""Norms, activations, rotary positions and linear against the float64 reference, on every kind of machine."""

from typing import Any

import megalite_kernels as kernels
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megalite_kernels import reference
from torch import Tensor

from tests.kernels.support import DTYPES, assert_as_exact_as_reference, outputs_and_gradients, random

WIDTHS = st.integers(1, 70)
ROWS = st.integers(1, 40)
ONE_INPUT = ("gelu", "gelu_tanh", "relu2")
GATED = ("swiglu", "geglu")


def both(name: str, **options: Any) -> tuple[Any, Any]:
    ours, theirs = getattr(kernels, name), getattr(reference, name)
    return (lambda *x: ours(*x, **options)), (lambda *x: theirs(*x, **options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zero_centered", [False, True])
def test_rms_norm(machine: str, dtype: torch.dtype, zero_centered: bool) -> None:
    for rows, width in ((1, 1), (3, 7), (50, 384), (17, 37)):
        inputs = [random(rows, width, scale=3.0), random(width, seed=2)]
        assert_as_exact_as_reference(*both("rms_norm", eps=1e-5, zero_centered=zero_centered), inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm(dtype: torch.dtype) -> None:
    inputs = [random(5, 3, 37), random(37, seed=2), random(37, seed=3)]
    assert_as_exact_as_reference(*both("layer_norm", eps=1e-5), inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ONE_INPUT + GATED)
def test_activations(machine: str, name: str, dtype: torch.dtype) -> None:
    for shape in ((1,), (2, 3, 1030), (1024,)):
        inputs = [random(*shape, seed=seed, scale=4.0) for seed in range(2 if name in GATED else 1)]
        assert_as_exact_as_reference(*both(name), inputs, dtype)


@pytest.mark.parametrize("name", GATED)
def test_saturated_gates_stay_finite(machine: str, name: str) -> None:
    gate = torch.tensor([-1e4, -100.0, -0.0, 0.0, 100.0, 1e4])
    for result in outputs_and_gradients(getattr(kernels, name), [gate, torch.ones(6)], torch.float32):
        assert bool(torch.isfinite(result).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batched", [False, True])
def test_rope(machine: str, dtype: torch.dtype, batched: bool) -> None:
    for dim, rotated in ((64, 64), (20, 12), (2, 2)):
        cos, sin = (random(*([3] if batched else []), 9, rotated, seed=seed) for seed in (4, 5))

        def with_tables(op: Any, cos: Tensor = cos, sin: Tensor = sin) -> Any:
            return lambda x: op(x, cos.to(x.dtype), sin.to(x.dtype))

        ops = with_tables(kernels.apply_rope), with_tables(reference.apply_rope)
        assert_as_exact_as_reference(*ops, [random(3, 9, 5, dim)], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_linear(machine: str, dtype: torch.dtype, bias: bool) -> None:
    inputs = [random(3, 5, 37), random(11, 37, seed=2)] + ([random(11, seed=3)] if bias else [])
    assert_as_exact_as_reference(*both("linear"), inputs, dtype)


@settings(max_examples=40, deadline=None)
@given(rows=ROWS, width=WIDTHS, seed=st.integers(0, 1000))
def test_any_shape(rows: int, width: int, seed: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x, other, weight = random(rows, width, seed=seed), random(rows, width, seed=seed + 1), random(width, seed=seed)
        assert_as_exact_as_reference(*both("rms_norm", eps=1e-5), [x, weight], dtype)
        assert_as_exact_as_reference(*both("swiglu"), [x, other], dtype)


def test_strided_inputs(machine: str) -> None:
    wide = random(6, 5, 4, 32).float()
    x = wide.transpose(0, 2)[..., ::2]
    for op in (lambda t: kernels.rms_norm(t, torch.ones(16), 1e-5), lambda t: kernels.swiglu(t, t)):
        torch.testing.assert_close(op(x), op(x.contiguous()))


def test_nan_is_not_hidden(machine: str) -> None:
    x = torch.ones(4, 16)
    x[1, 3] = float("nan")
    for y in (kernels.rms_norm(x, torch.ones(16), 1e-5), kernels.swiglu(x, x), kernels.linear(x, torch.ones(2, 16))):
        assert bool(y[1].isnan().any()) and bool(torch.isfinite(y[[0, 2, 3]]).all())


def test_gradcheck_of_references() -> None:
    x, other, weight = (random(*s, seed=i).requires_grad_() for i, s in enumerate([(3, 6), (3, 6), (6,)]))
    cos = random(3, 4, seed=2)
    assert torch.autograd.gradcheck(lambda *a: reference.rms_norm(*a, 1e-5, True), (x, weight))
    assert torch.autograd.gradcheck(lambda *a: reference.layer_norm(*a, None, 1e-5), (x, weight))
    for name in GATED:
        assert torch.autograd.gradcheck(getattr(reference, name), (x, other))
    assert torch.autograd.gradcheck(lambda a: reference.apply_rope(a.view(1, 3, 1, 6), cos, cos), (x,))
