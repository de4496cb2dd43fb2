"""How one tensor of a Hugging Face folder is made of ours, and taken apart again."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Shape = tuple[int, ...]


class Rule(NamedTuple):
    """`theirs` holds the tensors `ours`, joined along their outputs: the rows of a weight, of each expert where ours
    are [E, outputs, inputs] or, biases of experts, [E, outputs].

    `alternating`: the outputs of ours take turns. `transposed`: the last two axes are swapped. `expert`: that expert of
    ours alone. `rotary`: (heads, rotated): the last rows of each head are turned by RoPE; theirs have the two that turn
    together beside each other, ours have them half of the rotated rows apart. `swapped`: the two halves of the inputs
    are the other way round.
    """

    theirs: str
    ours: tuple[str, ...]
    alternating: bool = False
    transposed: bool = False
    expert: int | None = None
    rotary: tuple[int, int] | None = None
    swapped: bool = False

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Their tensor, from the whole tensors `ours`."""
        if self.expert is not None:
            parts = [part[self.expert].clone() for part in parts]
        if self.alternating:
            whole = torch.stack(list(parts), dim=2).flatten(1, 2)
        else:
            whole = parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=_outputs(parts[0].shape))
        if self.rotary:
            whole = _turned(whole, *self.rotary, (2, -1))
        if self.swapped:
            whole = whole.roll(whole.shape[1] // 2, 1)
        return whole.mT if self.transposed else whole

    def split(self, whole: Tensor, shapes: Sequence[Shape]) -> Sequence[Tensor]:
        """`ours`, of those shapes, from their tensor; of one expert where the rule is about one."""
        whole = whole.mT if self.transposed else whole
        if self.swapped:
            whole = whole.roll(whole.shape[1] // 2, 1)
        if self.rotary:
            whole = _turned(whole, *self.rotary, (-1, 2))
        if self.alternating:
            return whole.unflatten(1, (-1, len(shapes))).unbind(2)
        shapes = [shape if self.expert is None else shape[1:] for shape in shapes]
        dim = _outputs(shapes[0])
        return whole.split([shape[dim] for shape in shapes], dim)

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """Of their tensor, where ours have `shapes`."""
        return tuple(self.join([torch.empty(shape, device="meta") for shape in shapes]).shape)


def _outputs(shape: Sequence[int]) -> int:
    return max(0, len(shape) - 2)


def _turned(whole: Tensor, heads: int, rotated: int, seen_as: tuple[int, int]) -> Tensor:
    """The rotated rows of each head, seen as such a matrix, transposed."""
    rows = whole.unflatten(0, (heads, -1))
    kept, turned = rows.split([rows.shape[1] - rotated, rotated], dim=1)
    return torch.cat((kept, turned.unflatten(1, seen_as).transpose(1, 2).flatten(1, 2)), dim=1).flatten(0, 1)
