"""Lookups against the float64 reference; gradients of tokens that repeat thousands of times."""

import pytest
import torch
from megalite_kernels import embedding, reference

from tests.kernels.support import DTYPES, assert_as_exact_as_reference, outputs_and_gradients, random


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (3, 50), (2, 3, 4)])
def test_values_and_gradients(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tokens = torch.randint(0, 7, shape, generator=torch.Generator().manual_seed(0))
    ops = (lambda w, op=op: op(tokens, w) for op in (embedding, reference.embedding))
    assert_as_exact_as_reference(*ops, [random(7, 5)], dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_a_repeated_token_loses_no_gradient(dtype: torch.dtype) -> None:
    weight = torch.zeros(3, 4, dtype=dtype, requires_grad=True)
    embedding(torch.ones(2048, dtype=torch.int64), weight).sum().backward()
    assert weight.grad is not None and weight.grad.dtype == dtype
    assert weight.grad.tolist() == [[0.0] * 4, [2048.0] * 4, [0.0] * 4]


@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_equals_eager(dtype: torch.dtype) -> None:
    tokens = torch.randint(0, 7, (600,), generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(embedding, backend="aot_eager", fullgraph=True)
    ops = (lambda w, op=op: op(tokens, w) for op in (embedding, compiled))
    eager, traced = (outputs_and_gradients(op, [random(7, 5)], dtype) for op in ops)
    for ours, theirs in zip(eager, traced, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_deterministic_mode_gives_the_same_bits() -> None:
    tokens = torch.randint(0, 7, (5000,), generator=torch.Generator().manual_seed(0))
    torch.use_deterministic_algorithms(True)
    for dtype in DTYPES:
        runs = [outputs_and_gradients(lambda w: embedding(tokens, w), [random(7, 64)], dtype) for _ in range(3)]
        assert all(torch.equal(run[1], runs[0][1]) for run in runs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_unknown_tokens_are_refused(dtype: torch.dtype) -> None:
    for token in (-1, 7):
        with pytest.raises(IndexError):
            embedding(torch.tensor([token]), torch.zeros(7, 5, dtype=dtype))
