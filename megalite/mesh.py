"""Who is where: the only place that turns ranks into groups. Process groups are made once, at the first use of one.

Axes: pp (pipeline), dp (data), cp (context), tp (tensor); by default in this order, so that tp ranks are neighbours.
cp is ring x ulysses, two axes of their own for the two ways of spreading attention. Experts see the ranks of a pipeline
stage folded anew as edp x ep x etp (arXiv:2504.14960), so that their layout need not follow that of attention. The
replicas, dp x cp, are folded anew as copy x shard: the ranks along shard share out one copy of the weights (ZeRO 3).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import prod

import torch.distributed as dist

AXES = ("pp", "dp", "cp", "tp")
EXPERT_AXES = ("edp", "ep", "etp")
REPLICA_AXES = ("copy", "shard")
USUAL_GROUPS = (
    AXES, ("pp",), ("dp",), ("cp",), ("tp",), ("ring",), ("ulysses",), ("dp", "cp"), ("dp", "cp", "tp"), ("cp", "tp"),
    ("edp",), ("ep",), ("etp",), ("ep", "etp"), ("edp", "etp"), ("edp", "ep", "etp"), ("copy",), ("shard",),
)  # fmt: skip
"""What the engine communicates over. Some only layers of a kind use: they are here because a stage without such layers
would not make them."""


@dataclass(frozen=True)
class Mesh:
    """`sizes`: ranks along each axis of AXES; their product is the world size. `rank`: this process.

    `ulysses`: the part of cp that spreads heads (the rest is the ring). `ep`, `etp`: of the ranks of a stage, so many
    hold different experts, and different parts of one. `order`: axes of AXES, outermost first. `shard_ranks`: of the
    replicas, so many share one copy of the weights under ZeRO 3; 0: all.
    """

    sizes: dict[str, int]
    rank: int = 0
    ulysses: int = 1
    ep: int = 1
    etp: int = 1
    order: tuple[str, ...] = AXES
    shard_ranks: int = 0
    _groups: dict[tuple[int, ...], dist.ProcessGroup] = field(default_factory=dict, repr=False, compare=False)
    _ranks: dict[tuple[str, ...], list[int]] = field(default_factory=dict, init=False, repr=False, compare=False)
    _sizes: dict[tuple[str, ...], int] = field(default_factory=dict, init=False, repr=False, compare=False)
    _indices: dict[tuple[str, ...], int] = field(default_factory=dict, init=False, repr=False, compare=False)
    """What `ranks`, `size` and `index` have answered: every collective asks."""

    def __post_init__(self) -> None:
        assert tuple(self.sizes) == AXES, f"axes must be {AXES} in this order, not {tuple(self.sizes)}"
        assert sorted(self.order) == sorted(AXES), f"order must name each of {AXES} once, not {self.order}"
        assert 0 <= self.rank < self.world_size, f"rank {self.rank} outside a world of {self.world_size}"
        assert self.sizes["cp"] % self.ulysses == 0, f"ulysses {self.ulysses} does not divide cp {self.sizes['cp']}"
        assert self._stage_ranks % (self.ep * self.etp) == 0, f"ep x etp does not divide {self._stage_ranks} ranks"
        assert self._replicas % self._extent("shard") == 0, f"shard_ranks do not divide {self._replicas} replicas"

    @property
    def world_size(self) -> int:
        return prod(self.sizes.values())

    @property
    def _stage_ranks(self) -> int:
        return self.world_size // self.sizes["pp"]

    @property
    def _replicas(self) -> int:
        return self.sizes["dp"] * self.sizes["cp"]

    def _extent(self, axis: str) -> int:
        """Ranks along one axis that is not put together from others."""
        if axis in REPLICA_AXES:
            shard = self.shard_ranks or self._replicas
            return shard if axis == "shard" else self._replicas // shard
        if axis in EXPERT_AXES:
            return {"ep": self.ep, "etp": self.etp, "edp": self._stage_ranks // (self.ep * self.etp)}[axis]
        parts = {"ring": self.sizes["cp"] // self.ulysses, "ulysses": self.ulysses}
        return parts[axis] if axis in parts else self.sizes[axis]

    def size(self, *axes: str) -> int:
        if axes not in self._sizes:
            self._sizes[axes] = prod(self._extent(axis) for axis in _parts(axes))
        return self._sizes[axes]

    def coordinates(self, rank: int | None = None) -> dict[str, int]:
        """Position on every axis of `rank` (default: this process)."""
        remaining, position = self.rank if rank is None else rank, {}
        for axis in reversed(_parts(self.order)):
            remaining, position[axis] = divmod(remaining, self._extent(axis))
        position["cp"] = position["ring"] * self.ulysses + position["ulysses"]
        inside = 0
        for axis in self._inside_a_stage():
            inside = inside * self._extent(axis) + position[axis]
        for axis in reversed(EXPERT_AXES):
            inside, position[axis] = divmod(inside, self._extent(axis))
        replica = position["dp"] * self.sizes["cp"] + position["cp"]
        position["copy"], position["shard"] = divmod(replica, self._extent("shard"))
        return position

    def rank_at(self, position: dict[str, int]) -> int:
        """The rank at a position on pp, dp, ring, ulysses and tp; or on pp and the expert axes; or on pp, copy, shard
        and tp."""
        if "edp" in position:
            inside, position = 0, dict(position)
            for axis in EXPERT_AXES:
                inside = inside * self._extent(axis) + position[axis]
            for axis in reversed(self._inside_a_stage()):
                inside, position[axis] = divmod(inside, self._extent(axis))
        if "shard" in position:
            replica, position = position["copy"] * self._extent("shard") + position["shard"], dict(position)
            for axis in ("ulysses", "ring", "dp"):
                replica, position[axis] = divmod(replica, self._extent(axis))
        rank = 0
        for axis in _parts(self.order):
            rank = rank * self._extent(axis) + position[axis]
        return rank

    def index(self, *axes: str) -> int:
        """This rank's place inside its group over `axes`, the first axis outermost."""
        if axes not in self._indices:
            here, place = self.coordinates(), 0
            for axis in _parts(axes):
                place = place * self._extent(axis) + here[axis]
            self._indices[axes] = place
        return self._indices[axes]

    def ranks(self, *axes: str) -> list[int]:
        """The ranks of this process's group over `axes`: those that differ from it on these axes only."""
        if axes not in self._ranks:
            self._ranks[axes] = self._members(_parts(axes), self.coordinates())
        return list(self._ranks[axes])

    def all_ranks(self, axes: Sequence[str]) -> list[list[int]]:
        """Every group over `axes`, in a fixed order."""
        chosen = _parts(axes)
        others = [axis for axis in self._view(chosen) if axis not in chosen]
        return [
            self._members(chosen, dict(zip(others, place, strict=True)))
            for place in product(*(range(self._extent(axis)) for axis in others))
        ]

    def group(self, *axes: str, places: Sequence[int] | None = None) -> dist.ProcessGroup | None:
        """This rank's process group over `axes`, or over `places` of it; made once, by its members. None: alone."""
        ranks = self.ranks(*axes)
        if places is not None:
            ranks = [ranks[place] for place in places]
        if len(ranks) == 1:
            return None
        assert self.rank in ranks, f"rank {self.rank} asked for a group of others: {ranks}"
        if not self._groups:
            for usual in USUAL_GROUPS:
                self._make(self.ranks(*usual))
        assert places is not None or tuple(ranks) in self._groups, f"add {axes} to USUAL_GROUPS: members must agree"
        self._make(ranks)
        return self._groups[tuple(ranks)]

    def alone(self) -> dist.ProcessGroup:
        """A group of this rank, for a library that asks for one where there is nobody to talk to. Every rank asks."""
        if (self.rank,) not in self._groups:
            made = dist.new_group([self.rank], use_local_synchronization=True)
            assert made is not None
            self._groups[self.rank,] = made
        return self._groups[self.rank,]

    def _make(self, ranks: list[int]) -> None:
        """Only the members of a group meet to make it, for stages of a pipeline may ask for different ones. torch names
        such a group by its ranks and the number of groups made before, which must be the same on all members: hence the
        usual groups are made together, in one order. Unsorted, for a rank's place in its group must be its `index`.
        """
        if len(ranks) > 1 and tuple(ranks) not in self._groups:
            whole = ranks == list(range(self.world_size))
            made = (
                dist.group.WORLD if whole else dist.new_group(ranks, use_local_synchronization=True, sort_ranks=False)
            )
            assert made is not None
            self._groups[tuple(ranks)] = made

    def _inside_a_stage(self) -> list[str]:
        return [axis for axis in _parts(self.order) if axis != "pp"]

    def _view(self, axes: Sequence[str]) -> list[str]:
        """The axes that together name a rank and among which `axes` are."""
        if any(axis in EXPERT_AXES for axis in axes):
            assert all(axis in ("pp", *EXPERT_AXES) for axis in axes), f"{axes} mixes two foldings of the ranks"
            return ["pp", *EXPERT_AXES]
        if any(axis in REPLICA_AXES for axis in axes):
            assert all(axis in ("pp", *REPLICA_AXES, "tp") for axis in axes), f"{axes} mixes two foldings of the ranks"
            return ["pp", *REPLICA_AXES, "tp"]
        return _parts(self.order)

    def _members(self, axes: Sequence[str], here: dict[str, int]) -> list[int]:
        fixed = {axis: here[axis] for axis in self._view(axes) if axis not in axes}
        places = product(*(range(self._extent(axis)) for axis in axes))
        return [self.rank_at(fixed | dict(zip(axes, place, strict=True))) for place in places]


def _parts(axes: Sequence[str]) -> list[str]:
    """The same axes with cp as the two it is made of."""
    parts: Iterator[tuple[str, ...]] = (("ring", "ulysses") if axis == "cp" else (axis,) for axis in axes)
    return [part for several in parts for part in several]
