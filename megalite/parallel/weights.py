"""Weights under ZeRO 1 and 2: each rank updates its part of a bucket, then all parts are gathered in place.

The gather overlaps the next forward pass: a module waits just before it runs, for its own parameters and for those of
the plain modules in it, whose weights it may read itself. Whoever reads weights otherwise calls `wait` first.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from megalite.comm import Communicator, Handle
from megalite.parallel.buckets import Bucket
from megalite.parallel.data import Piece


class ShardedWeights:
    """Makes the parameters of sharded `buckets` views of one flat buffer each, in their own dtype."""

    def __init__(self, chunks: Sequence[nn.Module], buckets: Sequence[Bucket], comm: Communicator) -> None:
        self.comm = comm
        self._flat: dict[Bucket, torch.Tensor] = {}
        self._work: dict[Bucket, Handle] = {}
        holds: dict[nn.Parameter, Bucket] = {}
        for bucket in reversed([bucket for bucket in buckets if bucket.sharded]):
            like = bucket.slots[0].parameter
            flat = self._flat[bucket] = torch.zeros(bucket.size, dtype=like.dtype, device=like.device)
            for slot in bucket.slots:
                view = flat[slot.start : slot.stop].view_as(slot.parameter)
                view.copy_(slot.parameter.detach())
                slot.parameter.data = view
                holds[slot.parameter] = bucket
        for chunk in chunks if holds else ():
            self._guard(chunk, holds)

    def part(self, piece: Piece) -> torch.Tensor:
        """The weights that `piece` updates: flat where sharded, else the parameter."""
        if piece.bucket not in self._flat:
            return piece.slot.parameter
        start = piece.slot.start
        return self._flat[piece.bucket][start + piece.start : start + piece.stop]

    def gather(self) -> None:
        """Start handing every rank's part to its replicas, in the order of the next forward pass."""
        for bucket, flat in self._flat.items():
            own = flat[bucket.low : bucket.high]
            work = self.comm.all_gather_into(flat, own, *bucket.replicas, async_op=True)
            if work is not None:
                self._work[bucket] = work

    def wait(self) -> None:
        """Every weight is as the last step left it."""
        for bucket in list(self._work):
            self._work.pop(bucket).wait()

    def _guard(self, module: nn.Module, holds: dict[nn.Parameter, Bucket]) -> None:
        needs = dict.fromkeys(holds[p] for p in module.parameters(recurse=False) if p in holds)
        for child in _children(module):
            if _compiled(child) or not list(child.children()):  # a hook inside would end up in compiled code
                needs |= dict.fromkeys(holds[p] for p in child.parameters() if p in holds)
            if not _compiled(child):
                self._guard(child, holds)
        if not needs:
            return

        def ready(*_: Any) -> None:
            for bucket in needs if self._work else ():
                work = self._work.pop(bucket, None)
                if work is not None:
                    work.wait()

        module.register_forward_pre_hook(ready)


def _children(module: nn.Module) -> Iterator[nn.Module]:
    """The modules that `module` itself runs; containers are never called."""
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict | nn.Sequential):
            yield from _children(child)
        else:
            yield child


def _compiled(module: nn.Module) -> bool:
    return getattr(module, "_compiled_call_impl", None) is not None
