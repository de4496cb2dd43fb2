"""Logical matrices orthogonalised whole, though tp and ZeRO spread them: gathered at one rank each, handed back."""

from collections.abc import Mapping, Sequence
from math import prod

import torch
from megalite_kernels import newton_schulz
from torch import Tensor

from megalite.comm import Communicator
from megalite.parallel.boxes import Box, boxes
from megalite.parallel.buckets import Slot
from megalite.parallel.data import Piece


def share_out(shapes: Sequence[Sequence[int]], ranks: int) -> list[int]:
    """Which rank orthogonalises each matrix: the costliest first, each to the rank with least to do so far."""
    costs = [min(shape) ** 2 * max(shape) for shape in shapes]
    owners, load = [0] * len(shapes), [0] * ranks
    for index in sorted(range(len(shapes)), key=lambda i: (-costs[i], i)):
        owners[index] = load.index(min(load))
        load[owners[index]] += costs[index]
    return owners


class MatrixExchange:
    """For matrices `slots` (in one order everywhere) whose parts the ranks along `axes` hold; `held`: this rank's. A
    slot [experts, rows, columns] is as many matrices as experts.

    Every rank sends what it owns, in `dtype`, to the rank whose turn a matrix is. Replicas that all update a whole part
    (ZeRO 0) own an equal share of it; each gets back what it updates.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        held: Mapping[Slot, Piece],
        comm: Communicator,
        axes: tuple[str, ...],
        dtype: torch.dtype,
    ) -> None:
        self.slots, self.held, self.comm, self.axes, self.dtype = slots, held, comm, axes, dtype
        self.me, ranks = comm.mesh.index(*axes), comm.mesh.size(*axes)
        self.device = slots[0].parameter.device
        self.matrices = [(n, expert) for n, slot in enumerate(slots) for expert in range(_stacked(slot)[0])]
        self.shapes = [_stacked(slots[n])[1:] for n, _ in self.matrices]
        owners = share_out(self.shapes, ranks)
        self.turns = [[m for m, owner in enumerate(owners) if owner == rank] for rank in range(ranks)]
        self.order = [m for turn in self.turns for m in turn]
        here = torch.tensor([self._described(slot) for slot in slots], device=self.device)
        table = comm.all_gather(here[None], *axes).tolist()
        owned = [[_cut(rows[n], expert, *rows[n][6:8]) for n, expert in self.matrices] for rows in table]
        updated = [[_cut(rows[n], expert, *rows[n][8:]) for n, expert in self.matrices] for rows in table]
        self.send, self.receive = self._counts(owned)  # [rank][matrix]: boxes of the matrix
        self.receive_back, self.send_back = self._counts(updated)
        self.filled = [(m, box) for of in owned for m in self.turns[self.me] for box in of[m]]
        self.returned = [(m, box) for of in updated for m in self.turns[self.me] for box in of[m]]
        self.sent = [_span(table[self.me][self.matrices[m][0]], self.matrices[m][1], 6) for m in self.order]
        self.back = [sum(prod(box[1]) for box in updated[self.me][m]) for m in self.order]

    def orthogonalized(self, momenta: Mapping[Slot, Tensor]) -> dict[Slot, Tensor]:
        """Orthogonalised updates of this rank's pieces, from the momenta of the same pieces."""
        if len(self.turns) == 1:
            return {slot: newton_schulz(momenta[slot].view(slot.declared.shape)) for slot in self.slots}
        parts = [self._part(momenta, m, *span) for m, span in zip(self.order, self.sent, strict=True)]
        got = self._swap(parts, self.send, self.receive)
        mine = {m: got.new_empty(self.shapes[m]) for m in self.turns[self.me]}
        for (m, box), values in zip(self.filled, got.split([prod(box[1]) for _, box in self.filled]), strict=True):
            mine[m][_region(box)] = values.view(box[1])
        mine = {m: newton_schulz(matrix) for m, matrix in mine.items()}
        parts = [mine[m][_region(box)].flatten() for m, box in self.returned]
        back = self._swap(parts, self.send_back, self.receive_back).split(self.back)
        by_matrix = dict(zip(self.order, back, strict=True))
        updates: dict[Slot, list[Tensor]] = {slot: [] for slot in self.slots if slot in self.held}
        for m, (n, _) in enumerate(self.matrices):
            if self.slots[n] in updates:
                updates[self.slots[n]].append(by_matrix[m])
        return {slot: torch.cat(found) for slot, found in updates.items()}

    def _swap(self, parts: list[Tensor], send: list[int], receive: list[int]) -> Tensor:
        nothing = torch.empty(0, dtype=self.dtype, device=self.device)
        return self.comm.all_to_all(torch.cat([nothing, *parts]), *self.axes, send=send, receive=receive)

    def _counts(self, held: list[list[list[Box]]]) -> tuple[list[int], list[int]]:
        """Elements from here to every owner, and from every rank to here as an owner."""
        here = [sum(_elements(held[self.me][m]) for m in turn) for turn in self.turns]
        return here, [sum(_elements(of[m]) for m in self.turns[self.me]) for of in held]

    def _described(self, slot: Slot) -> list[int]:
        """This rank's part of a stack of matrices (offsets, shape), and the elements of that part which it owns and
        updates."""
        flat = len(slot.declared.shape) == 2
        offsets, shape = ((0,), (1,)) if flat else ((), ())
        placed = slot.placed
        return [*offsets, *placed.offsets, *shape, *placed.shape, *self._owns(slot), *self._updates(slot)]

    def _updates(self, slot: Slot) -> tuple[int, int]:
        piece = self.held.get(slot)
        return (piece.start, piece.stop) if piece else (0, 0)

    def _owns(self, slot: Slot) -> tuple[int, int]:
        piece, size = self.held.get(slot), slot.parameter.numel()
        if piece is None or piece.bucket.sharded:
            return self._updates(slot)
        return piece.bucket.place * size // piece.bucket.ranks, (piece.bucket.place + 1) * size // piece.bucket.ranks

    def _part(self, momenta: Mapping[Slot, Tensor], m: int, start: int, stop: int) -> Tensor:
        """Elements `start`..`stop` of what this rank holds of a matrix's slot."""
        slot = self.slots[self.matrices[m][0]]
        if slot not in self.held or start == stop:
            return torch.empty(0, dtype=self.dtype, device=self.device)
        origin = self.held[slot].start
        return momenta[slot].view(-1)[start - origin : stop - origin]


