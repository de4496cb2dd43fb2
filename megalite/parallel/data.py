"""Data parallelism and ZeRO 1 and 2: gradients live in flat buckets, accumulate over microbatches, and are summed over
ranks while the backward pass still runs. Gradients are sums; the loss is divided by the global token count before.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakMethod

import torch
from megalite_kernels import accumulate
from torch import nn

from megalite.comm import Communicator, Handle
from megalite.mesh import AXES
from megalite.parallel.buckets import Bucket, Slot, make_buckets, trained

REPLICATED_OVER = ("dp", "cp")
"""Mesh axes whose ranks hold the same parameters but see different tokens."""
IN_FLIGHT = 2
"""Reduce-scatters under way at once, where each holds a whole bucket that is otherwise not kept."""


def unowned(method: Callable[..., None]) -> Callable[..., None]:
    """`method` while its object lives: torch's own hold on a hook would keep that, and its process groups, for ever."""
    reference = WeakMethod(method)

    def call(*arguments: object) -> None:
        found = reference()
        if found is not None:
            found(*arguments)

    return call


@dataclass(frozen=True, eq=False)
class Piece:
    """What this rank updates of one parameter: elements `start`..`stop` in row-major order, and their `gradient`.

    Unless the bucket is sharded that is the whole parameter, and `gradient` has its shape; else both are flat.
    """

    slot: Slot
    bucket: Bucket
    start: int
    stop: int
    gradient: torch.Tensor


