"""Moments kept in fewer bits than they are computed in: in bfloat16, rounded stochastically, or in 8-bit blocks, to
nearest. No bit of them depends on how a layout spreads a tensor.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from megalite_kernels.reference import (
    MOMENT_BLOCK,
    MOMENT_DTYPES,
    dequantize_moment,
    moment_amax,
    quantize_moment,
)
from torch import Tensor

from megalite.comm import Communicator
from megalite.optim.slabs import Slab, grid, slabs
from megalite.optim.stochastic import round_stochastically
from megalite.parallel.buckets import Slot
from megalite.parallel.data import Piece
from megalite.parallel.random import random_bits
from megalite.precision import DTYPES

SCALE = ".scale"
FORMATS = {
    "fp8": {"exp_avg": "e4m3", "exp_avg_sq": "fp16", "momentum_buffer": "e4m3"},
    "int8": {"exp_avg": "dynamic", "exp_avg_sq": "dynamic_unsigned", "momentum_buffer": "dynamic"},
}
"""Formats of `megalite_kernels.reference.quantize_moment`, a moment of a matrix or of experts; vectors (norms, biases),
which are few, keep the dtype they are computed in."""
OVER = ("dp", "cp", "tp")
"""Axes over which ranks may hold parts of the same block."""


@dataclass(frozen=True)
class Chunk:
    """Some rows of a piece."""

    piece: Piece
    slab: Slab
    rows: slice

    def of(self, values: Tensor) -> Tensor:
        """These rows [rows, columns] of a piece's values, live."""
        return self.slab.of(values.view(-1))[self.rows]

    def keep(self, values: Tensor, wide: Tensor, key: str) -> None:
        """Put `wide` rows into a piece's `values`, rounded stochastically where these are bfloat16."""
        if values.dtype == torch.bfloat16:
            index = self.slab.index(self.rows, values.device)
            wide = round_stochastically(wide, random_bits(f"{key}.{self.piece.slot.name}", index))
        self.of(values).copy_(wide)