def _stacked(slot: Slot) -> tuple[int, int, int]:
    """Logical shape of a slot as a stack of matrices."""
    *experts, rows, columns = slot.declared.shape
    assert len(experts) < 2, f"{slot.name}: only matrices can be orthogonalised"
    return (experts[0] if experts else 1), rows, columns


def _span(row: Sequence[int], expert: int, field: int) -> tuple[int, int]:
    """The elements of a described part, of those at `field`, that belong to one matrix of the stack."""
    here, size = expert - row[0], row[4] * row[5]
    low, high = (min(max(row[field + end], here * size), (here + 1) * size) for end in (0, 1))
    return (low, high) if 0 <= here < row[3] else (0, 0)


def _cut(row: Sequence[int], expert: int, start: int, stop: int) -> list[Box]:
    """Elements `start`..`stop` of a described part, as far as they belong to a matrix of the stack, as its boxes."""
    low, high = _span([*row[:6], start, stop], expert, 6)
    origin = (expert - row[0]) * row[4] * row[5]
    found = boxes(row[4:6], low - origin, high - origin) if low < high else ()
    return [((row[1] + o[0], row[2] + o[1]), sizes) for o, sizes in found]


def _region(box: Box) -> tuple[slice, ...]:
    return tuple(slice(offset, offset + size) for offset, size in zip(*box, strict=True))


def _elements(cut: list[Box]) -> int:
    return sum(prod(sizes) for _, sizes in cut)
