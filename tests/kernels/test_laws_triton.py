"""Laws of norms, activations of one input and products by expert, on random inputs; Triton interpreted."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megalite_kernels import gelu, gelu_tanh, grouped_gemm, layer_norm, relu2, rms_norm
from torch import Tensor

pytest.importorskip("triton", reason="Triton is for Linux")

from tests.kernels.support import random

few = settings(max_examples=10, deadline=None, derandomize=True)
rows = st.integers(1, 40)
widths = st.integers(1, 90)
seeds = st.integers(0, 99)


def normed(name: str, x: Tensor, eps: float = 1e-6) -> list[Tensor]:
    """The norm of x and its gradient, for a weight and an upstream gradient that depend on the shape alone."""
    x = x.detach().clone().requires_grad_()
    weight, bias = (random(x.shape[1], seed=seed).float() for seed in (3, 4))
    if name == "rms_norm":
        y = rms_norm(x, weight, eps, backend="triton")
    else:
        y = layer_norm(x, weight, bias, eps, backend="triton")
    return [y.detach(), *torch.autograd.grad(y, x, random(1, x.shape[1], seed=5).float().expand_as(y))]


@pytest.mark.law("rms_norm", "layer_norm")
@pytest.mark.parametrize("name", ["rms_norm", "layer_norm"])
@few
@given(rows, widths, seeds)
def test_rows_do_not_know_each_other(name: str, count: int, width: int, seed: int) -> None:
    x, order = random(count, width, seed=seed).float(), torch.randperm(count)
    there, here = normed(name, x[order]), normed(name, x)
    assert all(torch.equal(a, b[order]) for a, b in zip(there, here, strict=True))


@pytest.mark.law("rms_norm", "layer_norm")
@pytest.mark.parametrize("name", ["rms_norm", "layer_norm"])
@few
@given(rows, widths, st.integers(-10, 10), seeds)
def test_a_power_of_two_changes_nothing_but_the_gradient_by_it(
    name: str, count: int, width: int, power: int, seed: int
) -> None:
    x = random(count, width + 1, seed=seed).float()  # of one number the variance is 0
    (y, grad), (moved, moved_grad) = normed(name, x, 0.0), normed(name, x * 2.0**power, 0.0)
    assert torch.equal(y, moved) and torch.equal(grad, moved_grad * 2.0**power)


@pytest.mark.law("rms_norm")
@few
@given(rows, widths, seeds)
def test_the_residual_is_added_before_and_handed_on(count: int, width: int, seed: int) -> None:
    x, other = (random(count, width, seed=seed + n).bfloat16() for n in (0, 1))
    weight = random(width, seed=2).bfloat16()
    y, total = rms_norm(x, weight, 1e-6, residual=other, backend="triton")
    assert torch.equal(total, x + other) and torch.equal(y, rms_norm(total, weight, 1e-6, backend="triton"))


@pytest.mark.law("gelu", "gelu_tanh")
@pytest.mark.parametrize("op", [gelu, gelu_tanh])
@few
@given(rows, widths, seeds)
def test_both_signs_of_gelu_make_the_number(op: object, count: int, width: int, seed: int) -> None:
    """x Φ(x) + x Φ(-x) = x, Φ being the normal distribution or its like by tanh."""
    x = random(count, width, seed=seed, scale=3.0).float()
    torch.testing.assert_close(op(x, backend="triton") - op(-x, backend="triton"), x, rtol=1e-6, atol=1e-6)


@pytest.mark.law("relu2")
@few
@given(rows, widths, seeds)
def test_both_signs_of_relu2_make_the_square(count: int, width: int, seed: int) -> None:
    x = random(count, width, seed=seed).float().requires_grad_()
    total = relu2(x, backend="triton") + relu2(-x, backend="triton")
    assert torch.equal(total, x * x) and torch.equal(torch.autograd.grad(total.sum(), x)[0], 2 * x)


@pytest.mark.law("grouped_gemm")
@few
@given(st.lists(st.integers(0, 20), min_size=1, max_size=5), st.integers(1, 40), st.integers(1, 40), seeds)
def test_experts_of_one_weight_are_one_product(counts: list[int], depth: int, width: int, seed: int) -> None:
    """Wherever the rows are cut: the same bits, and the weight's gradient is the sum of the experts'."""
    x, w = random(sum(counts), depth, seed=seed).float(), random(depth, width, seed=seed + 1).float()
    results = []
    for ends in ([0, *torch.tensor(counts).cumsum(0).tolist()], [0, sum(counts)]):
        leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
        offsets = torch.tensor(ends, dtype=torch.int32)
        y = grouped_gemm(leaves[0], leaves[1].expand(len(ends) - 1, -1, -1), offsets, backend="triton")
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), leaves)])
    (y, grad_x, grad_w), (whole, whole_x, whole_w) = results
    assert torch.equal(y, whole) and torch.equal(grad_x, whole_x)
    torch.testing.assert_close(grad_w, whole_w, rtol=1e-5, atol=1e-6 * (1 + float(whole_w.abs().max())))


@pytest.mark.law("grouped_gemm")
@few
@given(st.permutations(range(4)), st.integers(1, 40), seeds)
def test_experts_do_not_know_their_number(order: list[int], depth: int, seed: int) -> None:
    counts = [5, 0, 17, 2]
    x, w = random(sum(counts), depth, seed=seed).float(), random(4, depth, 12, seed=seed + 1).float()
    parts = x.split(counts)
    here = grouped_gemm(x, w, _offsets(counts), backend="triton").split(counts)
    sizes = [counts[n] for n in order]
    there = grouped_gemm(torch.cat([parts[n] for n in order]), w[order], _offsets(sizes), backend="triton").split(sizes)
    assert all(torch.equal(here[n], there[place]) for place, n in enumerate(order))


def _offsets(counts: list[int]) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0).int()
