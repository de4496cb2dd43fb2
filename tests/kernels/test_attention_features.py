"""Sinks, log-sum-exp with its gradient, values of another size, packed documents: on the CPU's routes.

And the reference against PyTorch's and transformers' own attention.
"""

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megalite_kernels import attention, reference
from torch import Tensor

from tests.kernels.support import DTYPES, assert_as_exact_as_reference, random


def qkv(queries: int, keys: int, heads: int, key_heads: int, dim: int, value_dim: int) -> list[Tensor]:
    shapes = (queries, heads, dim), (keys, key_heads, dim), (keys, key_heads, value_dim)
    return [random(2, *shape, seed=seed) for seed, shape in enumerate(shapes)]


def check(inputs: list[Tensor], dtype: torch.dtype, **options: Any) -> None:
    def call(op: Any) -> Any:
        return lambda q, k, v, *sinks: op(q, k, v, sinks=sinks[0] if sinks else None, scale=0.3, **options)

    assert_as_exact_as_reference(call(attention), call(reference.attention), inputs, dtype)


SINKS = torch.tensor([1.0, -2.0, 0.0, 5.0], dtype=torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sinks(machine: str, dtype: torch.dtype) -> None:
    check([*qkv(33, 33, 4, 2, 20, 20), SINKS], dtype)
    check([*qkv(20, 7, 4, 1, 8, 8), SINKS], dtype, window=4, softcap=2.0)  # some queries see the sink alone


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_flows_through_the_lse(machine: str, dtype: torch.dtype) -> None:
    check(qkv(33, 40, 4, 2, 20, 20), dtype, return_lse=True)
    check([*qkv(33, 40, 4, 2, 20, 20), SINKS], dtype, return_lse=True, softcap=3.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(24, 16), (8, 40)])
def test_values_of_another_size(machine: str, sizes: tuple[int, int], dtype: torch.dtype) -> None:
    check(qkv(33, 33, 4, 2, *sizes), dtype, return_lse=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"window": 4}, {"causal": False}])
def test_packed_documents(machine: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    of_q, of_k = torch.tensor([0, 0, 5, 6, 6, 30]), torch.tensor([0, 3, 12, 12, 14, 40])
    q, k, v = (x[0] for x in qkv(30, 40, 4, 2, 8, 8))
    check([q, k, v], dtype, cu_seqlens_q=of_q, cu_seqlens_k=of_k, **options)
    check([q, k[:30], v[:30]], dtype, cu_seqlens_q=of_q.int(), **options)


def test_a_blind_query_has_an_lse_of_minus_infinity(machine: str) -> None:
    q, k, v = (x.float() for x in qkv(5, 2, 4, 2, 8, 8))
    for backend in ("auto", "blocks", "reference"):
        _, lse = attention(q, k, v, scale=0.5, return_lse=True, backend=backend)
        assert bool((lse[:, :, :3] == -torch.inf).all()) and bool(lse[:, :, 3:].isfinite().all())


def test_wrong_inputs_are_refused() -> None:
    q, k, v = (x[0] for x in qkv(6, 6, 4, 2, 8, 8))
    for cu, said in (([0, 7], "do not rise"), ([1, 6], "do not rise"), ([0, 4, 2, 6], "do not rise")):
        with pytest.raises(ValueError, match=said):
            attention(q, k, v, scale=1.0, cu_seqlens_q=torch.tensor(cu))
    with pytest.raises(ValueError, match="sinks are"):
        attention(q[None], k[None], v[None], scale=1.0, sinks=torch.zeros(2))
    with pytest.raises(ValueError, match="needs cu_seqlens_q"):
        attention(q[None], k[None], v[None], scale=1.0, cu_seqlens_k=torch.tensor([0, 6]))
    with pytest.raises(ValueError, match="told by cu_seqlens"):
        attention(q, k, v, scale=1.0, cu_seqlens_q=torch.tensor([0, 6]), documents=torch.zeros(1, 6))


def test_reference_equals_pytorch_with_an_explicit_mask() -> None:
    q, k, v = qkv(9, 14, 4, 2, 8, 8)
    seen = reference.visible(9, 14, causal=True, window=6)
    theirs = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=seen, scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(reference.attention(q, k, v, scale=0.3, window=6), theirs.transpose(1, 2))


def test_reference_equals_gpt_oss() -> None:
    gpt_oss = importlib.import_module("transformers.models.gpt_oss.modeling_gpt_oss")
    q, k, v = qkv(9, 9, 4, 2, 8, 8)
    layer = SimpleNamespace(sinks=SINKS, num_key_value_groups=2, training=False)
    hidden = torch.zeros(9, 9, dtype=torch.float64).masked_fill(~reference.visible(9, 9, causal=True, window=4), -1e300)
    theirs, _ = gpt_oss.eager_attention_forward(layer, *(x.transpose(1, 2) for x in (q, k, v)), hidden[None, None], 0.3)
    torch.testing.assert_close(reference.attention(q, k, v, scale=0.3, window=4, sinks=SINKS), theirs)


def test_gradcheck_of_the_reference() -> None:
    inputs = [x[:1].requires_grad_() for x in qkv(4, 6, 4, 2, 3, 5)]
    options: dict[str, Any] = {"scale": 0.5, "return_lse": True}
    sinks = SINKS.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda *x: reference.attention(*x[:3], sinks=x[3], **options), [*inputs, sinks])
    packed = [x[0].detach().requires_grad_() for x in inputs]
    of_q, of_k = torch.tensor([0, 0, 3, 4]), torch.tensor([0, 2, 5, 6])
    assert torch.autograd.gradcheck(
        lambda *x: reference.attention(*x, cu_seqlens_q=of_q, cu_seqlens_k=of_k, **options), packed
    )
