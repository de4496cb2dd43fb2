"""Attention against the float64 reference: every mask, ragged and hostile shapes, on every kind of machine."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megalite_kernels import attention, reference
from torch import Tensor

from tests.kernels.support import DTYPES, assert_as_exact_as_reference, outputs_and_gradients, random

VARIANTS: dict[str, dict[str, Any]] = {
    "causal": {},
    "full": {"causal": False},
    "window of 1": {"window": 1},
    "window": {"window": 9},
    "softcap": {"softcap": 2.0},
    "window, softcap": {"window": 5, "softcap": 1.5},
}


def qkv(batch: int, queries: int, keys: int, heads: int, key_heads: int, dim: int, seed: int = 0) -> list[Tensor]:
    shapes = (queries, heads), (keys, key_heads), (keys, key_heads)
    return [random(batch, n, h, dim, seed=seed + i) for i, (n, h) in enumerate(shapes)]


def check(inputs: list[Tensor], dtype: torch.dtype, **options: Any) -> None:
    options = {"scale": inputs[0].shape[-1] ** -0.5, **options}
    ours, theirs = ((lambda *x, op=op: op(*x, **options)) for op in (attention, reference.attention))
    assert_as_exact_as_reference(ours, theirs, inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(machine: str, variant: str, dtype: torch.dtype) -> None:
    check(qkv(2, 33, 33, 6, 2, 20), dtype, **VARIANTS[variant])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 1, 1, 1),
        (2, 1, 300, 4, 2, 16),  # decoding: one query, a long past
        (1, 7, 40, 3, 3, 33),  # more keys than queries: aligned at the end
        (1, 40, 7, 2, 1, 16),  # fewer: the first queries see nothing
        (1, 300, 300, 2, 1, 70),  # several blocks of queries and keys
    ],
)
def test_shapes(machine: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(qkv(*shape), dtype)
    check(qkv(*shape), dtype, window=3)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_documents(machine: str, dtype: torch.dtype, causal: bool) -> None:
    documents = torch.zeros(2, 90, dtype=torch.int32)
    documents[0, 5:] = 1
    documents[0, 6:] = 4
    documents[1, 70:] = 1
    check(qkv(2, 90, 90, 4, 2, 16), dtype, documents=documents, causal=causal)
    check(qkv(2, 90, 90, 4, 2, 16), dtype, documents=documents, causal=causal, window=8, softcap=3.0)


def test_documents_equal_separate_calls(machine: str) -> None:
    q, k, v = (x.float() for x in qkv(1, 24, 24, 2, 1, 16))
    documents = torch.tensor([[0] * 10 + [1] * 14])
    packed = attention(q, k, v, scale=0.25, documents=documents)
    apart = [attention(q[:, s], k[:, s], v[:, s], scale=0.25) for s in (slice(0, 10), slice(10, 24))]
    torch.testing.assert_close(packed, torch.cat(apart, dim=1))


def test_window_as_long_as_the_row_is_causal(machine: str) -> None:
    inputs = [x.float() for x in qkv(1, 70, 70, 2, 2, 16)]
    assert torch.equal(attention(*inputs, scale=0.25, window=70), attention(*inputs, scale=0.25))


def test_blind_queries_give_zero(machine: str) -> None:
    results = outputs_and_gradients(lambda *x: attention(*x, scale=0.5), qkv(1, 5, 2, 2, 1, 8), torch.float32)
    assert not results[0][:, :3].any() and not results[1][:, :3].any()


def test_large_scores_do_not_overflow(machine: str) -> None:
    q, k, v = (x.float() for x in qkv(1, 80, 80, 2, 1, 16))
    for result in outputs_and_gradients(lambda *x: attention(*x, scale=1e3), [q * 30, k * 30, v], torch.float32):
        assert bool(torch.isfinite(result).all())


def test_nan_is_not_hidden(machine: str) -> None:
    q, k, v = (x.float() for x in qkv(1, 12, 12, 1, 1, 16))
    k[0, 5] = float("nan")
    out = attention(q, k, v, scale=0.25)
    assert bool(torch.isfinite(out[:, :5]).all()) and bool(out[:, 5:].isnan().all())


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    group, key_heads = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    keys = data.draw(st.integers(1, 150))
    queries = data.draw(st.integers(1, keys))
    shape = (data.draw(st.integers(1, 2)), queries, keys, group * key_heads, key_heads, data.draw(st.integers(1, 40)))
    window = data.draw(st.none() | st.integers(1, keys + 2))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    check(qkv(*shape), dtype, window=window, softcap=data.draw(st.none() | st.just(3.0)))


def test_reruns_and_threads_give_the_same_bits() -> None:
    inputs = [x.float() for x in qkv(2, 130, 130, 6, 2, 64)]
    torch.set_num_threads(1)
    first = outputs_and_gradients(lambda *x: attention(*x, scale=0.125), inputs, torch.float32)
    torch.set_num_threads(2)
    for _ in range(2):
        again = outputs_and_gradients(lambda *x: attention(*x, scale=0.125), inputs, torch.float32)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_wrong_inputs_are_refused() -> None:
    q, k, v = qkv(1, 4, 4, 3, 2, 8)
    with pytest.raises(ValueError, match="no multiple"):
        attention(q, k, v, scale=1.0)
    q, k, v = qkv(1, 4, 6, 2, 2, 8)
    with pytest.raises(ValueError, match="as many queries as keys"):
        attention(q, k, v, scale=1.0, documents=torch.zeros(1, 4, dtype=torch.int32))
    q, k, v = qkv(1, 2, 2, 2, 2, 8)
    with pytest.raises(ValueError, match="decrease"):
        attention(q, k, v, scale=1.0, documents=torch.tensor([[1, 0]]))


def test_gradcheck_of_the_reference() -> None:
    inputs = [x.requires_grad_() for x in qkv(1, 5, 6, 2, 1, 4)]
    assert torch.autograd.gradcheck(lambda *x: reference.attention(*x, scale=0.5, window=3, softcap=2.0), inputs)
