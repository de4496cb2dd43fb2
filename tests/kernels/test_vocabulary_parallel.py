"""The loss on shards of the vocabulary, each as its rank computes it, against the float64 reference on the whole."""

from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megalite_kernels import IGNORE_INDEX, loss, reference, vocabulary_parallel_cross_entropy
from torch import Tensor

from tests.kernels.support import DTYPES, assert_as_exact_as_reference
from tests.kernels.test_linear_cross_entropy import problem, separate_logits

Sums = list[tuple[Tensor, Tensor]]


def in_shards(cuts: list[int], targets: Tensor, z_loss: float, **options: Any) -> Any:
    """(nll_sum, z_sum) by as many shards as `cuts` has parts. What the ranks would tell each other is recorded in a
    first pass without gradients; every shard gets the whole upstream gradient, as on its rank."""

    def op(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        firsts = [sum(cuts[:i]) for i in range(len(cuts))]
        told: list[Sums] = [[] for _ in cuts]

        def run(shard: int, combine: Any) -> tuple[Tensor, Tensor]:
            part = weight[firsts[shard] : firsts[shard] + cuts[shard]]
            where = {"first": firsts[shard], "vocab": sum(cuts), "shards": len(cuts)}
            return vocabulary_parallel_cross_entropy(
                hidden, part, targets, **where, combine=combine, z_loss=z_loss, **options
            )

        with torch.no_grad():
            for shard, sums in enumerate(told):
                run(shard, lambda *x, sums=sums: sums.append(x) or x)

        def joined() -> Any:
            chunks = iter([*zip(*told, strict=True)] * 2)  # twice: unusual upstream gradients need another forward

            def combine(lse: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
                everyone = next(chunks)
                told_before = [torch.stack(sums).nan_to_num() for sums in everyone]
                assert any(torch.equal(torch.stack([lse, chosen]).nan_to_num(), sums) for sums in told_before)
                return torch.logsumexp(torch.stack([x[0] for x in everyone]), 0), sum(x[1] for x in everyone)

            return combine

        results = [run(shard, joined()) for shard in range(len(cuts))]
        for nll, z in results[1:]:
            torch.testing.assert_close((nll, z), results[0], rtol=1e-5, atol=1e-5)
        nll, z = (sum(x) - sum(x[1:]).detach() for x in zip(*results, strict=True))
        return nll, z

    return op


def check(
    inputs: list[Tensor], targets: Tensor, cuts: list[int], dtype: torch.dtype, machine: str = "", *,
    z_loss: float = 0.0, total: bool = False, **options: Any,
) -> None:  # fmt: skip
    def finish(op: Any) -> Any:
        return (lambda *x: (lambda y: (y[0] + z_loss * y[1]) / 7)(op(*x))) if total else op

    ours = finish(in_shards(cuts, targets, z_loss, **options))
    theirs, plain = (
        finish(lambda *x, op=op: op(*x, targets, z_loss=z_loss, **options))
        for op in (reference.linear_cross_entropy, separate_logits)
    )
    assert_as_exact_as_reference(ours, theirs, inputs, dtype, plain if machine == "bf16 hardware" else None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("total", [True, False])
def test_shards_make_the_whole(
    machine: str, dtype: torch.dtype, softcap: float | None, total: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In several chunks; `total`: the usual loss, else the two sums get unrelated upstream gradients."""
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 25 * 16)
    inputs, targets = problem(41, 24, 50)
    check(inputs, targets, [25, 25], dtype, machine, z_loss=1e-2, total=total, softcap=softcap)


def test_ignored_rows_have_no_gradient_whatever_their_logits(machine: str) -> None:
    (hidden, weight), targets = problem(6, 8, 12, ignored=0.0)
    targets[2] = IGNORE_INDEX
    hidden[2] = float("nan")
    inputs = [hidden.float().requires_grad_(), weight.float().requires_grad_()]
    nll, _ = in_shards([6, 6], targets, 0.0)(*inputs)
    nll.backward()
    assert bool(nll.isfinite())
    assert not inputs[0].grad[2].any()


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 30), cuts=st.lists(st.integers(1, 40), min_size=2, max_size=4), seed=st.integers(0, 1000))
def test_any_shards(rows: int, cuts: list[int], seed: int) -> None:
    """In chunks, of which all shards must have the same: `combine` fails where one has other rows."""
    inputs, targets = problem(rows, 1 + seed % 20, sum(cuts), seed=seed)
    with patch.object(loss, "CHUNK_LOGITS", 17 * max(cuts)):
        check(inputs, targets, cuts, torch.float32, softcap=5.0 if seed % 2 else None)
