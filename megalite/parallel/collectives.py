"""Collectives with a gradient: each pairs a collective forward with the one that is its transpose backward.

Every function takes this rank's tensor, the communicator and one mesh axis; a group of one rank changes nothing.
What the ranks hold is said with three words: *replicated* (the same values everywhere), *sharded* (parts of one
tensor), *partial* (terms of a sum). A replicated tensor's gradient is replicated, except where a name says otherwise.
"""

from typing import Any

import torch
from torch import Tensor

from megalite.comm import Communicator


class _SumForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Communicator, axis: str) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        comm.all_reduce(total, axis)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None, None


class _SumBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Communicator, axis: str) -> Tensor:
        ctx.comm, ctx.axis = comm, axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        total = grad.clone(memory_format=torch.contiguous_format)
        ctx.comm.all_reduce(total, ctx.axis)
        return total, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Communicator, axis: str, dim: int, partial: bool) -> Tensor:
        ctx.comm, ctx.axis, ctx.dim, ctx.partial = comm, axis, dim, partial
        return comm.all_gather(x, axis, dim=dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.partial:
            return ctx.comm.reduce_scatter(grad, ctx.axis, dim=ctx.dim), None, None, None, None
        return _own_part(grad, ctx.comm, ctx.axis, ctx.dim), None, None, None, None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Communicator, axis: str, dim: int) -> Tensor:
        ctx.comm, ctx.axis, ctx.dim = comm, axis, dim
        return comm.reduce_scatter(x, axis, dim=dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.comm.all_gather(grad, ctx.axis, dim=ctx.dim), None, None, None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Communicator, axis: str, dim: int) -> Tensor:
        ctx.comm, ctx.axis, ctx.dim = comm, axis, dim
        return _own_part(x, comm, axis, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.comm.all_gather(grad, ctx.axis, dim=ctx.dim), None, None, None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, comm: Communicator, axis: str, send: list[int] | None, receive: list[int] | None
    ) -> Tensor:
        ctx.comm, ctx.axis, ctx.send, ctx.receive = comm, axis, send, receive
        return comm.all_to_all(x, axis, send=send, receive=receive)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        back = ctx.comm.all_to_all(grad.contiguous(), ctx.axis, send=ctx.receive, receive=ctx.send)
        return back, None, None, None, None


def _own_part(x: Tensor, comm: Communicator, axis: str, dim: int) -> Tensor:
    return x.chunk(comm.mesh.size(axis), dim)[comm.mesh.index(axis)].contiguous()


def _apply(function: type[torch.autograd.Function], x: Tensor, comm: Communicator, axis: str, *rest: Any) -> Tensor:
    if comm.mesh.size(axis) == 1:
        return x
    result: Tensor = function.apply(x, comm, axis, *rest)
    return result


def sum_forward(x: Tensor, comm: Communicator, axis: str) -> Tensor:
    """Partial to replicated. Backward hands the replicated gradient through."""
    return _apply(_SumForward, x, comm, axis)


def sum_backward(x: Tensor, comm: Communicator, axis: str) -> Tensor:
    """A replicated tensor as it is, for ranks that each use it for a part of the work: its partial gradients are
    summed."""
    return _apply(_SumBackward, x, comm, axis)


def gather(x: Tensor, comm: Communicator, axis: str, dim: int = 0) -> Tensor:
    """Sharded to replicated, joined along `dim`. Backward keeps this rank's part of the replicated gradient."""
    return _apply(_Gather, x, comm, axis, dim, False)


def gather_for_parts(x: Tensor, comm: Communicator, axis: str, dim: int = 0) -> Tensor:
    """Sharded to replicated, for ranks that each use it for a part of the work: backward sums the partial gradients and
    keeps this rank's part (reduce-scatter)."""
    return _apply(_Gather, x, comm, axis, dim, True)


def scatter_sum(x: Tensor, comm: Communicator, axis: str, dim: int = 0) -> Tensor:
    """Partial to sharded along `dim` (reduce-scatter). Backward gathers."""
    return _apply(_ScatterSum, x, comm, axis, dim)


def split(x: Tensor, comm: Communicator, axis: str, dim: int = 0) -> Tensor:
    """Replicated to sharded along `dim`: this rank's part. Backward gathers the parts' gradients."""
    return _apply(_Split, x, comm, axis, dim)


def exchange(
    x: Tensor, comm: Communicator, axis: str, send: list[int] | None = None, receive: list[int] | None = None
) -> Tensor:
    """All-to-all of rows (see `Communicator.all_to_all`). Backward sends each gradient back where its row came from."""
    return _apply(_Exchange, x, comm, axis, send, receive)
