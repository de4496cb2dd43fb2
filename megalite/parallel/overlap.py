"""Sequence parallelism with the gather hidden behind the product: a part is multiplied while the next one travels.

The parts of the residual stream go round the tp ring (as in arXiv:2305.06942); going back, the sum of the gradient's
terms does. Worth it where a link and the processor work at the same time: benchmarks/scaling.py prints gain or loss.
"""

from collections.abc import Sequence
from typing import Any

import torch
from megalite_kernels import linear, weight_gradient
from torch import Tensor, nn

from megalite.comm import Communicator
from megalite.parallel.deferred import DeferredWeights


def gathered_products(
    x: Tensor, weights: Sequence[nn.Parameter], biases: Sequence[Tensor | None], comm: Communicator,
    deferred: DeferredWeights | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """For each weight [O, E]: all tokens [N, E] times its transpose plus its bias, where this rank holds x [N / tp, E].

    Backward gives this rank's tokens their gradient, summed over tp. Communicates over tp, a ring of sends.
    """
    result: tuple[Tensor, ...] = _Gathered.apply(x, comm, deferred, len(weights), *weights, *biases)
    return result


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        comm: Communicator,
        deferred: DeferredWeights | None,
        count: int,
        *parameters: Tensor | None,
    ) -> tuple[Tensor, ...]:
        weights, biases = parameters[:count], parameters[count:]
        ranks, place, rows = comm.mesh.size("tp"), comm.mesh.index("tp"), x.shape[0]
        whole = x.new_empty((ranks * rows, x.shape[1]))
        outputs = [x.new_empty((ranks * rows, w.shape[0])) for w in weights if w is not None]
        held = x.contiguous()
        for step in range(ranks):
            source = (place - step) % ranks
            part = slice(source * rows, (source + 1) * rows)
            coming, handle = comm.rotate([held], "tp") if step < ranks - 1 else ([held], None)
            whole[part] = held
            for output, weight, bias in zip(outputs, weights, biases, strict=True):
                assert weight is not None
                output[part] = linear(held, weight, bias)
            if handle is not None:
                handle.wait()
            held = coming[0]
        ctx.save_for_backward(whole, *(weight for weight in weights if weight is not None))
        ctx.comm, ctx.deferred, ctx.parameters, ctx.count = comm, deferred, weights, count
        ctx.has_bias = [bias is not None for bias in biases]
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        whole, *weights = ctx.saved_tensors
        comm, ranks, place = ctx.comm, ctx.comm.mesh.size("tp"), ctx.comm.mesh.index("tp")
        rows = whole.shape[0] // ranks
        grad_x = whole.new_empty(0)
        for step in range(ranks):  # the sum for the rank before the last that gets it, first; our own, last
            target = (place - step - 1) % ranks
            part = slice(target * rows, (target + 1) * rows)
            coming, handle = comm.rotate([grad_x], "tp") if step > 0 else ([], None)
            terms = [linear(grad[part], weight.mT) for grad, weight in zip(grads, weights, strict=True)]
            if handle is not None:
                handle.wait()
            grad_x = sum([*coming, *terms[1:]], start=terms[0])
        grad_weights: list[Tensor | None] = []
        for parameter, grad in zip(ctx.parameters, grads, strict=True):
            if ctx.deferred is None or ctx.deferred.waiting is None:
                grad_weights.append(weight_gradient(whole, grad, parameter.dtype))
            else:
                ctx.deferred.keep(parameter, whole, grad)
                grad_weights.append(None)
        grad_biases = [grad.sum(0) if has else None for grad, has in zip(grads, ctx.has_bias, strict=True)]
        return grad_x, None, None, None, *grad_weights, *grad_biases
