"""The loss by its Triton rows: shards merged are the whole, and nothing of a step reads a value on the host."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megalite_kernels import IGNORE_INDEX, linear_cross_entropy, loss
from megalite_kernels.dispatch import OPS, Machine, Request, decide
from torch import Tensor

pytest.importorskip("triton", reason="Triton is for Linux")
from megalite_kernels.gpu import cross_entropy
from megalite_kernels.gpu.chips import CHIPS
from megalite_kernels.gpu.launch import recording

from tests.kernels.support import outputs_and_gradients, random
from tests.kernels.test_linear_cross_entropy import problem, total
from tests.kernels.test_vocabulary_parallel import in_shards

few = settings(max_examples=10, deadline=None, derandomize=True)


def by_triton(op: Any) -> Any:
    return lambda *inputs, **options: op(*inputs, backend="triton", **options)


@pytest.mark.law("cross_entropy", "linear_cross_entropy")
@few
@given(rows=st.integers(1, 9), cuts=st.lists(st.integers(1, 40), min_size=2, max_size=4), seed=st.integers(0, 99))
def test_shards_merged_are_the_whole(rows: int, cuts: list[int], seed: int) -> None:
    """Both sums and both gradients, through the public functions; targets lie in any shard, some are ignored."""
    inputs, targets = problem(rows, 1 + seed % 20, sum(cuts), seed=seed)
    softcap, z_loss = (4.0 if seed % 2 else None), 1e-2

    def shards(*x: Tensor) -> Tensor:
        nll, z = in_shards(cuts, targets, z_loss, softcap=softcap, backend="triton")(*x)
        return (nll + z_loss * z) / 7

    whole = total(by_triton(linear_cross_entropy), targets, z_loss, softcap=softcap)
    for part, all_of_it in zip(
        *(outputs_and_gradients(op, inputs, torch.float32) for op in (shards, whole)), strict=True
    ):
        torch.testing.assert_close(part, all_of_it, rtol=1e-4, atol=1e-5)


@pytest.mark.law("linear_cross_entropy")
@few
@given(rows=st.integers(1, 20), vocab=st.integers(1, 90), seed=st.integers(0, 99))
def test_the_same_as_in_c(rows: int, vocab: int, seed: int) -> None:
    inputs, targets = problem(rows, 8, vocab, seed=seed)
    ours, theirs = (
        outputs_and_gradients(total(op, targets, 1e-2, softcap=3.0 if seed % 2 else None), inputs, torch.float32)
        for op in (by_triton(linear_cross_entropy), linear_cross_entropy)
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.law("linear_cross_entropy")
def test_chunks_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, targets = problem(41, 12, 50)
    runs = []
    for logits in (50 * 16, 50 * 64):
        monkeypatch.setattr(loss, "CHUNK_LOGITS", logits)
        op = total(by_triton(linear_cross_entropy), targets, 1e-3)
        runs.append(outputs_and_gradients(op, inputs, torch.float32))
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.law("cross_entropy")
def test_gradients_of_a_row_add_up_to_nothing() -> None:
    """Softmax less the target's one: what nll gives to a row of logits sums to 0; lse² pulls down where lse > 0."""
    logits, targets = random(6, 70, scale=5.0).float(), torch.arange(6)
    for weights, sign in ((torch.tensor([1.0, 0.0]), 0.0), (torch.tensor([0.0, 1.0]), 1.0)):
        gradient = logits.clone()
        _, lse = cross_entropy.whole(gradient, targets, weights, 0.0, IGNORE_INDEX)
        torch.testing.assert_close(gradient.sum(1), sign * 2 * lse, rtol=1e-5, atol=1e-5)


@pytest.mark.law("cross_entropy")
def test_a_shift_of_the_logits_moves_lse_alone() -> None:
    logits, targets = random(5, 33).float(), torch.arange(5)
    nll, lse = cross_entropy.whole(logits, targets, None, 0.0, IGNORE_INDEX)
    shifted = cross_entropy.whole(logits + 64, targets, None, 0.0, IGNORE_INDEX)
    torch.testing.assert_close(shifted, (nll, lse + 64), rtol=1e-5, atol=1e-4)


def test_bf16_logits_become_their_gradient_in_place() -> None:
    logits, targets = random(4, 30).bfloat16(), torch.arange(4)
    exact = logits.double().requires_grad_()
    torch.nn.functional.cross_entropy(exact, targets, reduction="sum").backward()
    cross_entropy.whole(logits, targets, torch.tensor([1.0, 0.0]), 0.0, IGNORE_INDEX)
    torch.testing.assert_close(logits.double(), exact.grad, rtol=2**-8, atol=1e-7)


