"""The fused head and loss against the float64 reference, with gradients for any upstream combination."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megalite_kernels import IGNORE_INDEX, capability, linear_cross_entropy, loss, reference
from torch import Tensor

from tests.kernels.support import DTYPES, assert_as_exact_as_reference, outputs_and_gradients, random


def problem(rows: int, width: int, vocab: int, ignored: float = 0.2, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, vocab, (rows,), generator=generator)
    targets[torch.rand(rows, generator=generator) < ignored] = IGNORE_INDEX
    return [random(rows, width, seed=seed), random(vocab, width, seed=seed + 1, scale=0.3)], targets


def separate_logits(hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """The loss as models usually compute it: logits rounded to the model's dtype first."""
    identity = torch.eye(weight.shape[0], dtype=weight.dtype)
    return reference.linear_cross_entropy(hidden @ weight.T, identity, targets, **options)


THREE = (linear_cross_entropy, reference.linear_cross_entropy, separate_logits)


def check(inputs: list[Tensor], targets: Tensor, dtype: torch.dtype, machine: str = "", **options: Any) -> None:
    ours, theirs, plain = ((lambda *x, op=op: op(*x, targets, **options)) for op in THREE)
    assert_as_exact_as_reference(ours, theirs, inputs, dtype, plain if machine == "bf16 hardware" else None)


def total(op: Any, targets: Tensor, z_loss: float, **options: Any) -> Any:
    def combined(*inputs: Tensor) -> Tensor:
        nll_sum, z_sum = op(*inputs, targets, z_loss=z_loss, **options)
        return (nll_sum + z_loss * z_sum) / 7

    return combined


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_any_upstream_gradient(machine: str, dtype: torch.dtype, softcap: float | None) -> None:
    """The two sums get unrelated upstream gradients, so the second forward runs."""
    check(*problem(40, 24, 50), dtype, machine, softcap=softcap)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_total_in_chunks(
    machine: str, dtype: torch.dtype, z_loss: float, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The usual loss, its gradient made in the forward pass, over several chunks of which the last is ragged."""
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 50 * 16)
    inputs, targets = problem(41, 24, 50)
    ours, theirs, plain = (total(op, targets, z_loss, softcap=softcap) for op in THREE)
    assert_as_exact_as_reference(ours, theirs, inputs, dtype, plain if machine == "bf16 hardware" else None)


def test_total_needs_no_second_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    rows = loss._rows
    monkeypatch.setattr(loss, "_rows", lambda *a: calls.append(1) or rows(*a))
    inputs, targets = problem(20, 8, 30)
    outputs_and_gradients(total(linear_cross_entropy, targets, 1e-4), inputs, torch.float32)
    assert len(calls) == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_target_ignored(machine: str, dtype: torch.dtype) -> None:
    inputs, targets = problem(5, 8, 11, ignored=1.1)
    for result in outputs_and_gradients(lambda *x: linear_cross_entropy(*x, targets), inputs, dtype):
        assert not result.any()


def test_hostile_sizes(machine: str) -> None:
    for rows, width, vocab in ((1, 1, 2), (1, 5, 1), (3, 7, 1001)):
        check(*problem(rows, width, vocab, ignored=0.0), torch.float32)


def test_infinite_logits_are_not_hidden(machine: str) -> None:
    (hidden, weight), targets = problem(4, 8, 11, ignored=0.0)
    hidden[2] = float("nan")
    nll_sum, _ = linear_cross_entropy(hidden.float(), weight.float(), targets)
    assert bool(nll_sum.isnan())


def test_large_logits_do_not_overflow(machine: str) -> None:
    (hidden, weight), targets = problem(4, 8, 11, ignored=0.0)
    check([hidden * 1e3, weight * 1e3], targets, torch.float32)


def test_only_the_loss_when_no_gradient_is_needed(machine: str) -> None:
    (hidden, weight), targets = problem(9, 8, 11)
    with torch.no_grad():
        nll_sum, _ = linear_cross_entropy(hidden, weight, targets)
    frozen = linear_cross_entropy(hidden.requires_grad_(), weight, targets)
    frozen[0].backward()
    assert weight.grad is None and hidden.grad is not None
    torch.testing.assert_close(nll_sum, frozen[0].detach())


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 40), width=st.integers(1, 40), vocab=st.integers(2, 90), seed=st.integers(0, 1000))
def test_any_shape(rows: int, width: int, vocab: int, seed: int) -> None:
    machine = "bf16 hardware" if capability.bf16_matmul_hardware() else ""
    for dtype in (torch.float32, torch.bfloat16):
        inputs, targets = problem(rows, width, vocab, seed=seed)
        check(inputs, targets, dtype, machine, softcap=5.0 if seed % 2 else None)


def test_reruns_give_the_same_bits() -> None:
    inputs, targets = problem(60, 24, 50)
    op = total(linear_cross_entropy, targets, 1e-3)
    first, again = (outputs_and_gradients(op, inputs, torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_gradcheck() -> None:
    inputs, targets = problem(5, 4, 6)
    leaves = [x.requires_grad_() for x in inputs]
    for op in (reference.linear_cross_entropy, linear_cross_entropy):
        assert torch.autograd.gradcheck(lambda *x, op=op: op(*x, targets, softcap=3.0), leaves)
