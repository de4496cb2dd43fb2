"""The one door for communication: every collective of the engine goes through here, over mesh axes by name.

So each call can be counted, timed, faked or checked in one place: attach a recorder and read the stream of `Call`s.
torch's distributed checkpoint, a library, has small ones of its own while it plans who writes what. The differentiable
forms are in `parallel/collectives.py`.
"""

import json
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from megalite.errors import RunError, UserError
from megalite.mesh import AXES, Mesh
from megalite.world import wait_for_rank_zero

# torch 2.13 renamed these two.
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_HERE = (__file__, str(Path(__file__).parent / "parallel" / "collectives.py"), torch.autograd.function.__file__)
_DESCRIPTION_BYTES = 192


class Handle(Protocol):
    """Something under way; its tensors are ready after `wait`."""

    def wait(self) -> Any: ...


@dataclass(frozen=True)
class Call:
    """One collective as this rank saw it. `bytes`: the payload this rank hands in. `group`: the ranks that take part.
    `site`: file and line of the engine that called. `phase`: forward or backward (of autograd)."""

    op: str
    axes: tuple[str, ...]
    dtype: str
    bytes: int
    group: tuple[int, ...] = ()
    site: str = ""
    phase: str = "forward"


class Communicator:
    """Collectives over the axes of a mesh. A group of one rank returns at once and records nothing.

    `ordered`: sums are made in rank order (all-to-all, then a sum), so that their bits do not depend on how tensors lie
    in buckets; a library's own reduction gives other bits at another offset. `check`: before every collective the group
    compares what each rank is about to do, and RunError says who differs; slow, for tests and debugging.
    """

    def __init__(
        self, mesh: Mesh, record: Callable[[Call], None] | None = None, *, ordered: bool = False, check: bool = False
    ) -> None:
        self.mesh = mesh
        self.record, self.ordered, self.check = record, ordered, check
        self._waits = 0

    def all_reduce(
        self,
        tensor: torch.Tensor,
        *axes: str,
        op: str = "sum",
        async_op: bool = False,
        places: Sequence[int] | None = None,
    ) -> Handle | None:
        """Reduce in place ("sum" or "max"), over all ranks along `axes` or those at `places` there.

        With `async_op` the caller waits on the handle (None: nothing to do)."""
        group = self._enter(f"all_reduce_{op}", axes, tensor, places)
        if group is None:
            return None
        if self.ordered and op == "sum":
            self._ordered_all_reduce(tensor, group)
            return None
        reduce_op = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[op]
        work = dist.all_reduce(tensor, reduce_op, group, async_op)
        return work if async_op else None

    def all_gather(self, shard: torch.Tensor, *axes: str, dim: int = 0) -> torch.Tensor:
        """The equal shards of all ranks joined along `dim`, in the group's order."""
        ranks = self.mesh.size(*axes)
        if ranks == 1:
            return shard
        whole = shard.new_empty((ranks, *shard.shape))
        self.all_gather_into(whole.view(-1), shard.contiguous().view(-1), *axes)
        return whole.flatten(0, 1) if dim == 0 else torch.cat(whole.unbind(0), dim)

    def all_gather_into(
        self, whole: torch.Tensor, shard: torch.Tensor, *axes: str, async_op: bool = False
    ) -> Handle | None:
        """Fill flat `whole` with every rank's flat `shard`; `shard` may be this rank's own part of `whole`."""
        group = self._enter("all_gather", axes, shard)
        if group is None:
            if whole.data_ptr() != shard.data_ptr():
                whole.copy_(shard)
            return None
        work = _all_gather(whole, shard, group, async_op)
        return work if async_op else None

    def reduce_scatter(self, whole: torch.Tensor, *axes: str, dim: int = 0) -> torch.Tensor:
        """The sum over ranks, of which each keeps its part along `dim` (divisible by the group's size)."""
        ranks = self.mesh.size(*axes)
        if ranks == 1:
            return whole
        parts = whole.contiguous() if dim == 0 else torch.stack(whole.chunk(ranks, dim))
        shape = list(whole.shape)
        shape[dim] //= ranks
        shard = whole.new_empty(shape)
        self.reduce_scatter_into(shard.view(-1), parts.view(-1), *axes)
        return shard

    def reduce_scatter_into(
        self,
        shard: torch.Tensor,
        whole: torch.Tensor,
        *axes: str,
        async_op: bool = False,
        wire: torch.dtype | None = None,
    ) -> Handle | None:
        """Flat `shard` becomes this rank's part of the sum of flat `whole`; `shard` must not lie inside `whole`.

        `wire`: what terms travel in; their sum is made in their own dtype. Between CPUs and with a narrower wire it is
        an all-to-all and a sum: gloo's own takes as long as an all-reduce, which is twice that."""
        sent = whole.to(wire or whole.dtype)
        group = self._enter("reduce_scatter", axes, sent)
        if group is None:
            shard.copy_(whole)
            return None
        if sent.dtype == whole.dtype and whole.device.type != "cpu" and not self.ordered:
            work = _reduce_scatter(shard, whole, dist.ReduceOp.SUM, group, async_op)
            return work if async_op else None
        handle = _OrderedSum(shard, sent, group)
        if async_op:
            return handle
        handle.wait()
        return None

    def add_in_order(
        self, total: torch.Tensor, whole: torch.Tensor, *axes: str, wire: torch.dtype | None = None
    ) -> None:
        """Add every rank's flat `whole` onto flat `total`, this rank's part of the sum, one after another in rank
        order: however many ranks share out a row of terms, the sum has the same bits. `wire`: what terms are rounded
        to, also where they need not travel."""
        whole = whole.to(wire or whole.dtype)
        group = self._enter("add_in_order", axes, whole)
        parts = [whole] if group is None else self._exchanged(whole, group)
        for part in parts:
            total += part

    def all_to_all(
        self, tensor: torch.Tensor, *axes: str, send: list[int] | None = None, receive: list[int] | None = None
    ) -> torch.Tensor:
        """Rows for every rank in turn, `send[i]` of them (default: equal parts); returns the rows got from each rank in
        turn, `receive[i]` of them."""
        got, handle = self.start_all_to_all(tensor, *axes, send=send, receive=receive)
        handle.wait()
        return got

    def start_all_to_all(
        self, tensor: torch.Tensor, *axes: str, send: list[int] | None = None, receive: list[int] | None = None
    ) -> tuple[torch.Tensor, Handle]:
        """`all_to_all` under way: what it returns is filled after the wait."""
        group = self._enter("all_to_all", axes, tensor, uneven=send is not None)
        if group is None:
            return tensor, _Batch([], [])
        tensor = tensor.contiguous()
        rows = tensor.shape[0] if receive is None else sum(receive)
        got = tensor.new_empty((rows, *tensor.shape[1:]))
        work = dist.all_to_all_single(got, tensor, receive, send, group, async_op=True)
        assert work is not None
        return got, _Batch([work], [tensor])

    def broadcast(self, tensor: torch.Tensor, *axes: str, source: int = 0) -> None:
        """Copy from the group's rank at place `source`, in place."""
        group = self._enter("broadcast", axes, tensor)
        if group is not None:
            dist.broadcast(tensor, self.mesh.ranks(*axes)[source], group)

    def send(self, tensor: torch.Tensor, axis: str, to: int) -> Handle:
        """Start sending to the rank at place `to` along `axis`; `tensor` must stay as it is until the wait."""
        return self._start([dist.P2POp(dist.isend, *self._peer("send", tensor.contiguous(), axis, to))])

    def receive(self, tensor: torch.Tensor, axis: str, source: int) -> Handle:
        """Start filling contiguous `tensor` from the rank at place `source` along `axis`."""
        return self._start([dist.P2POp(dist.irecv, *self._peer("receive", tensor, axis, source))])

    def rotate(self, tensors: Sequence[torch.Tensor], axis: str) -> tuple[list[torch.Tensor], Handle]:
        """Start handing `tensors` to the next rank around `axis`; returns those of the rank before, ready after the
        wait. One batch, so that no two ranks wait for each other."""
        ranks, place = self.mesh.size(axis), self.mesh.index(axis)
        after, before = (place + 1) % ranks, (place - 1) % ranks
        outgoing = [tensor.contiguous() for tensor in tensors]
        incoming = [torch.empty_like(tensor) for tensor in outgoing]
        batch = [dist.P2POp(dist.isend, *self._peer("send", tensor, axis, after)) for tensor in outgoing]
        batch += [dist.P2POp(dist.irecv, *self._peer("receive", tensor, axis, before)) for tensor in incoming]
        return incoming, self._start(batch, keep=outgoing)

    def broadcast_json(self, value: Any) -> Any:
        """Rank 0's value on every rank; as JSON, which cannot carry code as a pickle can."""
        if self.mesh.world_size == 1:
            return value
        payload = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        length = torch.tensor([payload.numel()])
        self.broadcast(length, *AXES)
        if self.mesh.rank != 0:
            payload = torch.empty(int(length), dtype=torch.uint8)
        self.broadcast(payload, *AXES)
        return json.loads(payload.numpy().tobytes())

    def gather_json(self, value: Any) -> list[Any]:
        """Every rank's value, by rank, on every rank; as JSON."""
        if self.mesh.world_size == 1:
            return [value]
        payload = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = torch.zeros(self.mesh.world_size, dtype=torch.int64)
        lengths[self.mesh.rank] = payload.numel()
        self.all_reduce(lengths, *AXES, op="max")
        padded = torch.zeros(self.mesh.world_size, int(lengths.max()), dtype=torch.uint8)
        padded[self.mesh.rank, : payload.numel()] = payload
        self.all_reduce(padded, *AXES, op="max")
        return [json.loads(row[:n].numpy().tobytes()) for row, n in zip(padded, lengths.tolist(), strict=True)]

    def on_rank_zero(self, work: Callable[[], Any]) -> Any:
        """Run `work` on rank 0 and hand its (JSON) result to all; its failure is raised on every rank.

        The others wait at the store, not inside a collective: such work (building data) may outlast a group's timeout.
        """
        outcome: dict[str, Any] = {}
        self._waits += 1
        if self.mesh.rank == 0:
            try:
                outcome = {"result": work()}
            except UserError as error:
                outcome = {"error": list(error.lines), "code": error.exit_code}
            except Exception as error:
                traceback.print_exc()
                outcome = {"error": [f"rank 0 failed: {type(error).__name__}: {error}"], "code": RunError.exit_code}
        if self.mesh.world_size > 1:
            wait_for_rank_zero(f"work{self._waits}", self.mesh.rank)
        outcome = self.broadcast_json(outcome)
        if "error" in outcome:
            kind = RunError if outcome["code"] == RunError.exit_code else UserError
            failure = kind(*outcome["error"])
            failure.on_every_rank = True
            raise failure
        return outcome["result"]

    def _enter(
        self,
        op: str,
        axes: tuple[str, ...],
        tensor: torch.Tensor,
        places: Sequence[int] | None = None,
        uneven: bool = False,
    ) -> dist.ProcessGroup | None:
        """The group of a collective about to run, after telling the recorder and, when asked, comparing the ranks.
        `uneven`: they may hand in unequal numbers of rows."""
        group = self.mesh.group(*axes, places=places)
        if group is not None:
            self._note(op, axes, tensor, tuple(dist.get_process_group_ranks(group)))
            if self.check:
                shape = list(tensor.shape[1:] if uneven else tensor.shape)
                self._compare(f"{op} {str(tensor.dtype).removeprefix('torch.')}{shape}", group)
        return group

    def _peer(
        self, op: str, tensor: torch.Tensor, axis: str, place: int
    ) -> tuple[torch.Tensor, int, dist.ProcessGroup | None]:
        rank, group = self.mesh.ranks(axis)[place], self.mesh.group(axis)
        self._note(op, (axis,), tensor, (self.mesh.rank, rank))
        return tensor, rank, group

    def _note(self, op: str, axes: tuple[str, ...], tensor: torch.Tensor, ranks: tuple[int, ...]) -> None:
        if self.record is not None:
            dtype, size = str(tensor.dtype).removeprefix("torch."), tensor.numel() * tensor.element_size()
            phase = "forward" if torch._C._current_graph_task_id() == -1 else "backward"
            self.record(Call(op, axes, dtype, size, ranks, _site(), phase))

    def _start(self, batch: list[dist.P2POp], keep: Sequence[torch.Tensor] = ()) -> Handle:
        return _Batch(dist.batch_isend_irecv(batch), [*keep, *(op.tensor for op in batch)])

    def _exchanged(self, whole: torch.Tensor, group: dist.ProcessGroup) -> Sequence[torch.Tensor]:
        """Every rank's term of this rank's part of the sum of flat `whole`, in rank order."""
        got = torch.empty_like(whole)
        dist.all_to_all_single(got, whole, group=group)
        return got.chunk(group.size())

    def _ordered_all_reduce(self, tensor: torch.Tensor, group: dist.ProcessGroup) -> None:
        flat = tensor.contiguous().view(-1)
        padded = torch.nn.functional.pad(flat, (0, -flat.numel() % group.size()))
        whole, shard = torch.empty_like(padded), padded.new_empty(padded.numel() // group.size())
        _OrderedSum(shard, padded, group).wait()
        _all_gather(whole, shard, group)
        tensor.copy_(whole[: flat.numel()].view(tensor.shape))

    def _compare(self, what: str, group: dist.ProcessGroup) -> None:
        """RunError naming the ranks of `group` that are not about to do `what` too."""
        text = f"{what} at {_site()}".encode()[:_DESCRIPTION_BYTES].ljust(_DESCRIPTION_BYTES)
        mine = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        everyone = mine.new_empty(group.size() * _DESCRIPTION_BYTES)
        _all_gather(everyone, mine, group)
        rows = [bytes(row.tolist()).decode(errors="replace").strip() for row in everyone.chunk(group.size())]
        if len({row.rpartition(" at ")[0] for row in rows}) > 1:
            ranks = dist.get_process_group_ranks(group)
            raise RunError(
                "ranks of a group call different collectives: "
                + "; ".join(f"rank {rank}: {row}" for rank, row in zip(ranks, rows, strict=True))
            )


class _Batch:
    """Sends and receives under way; holds their tensors until they are done."""

    def __init__(self, works: list[dist.Work], tensors: list[torch.Tensor]) -> None:
        self.works, self.tensors = works, tensors

    def wait(self) -> None:
        for work in self.works:
            work.wait()
        self.works, self.tensors = [], []  # a work holds its tensors too


class _OrderedSum:
    """An all-to-all under way after which `shard` becomes this rank's part of the sum of flat `whole` (divisible),
    added up in rank order."""

    def __init__(self, shard: torch.Tensor, whole: torch.Tensor, group: dist.ProcessGroup) -> None:
        self.shard, self.whole, self.got = shard, whole, torch.empty_like(whole)
        self.work = dist.all_to_all_single(self.got, whole, group=group, async_op=True)

    def wait(self) -> None:
        self.work.wait()
        first, second, *others = self.got.chunk(self.got.numel() // self.shard.numel())
        torch.add(first.to(self.shard.dtype), second, out=self.shard)
        for part in others:
            self.shard += part


def _site() -> str:
    """File and line of the innermost caller outside the door and its differentiable forms."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename in _HERE:
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
