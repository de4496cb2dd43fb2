"""Collectives with a gradient: each pairs a collective forward with the one that is its transpose backward.

Every function takes this rank's tensor, the communicator and a mesh axis, or several; a group of one rank changes
nothing, but for what `fp8` rounds. `fp8`: rows [R, D] travel as `fp8_rows` packs them, one way of the two.
What the ranks hold is said with three words: *replicated* (the same values everywhere), *sharded* (parts of one
tensor), *partial* (terms of a sum). A replicated tensor's gradient is replicated, except where a name says otherwise.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megalite.comm import Communicator, Handle
from megalite.parallel.fp8_rows import pack, rounded, unpack

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
    def forward(
        ctx: Any, x: Tensor, comm: Communicator, axis: Axes, dim: int, partial: bool, fp8: bool = False
    ) -> Tensor:
        ctx.comm, ctx.axis, ctx.dim, ctx.partial = comm, axis, dim, partial
        return _moved(x, lambda x: comm.all_gather(x, *_axes(axis), dim=dim), fp8)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.partial:
            return ctx.comm.reduce_scatter(grad, *_axes(ctx.axis), dim=ctx.dim), None, None, None, None, None
        return _own_part(grad, ctx.comm, ctx.axis, ctx.dim), None, None, None, None, None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Communicator, axis: Axes, dim: int, fp8: bool) -> Tensor:
        ctx.comm, ctx.axis, ctx.dim, ctx.fp8 = comm, axis, dim, fp8
        return comm.reduce_scatter(x, *_axes(axis), dim=dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        back = _moved(grad, lambda x: ctx.comm.all_gather(x, *_axes(ctx.axis), dim=ctx.dim), ctx.fp8)
        return back, None, None, None, None


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
        ctx: Any,
        x: Tensor,
        comm: Communicator,
        axis: Axes,
        send: list[int] | None,
        receive: list[int] | None,
        fp8: bool,
    ) -> Tensor:
        ctx.comm, ctx.axis, ctx.send, ctx.receive, ctx.fp8 = comm, axis, send, receive, fp8
        return comm.all_to_all(x, *_axes(axis), send=send, receive=receive)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        def move(x: Tensor) -> Tensor:
            return ctx.comm.all_to_all(x, *_axes(ctx.axis), send=ctx.receive, receive=ctx.send)

        return _moved(grad.contiguous(), move, ctx.fp8), None, None, None, None, None


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, there: bool, back: bool) -> Tensor:
        ctx.back = back
        return rounded(x) if there else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return rounded(grad) if ctx.back else grad, None, None


def _moved(x: Tensor, move: Callable[[Tensor], Tensor], fp8: bool) -> Tensor:
    return unpack(move(pack(x)), x.shape[1], x.dtype) if fp8 else move(x)


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


def gather_for_parts(x: Tensor, comm: Communicator, axis: Axes, dim: int = 0, fp8: bool = False) -> Tensor:
    """Sharded to replicated, for ranks that each use it for a part of the work: backward sums the partial gradients and
    keeps this rank's part (reduce-scatter). `fp8`: there."""
    return _apply(_Gather, x, comm, axis, dim, True, fp8)


def scatter_sum(x: Tensor, comm: Communicator, axis: Axes, dim: int = 0, fp8: bool = False) -> Tensor:
    """Partial to sharded along `dim` (reduce-scatter). Backward gathers. `fp8`: back."""
    return _apply(_ScatterSum, x, comm, axis, dim, fp8)


def rounded_as_sent(x: Tensor, there: bool = False, back: bool = False) -> Tensor:
    """x, and its gradient, as they arrive when rows travel in FP8, where they need not travel."""
    result: Tensor = _Rounded.apply(x, there, back)
    return result


def split(x: Tensor, comm: Communicator, axis: Axes, dim: int = 0) -> Tensor:
    """Replicated to sharded along `dim`: this rank's part. Backward gathers the parts' gradients."""
    return _apply(_Split, x, comm, axis, dim)


def exchange(
    x: Tensor, comm: Communicator, axis: Axes, send: list[int] | None = None, receive: list[int] | None = None,
    fp8: bool = False,
) -> Tensor:  # fmt: skip
    """All-to-all of rows (see `Communicator.all_to_all`). Backward sends each gradient back where its row came from.
    `fp8`: back."""
    return _apply(_Exchange, x, comm, axis, send, receive, fp8)


class Flight:
    """An all-to-all of rows with work between its start and its end, both ways: see `begin_exchange`."""

    handle: Handle | None = None
    back: Tensor | None = None
    packed: Tensor | None = None


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, comm: Communicator, axes: Axes, send: list[int], receive: list[int], flight: Flight,
        fp8: bool,
    ) -> Tensor:  # fmt: skip
        ctx.flight = flight
        sent = pack(x) if fp8 else x
        got, flight.handle = comm.start_all_to_all(sent, *_axes(axes), send=send, receive=receive)
        if not fp8:
            return got
        flight.packed = got
        return x.new_empty(1, 1).expand(len(got), x.shape[1])  # what has the shape, and no memory

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        flight = ctx.flight
        flight.handle.wait()
        back, flight.back, flight.handle = flight.back, None, None
        return back, None, None, None, None, None, None


class _End(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, got: Tensor, comm: Communicator, axes: Axes, send: list[int], receive: list[int], flight: Flight
    ) -> Tensor:
        ctx.comm, ctx.axes, ctx.send, ctx.receive, ctx.flight = comm, axes, send, receive, flight
        assert flight.handle is not None
        flight.handle.wait()
        flight.handle = None
        if flight.packed is None:
            return got.view_as(got)
        packed, flight.packed = flight.packed, None
        return unpack(packed, got.shape[1], got.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        started = ctx.comm.start_all_to_all(grad, *_axes(ctx.axes), send=ctx.receive, receive=ctx.send)
        ctx.flight.back, ctx.flight.handle = started
        return grad, None, None, None, None, None  # what matters is under way


def begin_exchange(
    x: Tensor, comm: Communicator, axis: Axes, send: list[int], receive: list[int], fp8: bool = False
) -> tuple[Tensor, Callable[[], Tensor]]:
    """`exchange`, started: (a tensor that is not filled yet, a function that waits and gives it filled). What is
    computed in between travels beside it; in backward too, where the gradient's own journey starts at the end.
    `fp8`: there."""
    if comm.mesh.size(*_axes(axis)) == 1:
        return x, lambda: x
    flight = Flight()
    got: Tensor = _Begin.apply(x, comm, axis, send, receive, flight, fp8)
    return got, lambda: _End.apply(got, comm, axis, send, receive, flight)