class _Buffer:
    """The gradients of a bucket in `dtype`. Between `zero` and the first gradient that arrives `whole` takes no memory,
    which is when activations need most of it; unless it is `lent` to somebody who writes to it unasked.

    `streams`: what arrives is reduced after every microbatch and added onto `shard`, so the whole bucket is there only
    in passing; else it accumulates in `whole` and is reduced once. `wire`: what its terms travel in.
    """

    def __init__(
        self,
        bucket: Bucket,
        dtype: torch.dtype,
        comm: Communicator,
        zero: int,
        wire: torch.dtype | None = None,
        lent: bool = False,
    ) -> None:
        self.bucket, self.comm, self.wire, self.lent = bucket, comm, wire or dtype, lent
        self.streams = bucket.ranks > 1 and (zero == 2 or comm.ordered)
        self._new = lambda n: torch.zeros(n, dtype=dtype, device=bucket.slots[0].parameter.device)
        self.whole = None if self.streams and bucket.sharded else self._new(bucket.size)
        self.apart = self.streams or bucket.sharded or (self.wire != dtype and bucket.ranks > 1)
        if self.whole is None or self.apart:
            self.shard = self.total = self._new(bucket.part)  # total: what the replicas have summed
        else:
            self.shard, self.total = self.whole[bucket.low : bucket.high], self.whole
        self.result = self.shard if self.whole is None or bucket.sharded else self.whole
        self.arriving = None if self.streams else self.whole
        self.missing = self._all()
        self._work: Handle | None = None
        self._sent: torch.Tensor | None = None  # held until it is sent
        self._got: torch.Tensor | None = None

    def _all(self) -> set[nn.Parameter]:
        return {slot.parameter for slot in self.bucket.slots}

    def view(self, slot: Slot) -> torch.Tensor:
        """Where the gradient of a parameter accumulates now."""
        if self.arriving is None:
            self.arriving = self._new(self.bucket.size)
        if self.arriving is self.whole:
            self.hold()
        return self.arriving[slot.start : slot.stop].view_as(slot.parameter)

    def zero(self) -> None:
        self.settle()
        if self.streams:
            self.arriving = None
            self.shard.zero_()
        else:
            assert self.whole is not None
            if self.lent or not self.whole.untyped_storage().resizable():  # a numpy array shares it, say
                self.whole.zero_()
            else:
                self.whole.untyped_storage().resize_(0)
        self.missing = self._all()

    def hold(self) -> None:
        """`whole` has memory, of zeros unless something has arrived."""
        if self.whole is not None and not self.whole.untyped_storage().nbytes():
            self.whole.untyped_storage().resize_(self.whole.nbytes)
            self.whole.zero_()

    def launch(self) -> None:
        """Start the sum over the replicas of what has arrived."""
        self.settle()
        comm, axes = self.comm, self.bucket.replicas
        if not self.streams:
            assert self.whole is not None
            self.hold()
            if self.apart:
                self._work = comm.reduce_scatter_into(self.shard, self.whole, *axes, async_op=True, wire=self.wire)
            else:
                self._work = comm.all_reduce(self.whole, *axes, async_op=True)
            return
        sent = self.arriving if self.arriving is not None else self._new(self.bucket.size)
        self.arriving, self.missing = None, self._all()
        if comm.ordered:
            comm.add_in_order(self.shard, sent, *axes, wire=self.wire)
            return
        self._sent, self._got = sent, torch.empty_like(self.shard)
        self._work = comm.reduce_scatter_into(self._got, sent, *axes, async_op=True, wire=self.wire)

    def settle(self) -> None:
        """Wait for the launch before."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        if self._got is not None:
            self.shard.add_(self._got)
            self._got = self._sent = None

    def finish(self) -> None:
        """Wait, then sum over what is not a replica: axes that hold terms, and stages that hold copies."""
        self.settle()
        self.hold()
        if self.bucket.partial:
            self.comm.all_reduce(self.total, *self.bucket.partial)
        if self.bucket.tied:
            self.comm.all_reduce(self.total, "pp", places=self.bucket.tied)
        if self.apart and not self.bucket.sharded:
            assert self.whole is not None
            self.comm.all_gather_into(self.whole, self.shard, *self.bucket.replicas)

    def gathered(self) -> torch.Tensor:
        """The summed gradients of the whole bucket, on every replica. A collective where it is sharded."""
        if not self.bucket.sharded:
            assert self.whole is not None
            self.hold()
            return self.whole
        whole = self._new(self.bucket.size)
        self.comm.all_gather_into(whole, self.shard, *self.bucket.replicas)
        return whole


class Gradients:
    """All gradients of this rank's stages: zeroed, accumulated, reduced, measured, clipped.

    `chunks`: the stages, one unless the pipeline gives a rank several. `dtype`: of accumulation; `compute`: of the
    model's weights; `communicate`: what terms of a sum over replicas travel in (default: `dtype`, in which they are
    added up in any case). `zero`: 0, 1 or 2; with 1 the replicas share out the sums, with 2 also what accumulates.
    Reduction is over the axes of each parameter's placement. Buckets are launched strictly in order, so every rank
    issues the same collectives whatever its autograd graph does. On an ordered communicator every microbatch is added
    in global order onto the sum, so that no bit depends on dp, on `bucket_bytes` or on `zero`. `slots`: every parameter
    of this rank, in definition order.
    """

    lent = False

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        comm: Communicator,
        dtype: torch.dtype,
        bucket_bytes: float,
        zero: int = 0,
        communicate: torch.dtype | None = None,
    ) -> None:
        assert zero in (0, 1, 2), f"zero {zero} is not ours"
        self.chunks, self.comm, self.dtype = list(chunks), comm, dtype
        self.compute = next(iter(self.chunks[0].parameters())).dtype
        self.streams = zero == 2 or comm.ordered
        self.buckets = make_buckets(chunks, comm.mesh, bucket_bytes / dtype.itemsize, zero)
        self._buffers = [_Buffer(bucket, dtype, comm, zero, communicate, self.lent) for bucket in self.buckets]
        self._slots = {s.parameter: (buffer, s) for buffer in self._buffers for s in buffer.bucket.slots}
        in_order = dict.fromkeys(p for chunk in self.chunks for p in trained(chunk))
        self.slots = [self._slots[parameter][1] for parameter in in_order]
        self._queues: list[list[_Buffer]] = [[] for _ in chunks]
        self._flying: list[_Buffer] = []
        self._chunk: int | None = None  # whose backward runs
        self._counts = self._launches = False
        for parameter in self._slots:
            parameter.register_post_accumulate_grad_hook(unowned(self._arrived))
        self.zero()

    def of(self, parameter: nn.Parameter) -> torch.Tensor:
        """This rank's accumulated gradient of `parameter`: its view into a bucket. ValueError where it is only there in
        passing (ZeRO 2)."""
        buffer, slot = self._slots[parameter]
        if buffer.whole is None:
            raise ValueError(f"{slot.name}: its gradient is sharded; use full()")
        buffer.hold()
        return buffer.whole[slot.start : slot.stop].view_as(parameter)

    def full(self, parameter: nn.Parameter) -> torch.Tensor:
        """The summed gradient of this rank's part of `parameter`; all replicas call it together."""
        buffer, slot = self._slots[parameter]
        return buffer.gathered()[slot.start : slot.stop].view_as(parameter)

    def pieces(self) -> list[Piece]:
        """What this rank updates, in definition order."""
        found = {}
        for buffer in self._buffers:
            bucket = buffer.bucket
            buffer.hold()
            for slot, low, high in bucket.updated():
                origin = bucket.low if bucket.sharded else 0
                gradient = buffer.result[low - origin : high - origin]
                if not bucket.sharded:
                    gradient = gradient.view_as(slot.parameter)
                found[slot] = Piece(slot, bucket, low - slot.start, high - slot.start, gradient)
        return [found[slot] for slot in self.slots if slot in found]

    def kept_bytes(self) -> int:
        """Memory that gradients take once all have arrived; ZeRO 2 has more of it in passing."""
        tensors = [t for b in self._buffers for t in ([b.whole, b.shard] if b.apart else [b.whole]) if t is not None]
        return sum(tensor.nbytes for tensor in tensors)

    def zero(self) -> None:
        for buffer in self._buffers:
            buffer.zero()
        self._flying = []
        self._queues = [[] if self.streams else self._of_chunk(chunk) for chunk in range(len(self.chunks))]

    def _of_chunk(self, chunk: int) -> list[_Buffer]:
        """Buffers to launch with a chunk; one that several chunks fill waits for the end, unless it streams."""
        return [b for b in self._buffers if chunk in b.bucket.chunks and (self.streams or len(b.bucket.chunks) == 1)]

    @contextmanager
    def accumulating(self, chunk: int = 0, last: bool = False, complete: bool = True) -> Iterator[None]:
        """Around one backward of a chunk (or around the weight gradients that were left for later).

        `last`: no parameter of the chunk gets another gradient in this step, so finished buckets are reduced at once.
        `complete` False: weight gradients of this backward follow in a later context, so ZeRO 2 waits for them.
        """
        complete = complete or self.comm.ordered
        self._chunk = chunk
        self._open(chunk)
        self._counts, self._launches = last or self.streams, complete and (last or self.streams)
        try:
            yield
        finally:
            self._chunk, self._counts, self._launches = None, False, False
        if self.streams and complete:
            self.reduce(chunk)

    def add(self, parameter: nn.Parameter, gradient: torch.Tensor) -> None:
        """A gradient that was computed outside of autograd; counts like one that backward brings."""
        buffer, slot = self._slots[parameter]
        self._open(buffer.bucket.chunks[0] if self._chunk is None else self._chunk)
        accumulate(buffer.view(slot), gradient)
        self._count(buffer, parameter)

    def _arrived(self, parameter: nn.Parameter) -> None:
        gradient = parameter.grad
        if gradient is None:
            return  # torch tells also of a gradient that backward leaves out: W brings it later
        parameter.grad = None
        self.add(parameter, gradient)

    def _open(self, chunk: int) -> None:
        if self.streams and not self._queues[chunk]:
            self._queues[chunk] = self._of_chunk(chunk)

    def _count(self, buffer: _Buffer, parameter: nn.Parameter) -> None:
        if self._counts:
            buffer.missing.discard(parameter)
        if self._launches and self._chunk is not None:
            queue = self._queues[self._chunk]
            while queue and not queue[0].missing:
                self._launch(queue.pop(0))

    def _launch(self, buffer: _Buffer) -> None:
        if self.streams:
            while len(self._flying) >= IN_FLIGHT:
                self._flying.pop(0).settle()
            self._flying.append(buffer)
        buffer.launch()

    def reduce(self, chunk: int) -> None:
        """Launch what is left of a chunk, in order (a parameter may have had no gradient)."""
        while self._queues[chunk]:
            self._launch(self._queues[chunk].pop(0))

    def finish(self) -> None:
        """Every gradient is the sum over all ranks when this returns."""
        for chunk in range(len(self.chunks)):
            self.reduce(chunk)
        for buffer in self._buffers:
            if not self.streams and len(buffer.bucket.chunks) > 1:
                self._launch(buffer)
        for buffer in self._buffers:
            buffer.finish()
        self._flying = []

    def global_norm(self) -> torch.Tensor:
        """L2 norm over every logical gradient element of the whole world, each once; a float64 scalar.

        Norms of whole parameters where one replica has them (then buckets change no bit), else of their pieces. Not
        finite where a copy along tp or of a tied weight is not, though one of them is counted: a rank whose copy alone
        is broken must not go on with it.
        """
        norms: dict[Slot, torch.Tensor] = {}
        for buffer in self._buffers:
            slots, values = self._measured(buffer)
            norms.update(zip(slots, torch._foreach_norm(values) if values else (), strict=True))
        squares = torch.zeros((), dtype=torch.float64, device=self._buffers[0].shard.device)
        for counted in (True, False):
            in_order = [norms[slot] for slot in self.slots if slot in norms and slot.placed.counted == counted]
            if in_order:
                squares += torch.stack(in_order).double().square().sum() * float(counted)
        self.comm.all_reduce(squares, *AXES)
        return squares.sqrt()

    def _measured(self, buffer: _Buffer) -> tuple[list[Slot], list[torch.Tensor]]:
        """What this rank has of the norm. In order: whole parameters, in memory of their own, whatever is sharded."""
        bucket, ordered = buffer.bucket, self.comm.ordered
        if bucket.sharded and not ordered:
            owned = bucket.owned()
            pieces = [buffer.shard[low - bucket.low : high - bucket.low] for _, low, high in owned]
            return [slot for slot, _, _ in owned], pieces
        whole = buffer.gathered()
        slots = bucket.slots if bucket.place == 0 else []
        parts = [whole[slot.start : slot.stop] for slot in slots]
        return slots, [part.double() for part in parts] if ordered else parts

    def scale(self, factor: float) -> None:
        for buffer in self._buffers:
            buffer.result.mul_(factor)
