"""Gated activations by every backend: layouts of one projection, gpt-oss' own formula, refusals."""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megalite_kernels import geglu, reference, relu2, swiglu, swiglu_clamped
from torch import Tensor

pytest.importorskip("triton", reason="Triton is for Linux")

from tests.kernels.support import outputs_and_gradients, random

GATED = (swiglu, geglu, swiglu_clamped)
few = settings(max_examples=10, deadline=None, derandomize=True)


@pytest.mark.law("swiglu", "geglu", "swiglu_clamped")
@pytest.mark.parametrize("op", GATED)
@few
@given(rows=st.integers(0, 40), width=st.integers(1, 70), seed=st.integers(0, 99))
def test_slices_of_one_tensor_are_as_good_as_copies(op: object, rows: int, width: int, seed: int) -> None:
    gate_up = random(rows, 2 * width, seed=seed, scale=5.0)

    def sliced(x: Tensor) -> Tensor:
        return op(x[:, :width], x[:, width:], backend="triton")

    def alternate(x: Tensor) -> Tensor:
        x = x.unflatten(-1, (2, width)).transpose(1, 2).flatten(1)
        return op(x[:, ::2], x[:, 1::2], backend="triton")

    def copied(x: Tensor) -> Tensor:
        return op(x[:, :width].clone(), x[:, width:].clone(), backend="triton")

    one, two, three = (outputs_and_gradients(f, [gate_up], torch.float32) for f in (sliced, alternate, copied))
    assert all(torch.equal(a, c) and torch.equal(b, c) for a, b, c in zip(one, two, three, strict=True))


def test_sides_are_read_where_they_lie() -> None:
    """No copy: the kernel gets the slices themselves."""
    from megalite_kernels.gpu.activation import forward
    from megalite_kernels.gpu.launch import recording

    gate, up = torch.empty(8, 64, device="meta").chunk(2, dim=-1)
    with recording() as launches:
        forward(gate, up, "swiglu", 0.0, 0.0)
    assert launches[0].arguments["gate_ptr"] is gate and launches[0].arguments["up_ptr"] is up


def test_clamped_as_transformers_computes_it() -> None:
    gpt_oss = importlib.import_module("transformers.models.gpt_oss.modeling_gpt_oss")
    config = gpt_oss.GptOssConfig(num_local_experts=1, hidden_size=4, intermediate_size=4)
    experts = gpt_oss.GptOssExperts(config)
    x = random(30, 16, scale=6.0).float()
    gate, up = x[:, ::2], x[:, 1::2]
    for backend in ("triton", "reference"):
        ours = swiglu_clamped(gate, up, alpha=experts.alpha, limit=experts.limit, backend=backend)
        torch.testing.assert_close(ours, experts._apply_gate(x))


@pytest.mark.law("swiglu", "geglu", "swiglu_clamped")
@pytest.mark.parametrize("op", GATED)
def test_reruns_give_the_same_bits(op: object) -> None:
    inputs = [random(20, 300, seed=seed) for seed in (0, 1)]
    runs = [outputs_and_gradients(lambda *x: op(*x, backend="triton"), inputs, torch.float32) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_gradcheck_of_references() -> None:
    gate, up = (random(3, 6, seed=seed, scale=4.0).requires_grad_() for seed in (0, 1))
    assert torch.autograd.gradcheck(lambda *a: reference.swiglu_clamped(*a, limit=3.0), (gate, up))
    assert torch.autograd.gradcheck(reference.relu2, (gate,))


def test_nan_is_not_hidden() -> None:
    bad, good = torch.tensor([float("nan"), 1.0]), torch.ones(2)
    for op in GATED:
        for pair in ((bad, good), (good, bad)):
            assert op(*pair, backend="triton").isnan().tolist() == [True, False]
    assert relu2(bad, backend="triton").isnan().tolist() == [True, False]


def test_misfits_are_refused() -> None:
    for op in GATED:
        with pytest.raises(ValueError, match="do not fit"):
            op(torch.ones(4, 64), torch.ones(4, 32), backend="triton")
    with pytest.raises(ValueError, match="no backend 'native'; there are auto, triton, reference"):
        relu2(torch.ones(2), backend="native")
