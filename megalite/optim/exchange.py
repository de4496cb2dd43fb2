"""Logical matrices orthogonalised whole, though tp and ZeRO spread them: gathered at one rank each, handed back."""

from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from megalite.comm import Communicator
from megalite.parallel.boxes import Box, boxes
from megalite.parallel.buckets import Slot
from megalite.parallel.data import Piece

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Quintic Newton-Schulz iteration chosen for its slope at zero (kellerjordan.github.io/posts/muon)."""


def orthogonalize(matrix: Tensor, iterations: int = 5) -> Tensor:
    """Nearest semi-orthogonal matrix [rows, columns], roughly: singular values end at about 0.7..1.2."""
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.mT if tall else matrix
    x = x / (torch.linalg.vector_norm(x) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def share_out(shapes: Sequence[Sequence[int]], ranks: int) -> list[int]:
    """Which rank orthogonalises each matrix: the costliest first, each to the rank with least to do so far."""
    costs = [min(shape) ** 2 * max(shape) for shape in shapes]
    owners, load = [0] * len(shapes), [0] * ranks
    for index in sorted(range(len(shapes)), key=lambda i: (-costs[i], i)):
        owners[index] = load.index(min(load))
        load[owners[index]] += costs[index]
    return owners


class MatrixExchange:
    """For matrices `slots` (in one order everywhere) whose parts the ranks along `axes` hold; `held`: this rank's.

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
        owners = share_out([slot.declared.shape for slot in slots], ranks)
        self.turns = [[m for m, owner in enumerate(owners) if owner == rank] for rank in range(ranks)]
        here = torch.tensor([self._described(slot) for slot in slots], device=self.device)
        table = comm.all_gather(here[None], *axes).tolist()
        owned = [[_cut(row[:4], *row[4:6]) for row in rows] for rows in table]  # [rank][matrix]: boxes of the matrix
        updated = [[_cut(row[:4], *row[6:8]) for row in rows] for rows in table]
        self.send, self.receive = self._counts(owned)
        self.receive_back, self.send_back = self._counts(updated)
        self.filled = [(m, box) for of in owned for m in self.turns[self.me] for box in of[m]]
        self.returned = [(m, box) for of in updated for m in self.turns[self.me] for box in of[m]]

    def orthogonalized(self, momenta: Mapping[Slot, Tensor]) -> dict[Slot, Tensor]:
        """Orthogonalised updates of this rank's pieces, from the momenta of the same pieces."""
        if len(self.turns) == 1:
            return {slot: orthogonalize(momenta[slot].view(slot.declared.shape)) for slot in self.slots}
        order = [self.slots[m] for turn in self.turns for m in turn]
        got = self._swap([self._owned_part(momenta, slot) for slot in order], self.send, self.receive)
        mine = {m: got.new_empty(self.slots[m].declared.shape) for m in self.turns[self.me]}
        for (m, box), values in zip(self.filled, got.split([prod(box[1]) for _, box in self.filled]), strict=True):
            mine[m][_region(box)] = values.view(box[1])
        mine = {m: orthogonalize(matrix) for m, matrix in mine.items()}
        parts = [mine[m][_region(box)].flatten() for m, box in self.returned]
        lengths = [stop - start for start, stop in map(self._updates, order)]
        back = self._swap(parts, self.send_back, self.receive_back).split(lengths)
        return {slot: update for slot, update in zip(order, back, strict=True) if slot in self.held}

    def _swap(self, parts: list[Tensor], send: list[int], receive: list[int]) -> Tensor:
        nothing = torch.empty(0, dtype=self.dtype, device=self.device)
        return self.comm.all_to_all(torch.cat([nothing, *parts]), *self.axes, send=send, receive=receive)

    def _counts(self, held: list[list[list[Box]]]) -> tuple[list[int], list[int]]:
        """Elements from here to every owner, and from every rank to here as an owner."""
        here = [sum(_elements(held[self.me][m]) for m in turn) for turn in self.turns]
        return here, [sum(_elements(of[m]) for m in self.turns[self.me]) for of in held]

    def _described(self, slot: Slot) -> list[int]:
        """This rank's part of a matrix (offsets, shape), and the elements of that part which it owns and updates."""
        assert len(slot.declared.shape) == 2, f"{slot.name}: only matrices can be orthogonalised"
        return [*slot.placed.offsets, *slot.placed.shape, *self._owns(slot), *self._updates(slot)]

    def _updates(self, slot: Slot) -> tuple[int, int]:
        piece = self.held.get(slot)
        return (piece.start, piece.stop) if piece else (0, 0)

    def _owns(self, slot: Slot) -> tuple[int, int]:
        piece, size = self.held.get(slot), slot.parameter.numel()
        if piece is None or piece.bucket.sharded:
            return self._updates(slot)
        return piece.bucket.place * size // piece.bucket.ranks, (piece.bucket.place + 1) * size // piece.bucket.ranks

    def _owned_part(self, momenta: Mapping[Slot, Tensor], slot: Slot) -> Tensor:
        start, stop = self._owns(slot)
        if slot not in self.held:
            return torch.empty(0, dtype=self.dtype, device=self.device)
        origin = self.held[slot].start
        return momenta[slot].view(-1)[start - origin : stop - origin]


def _cut(part: Sequence[int], start: int, stop: int) -> list[Box]:
    """Elements `start`..`stop` of a matrix's `part` (offsets, shape), as boxes of the matrix."""
    return [((part[0] + o[0], part[1] + o[1]), sizes) for o, sizes in boxes(part[2:], start, stop)]


def _region(box: Box) -> tuple[slice, ...]:
    return tuple(slice(offset, offset + size) for offset, size in zip(*box, strict=True))


def _elements(cut: list[Box]) -> int:
    return sum(prod(sizes) for _, sizes in cut)
