"""Under torch.compile and with fake tensors: one graph a block, the same numbers."""

import megalite_kernels as kernels
import torch
from megalite_kernels.fp8 import quantize_fp8, scaled_mm
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.kernels.support import random


def block(x_BSE: Tensor, weight: Tensor, cos: Tensor) -> Tensor:
    h = kernels.rms_norm(x_BSE, weight[0], 1e-5)
    q, k, v = (kernels.linear(h, weight).unflatten(-1, (2, 16)) for _ in range(3))
    a = kernels.attention(kernels.apply_rope(q, cos, cos), kernels.apply_rope(k, cos, cos), v, scale=0.25)
    return x_BSE + kernels.swiglu(a.flatten(-2), h)


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, cos = random(2, 12, 32), random(32, 32, seed=1, scale=0.2), random(12, 16, seed=2)
    return x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), cos.to(dtype)


def test_a_block_is_one_graph() -> None:
    explanation = torch._dynamo.explain(block)(*inputs(torch.float32))
    assert explanation.graph_break_count == 0, explanation.break_reasons


def test_traced_backward_equals_eager() -> None:
    results = []
    for run in (block, torch.compile(block, backend="aot_eager", fullgraph=True)):
        x, weight, cos = inputs(torch.float32)
        run(x, weight, cos).square().sum().backward()
        results.append((x.grad, weight.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_registered_ops_are_sound() -> None:
    q, k, v = (random(1, 6, h, 8, seed=h).requires_grad_() for h in (4, 2, 2))
    low, high = torch.ops.megalite.visible_spans(q, 6, True, -1, None)
    torch.library.opcheck(torch.ops.megalite.visible_spans.default, (q, 6, True, -1, None))
    torch.library.opcheck(torch.ops.megalite.attention.default, (q, k, v, low, high, 0.3, 0.0))
    hidden, weight = (random(n, 8, seed=n).requires_grad_() for n in (6, 9))
    for z_weight in (0.5, None):
        options = (torch.arange(6), z_weight, 0.0, -100, True, True, "native")
        torch.library.opcheck(torch.ops.megalite.linear_cross_entropy.default, (hidden, weight, *options))


def test_fake_tensors_of_fp8_have_no_memory_to_point_at() -> None:
    with FakeTensorMode():
        x, weight = torch.empty(32, 48), torch.empty(16, 48)
        a, b = (quantize_fp8(of, recipe="tensorwise") for of in (x, weight))
        y = scaled_mm(a[0], a[1], b[0], b[1], recipe_a="tensorwise", recipe_b="tensorwise", out_dtype=torch.float32)
        assert y.shape == (32, 16)


def test_fake_tensors_see_every_op() -> None:
    with FakeTensorMode():
        x, weight, cos = (torch.empty(*s, requires_grad=True) for s in ((2, 12, 32), (32, 32), (12, 16)))
        y = block(x, weight, cos.detach())
        nll_sum, _ = kernels.linear_cross_entropy(y.flatten(0, 1), weight, torch.zeros(24, dtype=torch.int64))
        nll_sum.backward()
        assert x.grad is not None and x.grad.shape == x.shape
