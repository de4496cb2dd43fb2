"""Who is where: the only place that turns ranks into groups. Process groups are made when first asked for.

Axes, outermost first: pp (pipeline), dp (data), cp (context), tp (tensor, so that its ranks are neighbours).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from math import prod

import torch.distributed as dist

AXES = ("pp", "dp", "cp", "tp")


@dataclass(frozen=True)
class Mesh:
    """`sizes`: ranks along each axis of AXES; their product is the world size. `rank`: this process."""

    sizes: dict[str, int]
    rank: int = 0
    _groups: dict[tuple[str, ...], dist.ProcessGroup] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        assert tuple(self.sizes) == AXES, f"axes must be {AXES} in this order, not {tuple(self.sizes)}"
        assert 0 <= self.rank < self.world_size, f"rank {self.rank} outside a world of {self.world_size}"

    @property
    def world_size(self) -> int:
        return prod(self.sizes.values())

    def size(self, *axes: str) -> int:
        return prod(self.sizes[axis] for axis in axes)

    def coordinates(self, rank: int | None = None) -> dict[str, int]:
        """Position on every axis of `rank` (default: this process)."""
        remaining, position = self.rank if rank is None else rank, {}
        for axis in reversed(AXES):
            remaining, position[axis] = divmod(remaining, self.sizes[axis])
        return position

    def index(self, *axes: str) -> int:
        """This rank's place inside its group over `axes`, the first axis outermost."""
        here, place = self.coordinates(), 0
        for axis in axes:
            place = place * self.sizes[axis] + here[axis]
        return place

    def all_ranks(self, axes: Sequence[str]) -> list[list[int]]:
        """Every group over `axes`, in a fixed order; each is the ranks that differ on those axes only."""
        strides, stride = {}, 1
        for axis in reversed(AXES):
            strides[axis] = stride
            stride *= self.sizes[axis]

        def offsets(chosen: Sequence[str]) -> list[int]:
            steps = product(*(range(self.sizes[axis]) for axis in chosen))
            return [sum(i * strides[axis] for i, axis in zip(step, chosen, strict=True)) for step in steps]

        others = [axis for axis in AXES if axis not in axes]
        return [[base + offset for offset in offsets(axes)] for base in offsets(others)]

    def ranks(self, *axes: str) -> list[int]:
        """The ranks of this process's group over `axes`."""
        return next(ranks for ranks in self.all_ranks(axes) if self.rank in ranks)

    def group(self, *axes: str) -> dist.ProcessGroup | None:
        """This rank's process group over `axes`, made once; all ranks must ask at the same point. None: alone."""
        if self.size(*axes) == 1:
            return None
        if axes not in self._groups:
            if self.size(*axes) == self.world_size:
                self._groups[axes] = dist.group.WORLD  # type: ignore[assignment]
            else:
                for ranks in self.all_ranks(axes):
                    made = dist.new_group(ranks)
                    if self.rank in ranks:
                        self._groups[axes] = made
        return self._groups[axes]
