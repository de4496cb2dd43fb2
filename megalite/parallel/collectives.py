"""Collectives with a gradient: each pairs a collective forward with the one that is its transpose backward.

Every function takes this rank's tensor, the communicator and a mesh axis, or several; a group of one rank changes
nothing.
What the ranks hold is said with three words: *replicated* (the same values everywhere), *sharded* (parts of one
tensor), *partial* (terms of a sum). A replicated tensor's gradient is replicated, except where a name says otherwise.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megalite.comm import Communicator, Handle

Axes = str | tuple[str, ...]


class _SumForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Communicator, axis: Axes) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        comm.all_reduce(total, *_axes(axis))
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None, None


class _SumBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Communicator, axis: Axes) -> Tensor:
        ctx.comm, ctx.axis = comm, axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        total = grad.clone(memory_format=torch.contiguous_format)
        ctx.comm.all_reduce(total, *_axes(ctx.axis))
        return total, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Communicator, axis: Axes, dim: int, partial: bool) -> Tensor:
        ctx.comm, ctx.axis, ctx.dim, ctx.partial = comm, axis, dim, partial
        return comm.all_gather(x, *_axes(axis), dim=dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.partial:
            return ctx.comm.reduce_scatter(grad, *_axes(ctx.axis), dim=ctx.dim), None, None, None, None
        return _own_part(grad, ctx.comm, ctx.axis, ctx.dim), None, None, None, None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Communicator, axis: Axes, dim: int) -> Tensor:
        ctx.comm, ctx.axis, ctx.dim = comm, axis, dim
        return comm.reduce_scatter(x, *_axes(axis), dim=dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.comm.all_gather(grad, *_axes(ctx.axis), dim=ctx.dim), None, None, None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Communicator, axis: Axes, dim: int) -> Tensor:
        ctx.comm, ctx.axis, ctx.dim = comm, axis, dim
        return _own_part(x, comm, axis, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.comm.all_gather(grad, *_axes(ctx.axis), dim=ctx.dim), None, None, None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, comm: Communicator, axis: Axes, send: list[int] | None, receive: list[int] | None
    ) -> Tensor:
        ctx.comm, ctx.axis, ctx.send, ctx.receive = comm, axis, send, receive
        return comm.all_to_all(x, *_axes(axis), send=send, receive=receive)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        back = ctx.comm.all_to_all(grad.contiguous(), *_axes(ctx.axis), send=ctx.receive, receive=ctx.send)
        return back, None, None, None, None


def _axes(axis: Axes) -> tuple[str, ...]:
    return (axis,) if isinstance(axis, str) else axis


def _own_part(x: Tensor, comm: Communicator, axis: Axes, dim: int) -> Tensor:
    return x.chunk(comm.mesh.size(*_axes(axis)), dim)[comm.mesh.index(*_axes(axis))].contiguous()


def _apply(function: type[torch.autograd.Function], x: Tensor, comm: Communicator, axis: Axes, *rest: Any) -> Tensor:
    if comm.mesh.size(*_axes(axis)) == 1:
        return x
    result: Tensor = function.apply(x, comm, axis, *rest)
    return result


def sum_forward(x: Tensor, comm: Communicator, axis: Axes) -> Tensor:
    """Partial to replicated. Backward hands the replicated gradient through."""
    return _apply(_SumForward, x, comm, axis)


def sum_backward(x: Tensor, comm: Communicator, axis: Axes) -> Tensor:
    """A replicated tensor as it is, for ranks that each use it for a part of the work: its partial gradients are
    summed."""
    return _apply(_SumBackward, x, comm, axis)


def gather(x: Tensor, comm: Communicator, axis: Axes, dim: int = 0) -> Tensor:
    """Sharded to replicated, joined along `dim`. Backward keeps this rank's part of the replicated gradient."""
    return _apply(_Gather, x, comm, axis, dim, False)


def gather_for_parts(x: Tensor, comm: Communicator, axis: Axes, dim: int = 0) -> Tensor:
    """Sharded to replicated, for ranks that each use it for a part of the work: backward sums the partial gradients and
    keeps this rank's part (reduce-scatter)."""
    return _apply(_Gather, x, comm, axis, dim, True)


def scatter_sum(x: Tensor, comm: Communicator, axis: Axes, dim: int = 0) -> Tensor:
    """Partial to sharded along `dim` (reduce-scatter). Backward gathers."""
    return _apply(_ScatterSum, x, comm, axis, dim)


def split(x: Tensor, comm: Communicator, axis: Axes, dim: int = 0) -> Tensor:
    """Replicated to sharded along `dim`: this rank's part. Backward gathers the parts' gradients."""
    return _apply(_Split, x, comm, axis, dim)


def exchange(
    x: Tensor, comm: Communicator, axis: Axes, send: list[int] | None = None, receive: list[int] | None = None
) -> Tensor:
    """All-to-all of rows (see `Communicator.all_to_all`). Backward sends each gradient back where its row came from."""
    return _apply(_Exchange, x, comm, axis, send, receive)


class Flight:
    """An all-to-all of rows with work between its start and its end, both ways: see `begin_exchange`."""

    handle: Handle | None = None
    back: Tensor | None = None


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, comm: Communicator, axes: Axes, send: list[int], receive: list[int], flight: Flight
    ) -> Tensor:
        ctx.flight = flight
        got, flight.handle = comm.start_all_to_all(x, *_axes(axes), send=send, receive=receive)
        return got

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        flight = ctx.flight
        flight.handle.wait()
        back, flight.back, flight.handle = flight.back, None, None
        return back, None, None, None, None, None


class _End(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, got: Tensor, comm: Communicator, axes: Axes, send: list[int], receive: list[int], flight: Flight
    ) -> Tensor:
        ctx.comm, ctx.axes, ctx.send, ctx.receive, ctx.flight = comm, axes, send, receive, flight
        assert flight.handle is not None
        flight.handle.wait()
        flight.handle = None
        return got.view_as(got)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        started = ctx.comm.start_all_to_all(grad, *_axes(ctx.axes), send=ctx.receive, receive=ctx.send)
        ctx.flight.back, ctx.flight.handle = started
        return grad, None, None, None, None, None  # what matters is under way


def begin_exchange(
    x: Tensor, comm: Communicator, axis: Axes, send: list[int], receive: list[int]
) -> tuple[Tensor, Callable[[], Tensor]]:
    """`exchange`, started: (a tensor that is not filled yet, a function that waits and gives it filled). What is
    computed in between travels beside it; in backward too, where the gradient's own journey starts at the end."""
    if comm.mesh.size(*_axes(axis)) == 1:
        return x, lambda: x
    flight = Flight()
    got: Tensor = _Begin.apply(x, comm, axis, send, receive, flight)
    return got, lambda: _End.apply(got, comm, axis, send, receive, flight)
