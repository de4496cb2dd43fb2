"""Weight gradients put off until after the input gradients: what zero-bubble schedules call W (arXiv:2401.10241)."""

from collections.abc import Callable
from typing import Any

import torch
from megalite_kernels import linear, weight_gradient
from torch import Tensor, nn

from megalite.parallel.data import Gradients

Product = Callable[[Tensor, Tensor, torch.dtype], Tensor]
"""The weight's gradient from a linear's input, its output's gradient and the dtype wanted."""


class DeferredWeights:
    """Of one stage: while `waiting` names a microbatch, its backward keeps (weight, input, output gradient) and how
    they are multiplied, instead of doing so; `compute` does it later. What is `kept` of a microbatch takes about the
    memory that its activations took, which is how the prediction counts it."""

    def __init__(self) -> None:
        self.waiting: int | None = None
        self.kept: dict[int, list[tuple[nn.Parameter, Tensor, Tensor, Product]]] = {}

    def linear(self, x: Tensor, weight_NK: nn.Parameter, bias_N: Tensor | None) -> Tensor:
        """`megalite_kernels.linear` whose weight gradient can wait."""
        y: Tensor = _Deferring.apply(x, weight_NK, bias_N, self)
        return y

    def keep(self, weight: nn.Parameter, x: Tensor, grad_y: Tensor, product: Product = weight_gradient) -> None:
        assert self.waiting is not None
        self.kept.setdefault(self.waiting, []).append((weight, x, grad_y, product))

    @torch.no_grad()
    def compute(self, microbatch: int, gradients: Gradients) -> None:
        """The weight gradients of one microbatch, handed to `gradients` in the order in which backward met them."""
        for weight, x, grad_y, product in self.kept.pop(microbatch, []):
            gradients.add(weight, product(x, grad_y, weight.dtype))


class _Deferring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter, bias: Tensor | None, deferred: DeferredWeights) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.weight, ctx.deferred = weight, deferred
        ctx.bias_dtype = None if bias is None else bias.dtype
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = linear(grad_y, weight.mT)
        if ctx.deferred.waiting is None:
            grad_weight = weight_gradient(x, grad_y, weight.dtype)
        else:
            ctx.deferred.keep(ctx.weight, x, grad_y)
        if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
            grad_bias = grad_y.flatten(0, -2).sum(0, dtype=torch.float64 if grad_y.dtype == torch.float64 else None)
            grad_bias = grad_bias.to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, None
