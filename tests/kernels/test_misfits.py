"""Inputs that do not belong together: what PyTorch refuses is refused, what it broadcasts is broadcast."""

from collections.abc import Callable

import megalite_kernels as kernels
import pytest
import torch
from megalite_kernels import reference
from torch import Tensor

from tests.kernels.support import outputs_and_gradients, random


def table(*shape: int) -> Tensor:
    return torch.ones(*shape)


REFUSED: dict[str, Callable[[], object]] = {
    "rms_norm: weight too short": lambda: kernels.rms_norm(torch.ones(4, 64), torch.ones(8), 1e-5),
    "swiglu: widths differ": lambda: kernels.swiglu(torch.ones(4, 64), torch.ones(4, 32)),
    "geglu: widths differ": lambda: kernels.geglu(torch.ones(4, 64), torch.ones(32)),
    "rope: wider than the head": lambda: kernels.apply_rope(torch.ones(1, 3, 2, 8), table(3, 16), table(3, 16)),
    "rope: wider than a head of 1": lambda: kernels.apply_rope(torch.ones(1, 3, 2, 1), table(3, 4), table(3, 4)),
    "rope: odd": lambda: kernels.apply_rope(torch.ones(1, 3, 2, 8), table(3, 5), table(3, 5)),
    "rope: sin narrower": lambda: kernels.apply_rope(torch.ones(1, 3, 2, 8), table(3, 8), table(3, 4)),
    "rope: too few positions": lambda: kernels.apply_rope(torch.ones(1, 3, 2, 8), table(2, 8), table(2, 8)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(machine: str, case: str) -> None:
    with pytest.raises((ValueError, RuntimeError)):
        REFUSED[case]()


@pytest.mark.parametrize("name", ["swiglu", "geglu"])
@pytest.mark.parametrize("shapes", [((4, 64), (64,)), ((4, 64), (4, 1)), ((64,), (4, 64))])
def test_gates_broadcast(machine: str, name: str, shapes: tuple[tuple[int, ...], ...]) -> None:
    inputs = [random(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    ops = getattr(kernels, name), getattr(reference, name)
    for ours, theirs in zip(*(outputs_and_gradients(op, inputs, torch.float32) for op in ops), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_norm_and_rope_broadcast(machine: str) -> None:
    x, weight, cos = random(2, 3, 4, 8).float(), random(1, seed=1).float(), random(1, 8, seed=2).float()
    torch.testing.assert_close(kernels.rms_norm(x, weight, 1e-5), kernels.rms_norm(x, weight.expand(8), 1e-5))
    torch.testing.assert_close(kernels.apply_rope(x, cos, cos), kernels.apply_rope(x, *[cos.expand(3, 8)] * 2))


def test_rope_takes_strided_tables(machine: str) -> None:
    x, wide = random(2, 3, 4, 8).float(), random(2, 3, 16, seed=2).float()
    cos = wide[..., ::2]
    torch.testing.assert_close(kernels.apply_rope(x, cos, cos), reference.apply_rope(x, cos, cos))


@pytest.mark.parametrize(
    ("k", "v", "said"),
    [
        ((1, 6, 2, 8), (1, 5, 2, 8), "needs q"),  # lengths
        ((1, 6, 2, 8), (1, 6, 1, 8), "needs q"),  # key heads
        ((1, 6, 2, 4), (1, 6, 2, 4), "needs q"),  # head size
        ((2, 6, 2, 8), (2, 6, 2, 8), "needs q"),  # batch
        ((6, 2, 8), (6, 2, 8), "needs q"),
        ((1, 6, 0, 8), (1, 6, 0, 8), "no multiple"),
    ],
)
def test_attention_refuses_shapes(k: tuple[int, ...], v: tuple[int, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        kernels.attention(torch.ones(1, 4, 2, 8), torch.ones(k), torch.ones(v), scale=1.0)


def test_attention_refuses_kinds_and_documents() -> None:
    q = torch.ones(1, 4, 2, 8)
    for other in (q.double(), q.bfloat16(), q.to("meta")):
        with pytest.raises(ValueError, match="one dtype and device"):
            kernels.attention(q, other, other, scale=1.0)
    with pytest.raises(ValueError, match="documents are"):
        kernels.attention(q, q, q, scale=1.0, documents=torch.zeros(1, 3, dtype=torch.int32))


@pytest.mark.parametrize(
    ("hidden", "weight", "targets"),
    [
        (torch.ones(3, 8), torch.ones(5, 8), torch.zeros(3, dtype=torch.int32)),
        (torch.ones(3, 8), torch.ones(5, 8), torch.zeros(3)),
        (torch.ones(3, 8), torch.ones(5, 8), torch.zeros(2, dtype=torch.int64)),
        (torch.ones(3, 8), torch.ones(5, 8), torch.zeros(3, 1, dtype=torch.int64)),
        (torch.ones(3, 8), torch.ones(5, 7), torch.zeros(3, dtype=torch.int64)),
        (torch.ones(3, 8), torch.ones(0, 8), torch.zeros(3, dtype=torch.int64)),
        (torch.ones(1, 3, 8), torch.ones(5, 8), torch.zeros(3, dtype=torch.int64)),
        (torch.ones(3, 8), torch.ones(5, 8), torch.zeros(3, dtype=torch.int64, device="meta")),
    ],
)
def test_loss_refuses_misfits(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    with pytest.raises(ValueError, match="linear_cross_entropy"):
        kernels.linear_cross_entropy(hidden, weight, targets)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target", [5, 1 << 40, -1, -101])
def test_loss_refuses_targets_outside_the_vocabulary(machine: str, target: int, dtype: torch.dtype) -> None:
    hidden, weight = torch.ones(3, 8, dtype=dtype, requires_grad=True), torch.ones(5, 8, dtype=dtype)
    with pytest.raises(IndexError, match=rf"target {target} is outside 0 … 4 and not -100"):
        kernels.linear_cross_entropy(hidden, weight, torch.tensor([0, -100, target]))


def test_the_ignored_target_may_be_any_number(machine: str) -> None:
    hidden, weight = torch.ones(3, 8), torch.ones(5, 8)
    for ignored in (0, 4, 99, -1):
        nll_sum, _ = kernels.linear_cross_entropy(hidden, weight, torch.tensor([ignored, 1, 2]), ignore_index=ignored)
        torch.testing.assert_close(nll_sum, 2 * torch.tensor(5.0).log())
