"""How parameters lie in flat buckets: what is reduced, sharded and gathered together. A layout, without storage.

A bucket holds parameters of the same stages whose gradients are summed over the same ranks. Under ZeRO (Rajbhandari et
al. 2020, arXiv:1910.02054) each replica owns an equal slice of every bucket.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from megalite.mesh import Mesh
from megalite.parallel.parameter import Declaration, Placement, declared_parameters, placement

ALIGN = 64
"""Elements. Every parameter and every slice begins on such a boundary, as in memory of its own: matrix products may
have other bits at another alignment."""


UNSENT = 2**20
"""Elements of a bucket that is summed with nobody: small, for it takes memory from its first gradient on."""


@dataclass(frozen=True, eq=False)
class Slot:
    """A parameter's place: elements `start`..`stop` of its bucket."""

    name: str
    parameter: nn.Parameter
    declared: Declaration
    placed: Placement
    start: int

    @property
    def stop(self) -> int:
        return self.start + self.parameter.numel()


class Bucket:
    """`slots` in the order in which backward reaches them. `chunks`: the stages of this rank that use them.

    `ranks`, `place`: how many replicas share the bucket, and which of them this is; it owns elements `low`..`high` of
    `size`, which is padded so that all slices are equal. `sharded`: it updates nothing else.
    """

    def __init__(self, chunks: tuple[int, ...], slots: list[Slot], mesh: Mesh, zero: int) -> None:
        self.chunks, self.slots = chunks, slots
        first = slots[0].placed
        self.replicas, self.partial, self.tied = first.replicas, first.partial, first.tied
        self.ranks, self.place = mesh.size(*self.replicas), mesh.index(*self.replicas)
        self.sharded = zero > 0 and self.ranks > 1
        self.part = _aligned(-(-slots[-1].stop // self.ranks))
        self.size = self.part * self.ranks
        self.low = self.place * self.part
        self.high = self.low + self.part

    def owned(self) -> list[tuple[Slot, int, int]]:
        """(slot, start, stop) of the bucket's elements that this rank owns, padding left out."""
        cut = [(slot, max(slot.start, self.low), min(slot.stop, self.high)) for slot in self.slots]
        return [(slot, start, stop) for slot, start, stop in cut if start < stop]

    def updated(self) -> list[tuple[Slot, int, int]]:
        """The same of what this rank updates."""
        return self.owned() if self.sharded else [(slot, slot.start, slot.stop) for slot in self.slots]


def make_buckets(chunks: Sequence[nn.Module], mesh: Mesh, elements: float, zero: int) -> list[Bucket]:
    """Every parameter of `chunks` in a bucket of about `elements`, from the last defined to the first: nearly the order
    in which backward finishes them. Kinds that are summed over other ranks have buckets of their own."""
    users: dict[nn.Parameter, tuple[int, ...]] = {}
    for number, chunk in enumerate(chunks):
        for parameter in trained(chunk):
            users[parameter] = (*users.get(parameter, ()), number)
    buckets: list[Bucket] = []
    filling: dict[_Kind, list[Slot]] = {}
    for name, parameter, declared in reversed(list(declared_parameters(chunks))):
        if not parameter.requires_grad:
            continue
        placed = placement(parameter)
        # What all tp ranks hold lies alike on them, or their sums over the replicas could round differently.
        alike = mesh.size("tp") > 1 and "tp" not in declared.shard
        kind = (users[parameter], placed.replicas, placed.partial, placed.tied, alike, parameter.dtype)
        slots = filling.setdefault(kind, [])
        slots.append(Slot(name, parameter, declared, placed, _aligned(slots[-1].stop) if slots else 0))
        sent = placed.partial or placed.tied or mesh.size(*placed.replicas) > 1
        if slots[-1].stop >= (elements if sent else min(elements, UNSENT)):
            buckets.append(Bucket(kind[0], filling.pop(kind), mesh, zero))
    return buckets + [Bucket(kind[0], slots, mesh, zero) for kind, slots in filling.items()]


def trained(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that have a gradient."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


_Kind = tuple[tuple[int, ...], tuple[str, ...], tuple[str, ...], tuple[int, ...], bool, torch.dtype]


def _aligned(elements: int) -> int:
    return -(-elements // ALIGN) * ALIGN
