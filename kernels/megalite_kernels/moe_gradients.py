"""How the ops of a mixture of experts are differentiated, and what shapes they give: the same for all who compute them.

An implementation names its ops here; their gradients are ops of its own again.
"""

from typing import Any

import torch
from torch import Tensor

from megalite_kernels.reference.moe import sorted_rows


def there_and_back(permute: Any, unpermute: Any, unpermute_backward: Any) -> None:
    """Ops (x, indices, experts, pad_to[, rows]) -> (rows, offsets, inverse), (y, inverse, probs) -> out and
    (grad, inverse, rows, probs, y) -> (grad of y, grad of probs, empty without): the first two each undo the other."""

    @permute.register_fake
    def _(
        x_ND: Tensor, indices_NK: Tensor, experts: int, pad_to: int, rows: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = sorted_rows(indices_NK.numel() if rows is None else rows, experts, pad_to)
        offsets = indices_NK.new_empty(experts + 1, dtype=torch.int32)
        return x_ND.new_empty((rows, x_ND.shape[1])), offsets, offsets.new_empty(indices_NK.shape)

    @unpermute.register_fake
    def _(y_MD: Tensor, inverse_NK: Tensor, probs_NK: Tensor | None) -> Tensor:
        return y_MD.new_empty((inverse_NK.shape[0], y_MD.shape[1]))

    @unpermute_backward.register_fake
    def _(
        grad_ND: Tensor, inverse_NK: Tensor, rows: int, probs_NK: Tensor | None, y_MD: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        grad_probs = grad_ND.new_empty(0) if probs_NK is None else torch.empty_like(probs_NK)
        return grad_ND.new_empty((rows, grad_ND.shape[1])), grad_probs

    def save_permute(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.sizes = len(inputs) - 2  # which have no gradient
        ctx.save_for_backward(output[2])

    def differentiate_permute(ctx: Any, grad_sorted: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        return unpermute(grad_sorted, ctx.saved_tensors[0], None), None, *(None for _ in range(ctx.sizes))

    def save_unpermute(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        y, inverse, probs = inputs
        ctx.rows = len(y)
        ctx.save_for_backward(inverse, probs, None if probs is None else y)

    def differentiate_unpermute(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inverse, probs, y = ctx.saved_tensors
        grad_y, grad_probs = unpermute_backward(grad, inverse, ctx.rows, probs, y)
        return grad_y, None, None if probs is None else grad_probs

    permute.register_autograd(differentiate_permute, setup_context=save_permute)
    unpermute.register_autograd(differentiate_unpermute, setup_context=save_unpermute)


def products(rows: Any, weights: Any, sums: Any) -> None:
    """Ops (x, w, offsets, bias, *more) -> y, (x, grad, offsets, like w, *more) -> grad of w and
    (grad, offsets, dtype) -> grad of bias. What is `more` is the implementation's, not differentiated."""

    @rows.register_fake
    def _(x_MD: Tensor, w_EDF: Tensor, offsets: Tensor, bias_EF: Tensor | None, *more: Any) -> Tensor:
        return x_MD.new_empty((x_MD.shape[0], w_EDF.shape[2]))

    @weights.register_fake
    def _(x_MD: Tensor, grad_MF: Tensor, offsets: Tensor, like_EDF: Tensor, *more: Any) -> Tensor:
        return torch.empty_like(like_EDF)

    @sums.register_fake
    def _(grad_MF: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
        return grad_MF.new_empty((offsets.shape[0] - 1, grad_MF.shape[1]), dtype=dtype)

    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, bias = inputs[:4]
        ctx.save_for_backward(*tensors)
        ctx.bias_dtype, ctx.more = None if bias is None else bias.dtype, inputs[4:]

    def differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w, offsets = ctx.saved_tensors
        need_x, need_w, _, need_bias = ctx.needs_input_grad[:4]
        grad_x = rows(grad, w.transpose(1, 2), offsets, None, *ctx.more) if need_x else None
        grad_w = weights(x, grad, offsets, w, *ctx.more) if need_w else None
        grad_bias = sums(grad, offsets, ctx.bias_dtype) if need_bias else None
        return grad_x, grad_w, None, grad_bias, *(None for _ in ctx.more)

    rows.register_autograd(differentiate, setup_context=save)
