"""embedding: PyTorch's own lookup, except that half precision sums the gradient of a repeated row in float32.

PyTorch adds the gradients of equal tokens one by one in the weight's dtype, where in bf16 256 + 1 is 256: a common
token of a large batch would lose most of its gradient.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megalite_kernels.native import plain
from megalite_kernels.reference import accumulation_dtype


def embedding(tokens: Tensor, weight_VD: Tensor) -> Tensor:
    """Rows of weight[V, D] picked by integers [...] -> [..., D]. Raises IndexError for a token outside 0 … V-1."""
    if weight_VD.dtype == accumulation_dtype(weight_VD.dtype):
        return F.embedding(tokens, weight_VD)
    y: Tensor = _WidelySummed.apply(tokens, weight_VD)
    return y


class _WidelySummed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight_VD: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.vocab, ctx.dtype = weight_VD.shape[0], weight_VD.dtype
        return F.embedding(tokens, weight_VD)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[None, Tensor]:
        (tokens,) = ctx.saved_tensors
        wide = grad_y.to(accumulation_dtype(ctx.dtype))
        if torch.compiler.is_compiling() or not plain(grad_y):
            return None, _summed(wide, tokens, ctx.vocab).to(ctx.dtype)
        # Rows of tokens that do not occur never are in float32: of a large vocabulary that is most of them.
        found, places = tokens.unique(return_inverse=True)
        grad = grad_y.new_zeros(ctx.vocab, grad_y.shape[-1], dtype=ctx.dtype)
        grad[found] = _summed(wide, places, len(found)).to(ctx.dtype)
        return None, grad


def _summed(grad_y: Tensor, tokens: Tensor, vocab: int) -> Tensor:
    """The sum that F.embedding itself uses: as fast as any, and the same bits on every run."""
    grad_VD: Tensor = torch.ops.aten.embedding_dense_backward(grad_y, tokens, vocab, -1, False)
    return grad_VD