@pytest.mark.parametrize("rows", ["triton", "torch"])
@pytest.mark.parametrize("shard", [None, loss._Shard(0, 20, 10, lambda *x: x)])
def test_targets_that_do_not_exist_make_nan(rows: str, shard: Any) -> None:
    """Where targets are not read: no access outside the logits, and no silent number."""
    logits, width = random(3, 20).float(), 10 if shard else 20
    targets = torch.tensor([3, 20, -1])
    _, nll, _ = loss._rows(logits[:, :width].contiguous(), targets, None, 0.0, IGNORE_INDEX, rows, shard)
    assert nll.isnan().tolist() == [False, True, True]


@pytest.mark.law("cross_entropy", "linear_cross_entropy")
def test_reruns_give_the_same_bits() -> None:
    inputs, targets = problem(20, 12, 300)
    op = total(by_triton(linear_cross_entropy), targets, 1e-3)
    runs = [outputs_and_gradients(op, inputs, torch.float32) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("shard", [None, loss._Shard(100, 400, 100, lambda *x: x)])
@pytest.mark.parametrize("declared", [0.0, 1e-4, None])
def test_no_value_is_read(shard: Any, declared: float | None) -> None:
    """Forward and backward on tensors without values, launches written down: reading any would raise. So a GPU is
    never waited for, also where both gradients arrive and where one that was declared does not."""
    hidden, weight = (torch.empty(n, 16, dtype=torch.bfloat16, device="meta") for n in (40, 100))
    targets, upstream = torch.empty(40, dtype=torch.int64, device="meta"), torch.empty((), device="meta")
    how = (30.0, IGNORE_INDEX, True, True, "triton", shard)
    with recording() as launches:
        _, _, *grads = loss._forward(hidden, weight, targets, declared, *how)
        assert len(launches) == (1 if shard is None else 1 if declared is None else 2)
        for arriving in ((upstream, upstream), (upstream, None), (None, upstream)):
            pair = loss._upstream(grads[1], *arriving, declared)
            result = loss._backward(hidden, weight, targets, *grads, *pair, *how)
            assert [tuple(x.shape) for x in result] == [(40, 16), (100, 16)]


def test_what_was_not_declared_is_nan_where_nothing_is_read() -> None:
    one, kept = torch.tensor(3.0), loss._factor
    assert kept(one, one * 1e-4, 1e-4, read=False) == 3.0
    assert kept(one, one * 1e-4 * (1 + 1e-7), 1e-4, read=False) == 3.0
    assert bool(kept(one, one * 2e-4, 1e-4, read=False).isnan())
    assert kept(one, one * 2e-4, 1e-4, read=True) is None
    assert kept(one, one * 1e-4, None, read=False) is None


def test_undeclared_gradients_are_made_going_back(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, targets = problem(9, 8, 20)
    wanted = []
    rows = loss._rows
    monkeypatch.setattr(loss, "_rows", lambda *a: wanted.append(a[2] is not None) or rows(*a))
    undeclared, declared = (
        outputs_and_gradients(lambda *x, z=z: linear_cross_entropy(*x, targets, z_loss=z), inputs, torch.float32)
        for z in (None, 0.0)
    )
    assert wanted == [False, True, True, True]  # declared wrongly: two gradients; not at all: one, going back
    assert all(torch.equal(a, b) for a, b in zip(undeclared, declared, strict=True))


def test_blocks_fit_every_vocabulary() -> None:
    for chip in CHIPS.values():
        for vocab in (1, 17, 4096, 50304, 256_000):
            found = cross_entropy.config(chip, vocab)
            assert found["BLOCK"] >= min(vocab, 8192) and 1 <= found["num_warps"] <= 16


@pytest.mark.parametrize("op", ["linear_cross_entropy", "vocabulary_parallel_cross_entropy"])
def test_choices(op: str) -> None:
    def chosen(device: str, dtype: torch.dtype, *packages: tuple[str, str]) -> str:
        chip = "sm_90" if device == "cuda" else ""
        return str(decide(OPS[op], Request(op, device, chip, dtype), Machine(packages, None)))

    triton = ("triton", "3.7.1")
    assert chosen("cuda", torch.bfloat16, triton) == "triton"
    assert chosen("cuda", torch.bfloat16).startswith("torch (not triton: Triton is not installed")
    assert chosen("cpu", torch.bfloat16, triton).startswith("native (not triton: on a CPU")
    assert "float32, not float64" in chosen("cpu", torch.float64, triton)
    assert chosen("meta", torch.float32, triton).startswith("torch")
