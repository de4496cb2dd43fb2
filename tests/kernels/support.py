"""Comparing an op with its float64 reference, outputs and every gradient, against what plain rounding allows."""

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
Op = Callable[..., Tensor | tuple[Tensor, ...]]


def outputs_and_gradients(op: Op, inputs: Sequence[Tensor], dtype: torch.dtype, seed: int = 1) -> list[Tensor]:
    """Every output of op(*inputs in dtype), then every input's gradient for random (but fixed) upstream gradients."""
    leaves = [x.detach().to(dtype).clone().requires_grad_() for x in inputs]
    out = op(*leaves)
    outs = out if isinstance(out, tuple) else (out,)
    generator = torch.Generator().manual_seed(seed)
    upstream = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in outs]
    torch.autograd.backward(outs, upstream)
    return [o.detach() for o in outs] + [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]


def assert_as_exact_as_reference(
    op: Op, reference: Op, inputs: Sequence[Tensor], dtype: torch.dtype, plain: Op | None = None
) -> None:
    """Error against float64 at most twice that of `plain` in `dtype`, plus a few roundings of the largest value.

    `plain`: the formula as PyTorch would compute it; by default the reference itself.
    """
    # Upstream gradients and inputs are rounded to dtype first, so that only the op's own arithmetic is judged.
    inputs = [x.to(dtype) for x in inputs]
    exact = outputs_and_gradients(reference, inputs, torch.float64)
    usual = outputs_and_gradients(plain or reference, inputs, dtype)
    # A gradient may be exactly 0 as the difference of terms that are not: roundings count by the largest result of all.
    largest = max([1e-3, *(truth.abs().max().item() for truth in exact if truth.numel())])
    results = zip(outputs_and_gradients(op, inputs, dtype), usual, exact, strict=True)
    for number, (ours, theirs, truth) in enumerate(results):
        assert ours.dtype == theirs.dtype and ours.shape == truth.shape
        assert bool(torch.isfinite(ours).all()), f"result {number} is not finite"
        error, allowed = (torch.dist(x.double(), truth, p=torch.inf).item() for x in (ours, theirs))
        roundings = 4 if dtype != torch.float64 else 100  # in float64 the reference is the truth itself
        floor = roundings * torch.finfo(ours.dtype).eps * largest
        assert error <= 2 * allowed + floor, (
            f"result {number}: error {error:.2e}, plain PyTorch in {dtype} {allowed:.2e}"
        )


def in_a_fork(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns or raises, run in a process that takes its memory with it when it ends."""
    with ProcessPoolExecutor(1, get_context("fork")) as pool:
        return pool.submit(function, *arguments).result()


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