class Moments:
    """The moments `names` of `pieces`, kept as `states` says (see `Precision.moments`); `slots`: all parameters of the
    rule, of which a rank may hold nothing. `state[piece]` has what a checkpoint keeps, codes and scales by name.

    A block of which several ranks hold parts has the scale of the whole: they agree on its largest value, of all such
    blocks at once, each step.
    """

    def __init__(
        self,
        names: Sequence[str],
        states: str,
        pieces: Sequence[Piece],
        slots: Sequence[Slot],
        comm: Communicator,
        wide: torch.dtype,
        seed: int,
    ) -> None:
        self.pieces, self.comm, self.wide, self.seed = pieces, comm, wide, seed
        self.formats = FORMATS.get(states, dict.fromkeys(names, states))
        self.slabs = {piece: slabs(piece) for piece in pieces}
        self.state = {piece: self._made(piece, names, states) for piece in pieces}
        self.names = names
        self.cut = torch.empty(0, dtype=torch.int64)
        self.places: dict[Slab, list[tuple[int, Tensor]]] = {}
        matrices = [slot for slot in slots if blocked(slot)]
        if states in FORMATS and matrices and comm.mesh.size(*OVER) > 1:
            self._find_cut(matrices)

    def _made(self, piece: Piece, names: Sequence[str], states: str) -> dict[str, Tensor]:
        like, state = piece.gradient, {}
        blocks = sum(slab.rows * slab.blocks for slab in self.slabs[piece])
        for name in names:
            if states not in FORMATS:
                state[name] = torch.zeros_like(like, dtype=DTYPES[states])
            elif not blocked(piece.slot):
                state[name] = torch.zeros_like(like, dtype=self.wide)
            else:
                state[name] = torch.zeros_like(like, dtype=MOMENT_DTYPES[self.formats[name]])
                state[name + SCALE] = like.new_zeros(blocks, dtype=torch.float32)
        return state

    def update(
        self,
        step: int,
        after: Callable[[Tensor, list[Tensor]], Sequence[Tensor]],
        use: Callable[[Chunk, Sequence[Tensor]], None],
    ) -> None:
        """Replace the moments by `after(gradient, moments)`, element by element, and hand them to `use` before they are
        rounded. `step`: what the rounding is drawn from. Communicates where blocks are cut."""
        agreed = self._agreed(after)
        for chunk in self.chunks():
            piece, slab, rows = chunk.piece, chunk.slab, chunk.rows
            state = self.state[piece]
            old = [self._wide(name, state, slab, rows, slice(None), slice(None)) for name in self.names]
            new = after(chunk.of(piece.gradient).to(self.wide), old)
            use(chunk, new)
            for place, (name, values) in enumerate(zip(self.names, new, strict=True)):
                if name + SCALE not in state:
                    chunk.keep(state[name], values, f"{self.seed}/{step}/{name}")
                    continue
                amax = moment_amax(values, slab.skip)
                for block, where in self.places.get(slab, ()):
                    amax[:, block] = agreed[place, where[rows]]
                codes, scales = quantize_moment(values, amax, self.formats[name], slab.skip)
                chunk.of(state[name]).copy_(codes)
                slab.of_scales(state[name + SCALE])[rows] = scales

    def chunks(self) -> Iterator[Chunk]:
        """All elements of the pieces."""
        return (
            Chunk(piece, slab, rows) for piece in self.pieces for slab in self.slabs[piece] for rows in slab.chunks()
        )

    def _wide(
        self, name: str, state: dict[str, Tensor], slab: Slab, rows: slice, columns: slice, blocks: slice
    ) -> Tensor:
        """Some rows and columns of a moment, in the dtype it is computed in; `blocks`: those columns'."""
        codes = slab.of(state[name].view(-1))[rows, columns]
        if name + SCALE not in state:
            return codes.to(self.wide)
        scales = slab.of_scales(state[name + SCALE])[rows, blocks]
        skip = slab.skip if not blocks.start else 0
        return dequantize_moment(codes, scales, self.formats[name], self.wide, skip)

    def _find_cut(self, slots: Sequence[Slot]) -> None:
        """Number the blocks of all logical tensors, and find those that no rank holds whole."""
        firsts, total = {}, 0
        for slot in slots:
            firsts[slot], total = total, total + prod(grid(slot.declared.shape))
        marks = torch.zeros(total, dtype=torch.int32, device=slots[0].parameter.device)
        numbers: dict[Slab, list[tuple[int, Tensor]]] = {}
        for piece in self.pieces:
            for slab in self.slabs[piece] if blocked(piece.slot) else ():
                across, first = grid(slab.shape)[-1], slab.box[0][-1] // MOMENT_BLOCK
                for block, _ in slab.cut():
                    of_rows = firsts[piece.slot] + slab.row_numbers(device=marks.device) * across + first + block
                    numbers.setdefault(slab, []).append((block, of_rows))
                    marks[of_rows] = 1
        self.comm.all_reduce(marks, *OVER, op="max")
        self.cut = marks.nonzero().squeeze(1)
        for slab, found in numbers.items():
            self.places[slab] = [(block, torch.searchsorted(self.cut, of_rows)) for block, of_rows in found]

    def _agreed(self, after: Callable[[Tensor, list[Tensor]], Sequence[Tensor]]) -> Tensor:
        """The largest values that the blocks which are cut will have, [moments, blocks], over all ranks."""
        amax = torch.zeros(len(self.names), len(self.cut), dtype=self.wide, device=self.cut.device)
        if not len(self.cut):
            return amax
        for piece in self.pieces:
            for slab in self.slabs[piece]:
                places = dict(self.places.get(slab, ()))
                for block, columns in slab.cut() if places else ():
                    of = slice(None), columns, slice(block, block + 1)
                    old = [self._wide(name, self.state[piece], slab, *of) for name in self.names]
                    new = after(slab.of(piece.gradient.view(-1))[:, columns].to(self.wide), old)
                    for place, values in enumerate(new):
                        amax[place, places[block]] = values.abs().amax(1).nan_to_num(torch.inf, torch.inf)
        self.comm.all_reduce(amax, *OVER, op="max")
        return amax


def blocked(slot: Slot) -> bool:
    """Whether a parameter's moments are kept in blocks where any are."""
    return len(slot.declared.shape) > 1
