"""Arithmetic of two dtypes in parts: PyTorch's own bits, in a part of its memory."""

import pytest
import torch
from megalite_kernels import mixed
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Largest(TorchDispatchMode):
    """The most elements that one operation was given inside."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.add_.Tensor, torch.ops.aten.mul.out):
            self.elements = max(self.elements, *(x.numel() for x in args if isinstance(x, Tensor)))
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(mixed, "ELEMENTS", 100)


@pytest.mark.parametrize("shape", [(), (0, 3), (7,), (333,), (33, 10), (5, 333), (7, 6, 31)])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16, torch.float32])
def test_the_bits_of_the_whole(shape, turned, narrow):
    generator = torch.Generator().manual_seed(0)
    into = torch.randn(shape, generator=generator)
    values = torch.randn(shape, generator=generator)
    if turned and len(shape) > 1:
        values = values.transpose(0, -1).contiguous().transpose(0, -1)
    expected = into + values.to(narrow)
    product = (values * torch.tensor(0.3)).to(narrow)
    mixed.accumulate(into, values.to(narrow))
    assert torch.equal(into, expected)
    assert torch.equal(mixed.scaled(values, torch.tensor(0.3), narrow), product)


def test_no_operation_sees_more_than_a_part():
    values = torch.randn(40, 25)
    with Largest() as seen:
        mixed.accumulate(torch.zeros(40, 25), values.bfloat16())
        mixed.scaled(values, torch.tensor(2.0), torch.bfloat16)
    assert seen.elements == 100
