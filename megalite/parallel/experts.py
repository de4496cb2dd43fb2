"""Expert parallelism: how tokens reach the ranks that hold their experts, and come back.

The ranks along ep hold different experts, those along etp different parts of the same ones (arXiv:2504.14960); all the
ep x etp ranks of a group exchange tokens. A dispatcher hands the experts rows with their experts and probabilities, and
adds up what comes back. Nothing is averaged: every rank's part is a term of a sum.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

import torch
from megalite_kernels import moe_permute, moe_unpermute
from torch import Tensor

from megalite.comm import Communicator
from megalite.mesh import EXPERT_AXES, Mesh
from megalite.parallel.collectives import begin_exchange, exchange, gather_for_parts, rounded_as_sent, scatter_sum

AXES = ("ep", "etp")


class Sources(NamedTuple):
    """The microbatches whose tokens meet at a rank's experts, for what must keep them apart: `places` along dp, this
    rank's own the `mine`-th. `spread`: of one microbatch, other replicas of these experts have tokens too."""

    places: tuple[int, ...] = (0,)
    mine: int = 0
    spread: bool = False

    @classmethod
    def of(cls, mesh: Mesh) -> "Sources":
        met = defaultdict(set)
        for rank in mesh.ranks(*EXPERT_AXES):
            position = mesh.coordinates(rank)
            met[position["edp"]].add(position["dp"])
        places = tuple(sorted(met[mesh.index("edp")]))
        return cls(places, places.index(mesh.index("dp")), sum(map(len, met.values())) > mesh.size("dp"))


ONE_SOURCE = Sources()


class Work(NamedTuple):
    """What the experts of a rank compute: rows [R, D], the experts of each [R, K] (numbered on this rank; -1: none
    here) and their probabilities [R, K]. `slots`: how many of the R·K are experts of this rank, where that is known.
    `sources`: S microbatches are kept apart; that of the s-th goes to expert e by the number e·S + s."""

    rows_RD: Tensor
    indices_RK: Tensor
    probs_RK: Tensor
    slots: int | None = None
    sources: int = 1


Combine = Callable[[Tensor], Tensor]
"""The experts' sums [R, D] to those of this rank's own tokens [N, D]."""


class Dispatcher:
    """All tokens are on this rank, and so are all experts."""

    def __init__(self, comm: Communicator, experts: int, node_ranks: int = 0, sources: Sources = ONE_SOURCE) -> None:
        self.comm, mesh = comm, comm.mesh
        self.ep, self.etp = mesh.size("ep"), mesh.size("etp")
        self.experts, self.sources = experts, sources
        self.each = experts // self.ep
        self.first = mesh.index("ep") * self.each
        self.node_ranks = node_ranks or self.ep * self.etp
        self.backend = "auto"
        self.fp8 = False  # tokens travel in FP8, and so do the gradients of what comes back; sums of either do not

    def begin(self, x_ND: Tensor, indices_NK: Tensor, probs_NK: Tensor) -> Callable[[], tuple[Work, Combine]]:
        """Starts sending this rank's tokens; what it returns waits for those of others. They travel beside what is
        computed in between, but for all-gather's."""
        if not self.fp8:
            return lambda: (Work(x_ND, indices_NK, probs_NK), lambda y_ND: y_ND)
        rows = rounded_as_sent(x_ND, there=True)  # the numbers that several ranks would exchange
        return lambda: (Work(rows, indices_NK, probs_NK), lambda y_ND: rounded_as_sent(y_ND, back=True))

    def _named(self, indices: Tensor) -> Tensor:
        """Numbers as they travel: the experts', plus all experts for each microbatch before this rank's."""
        return torch.where(indices < 0, -1, indices + self.sources.mine * self.experts)

    def _work(self, rows: Tensor, named: Tensor, probs: Tensor, slots: int | None = None) -> Work:
        """With experts numbered on this rank; -1: elsewhere, or none."""
        sources = len(self.sources.places)
        local, source = named % self.experts - self.first, named // self.experts
        here = (named >= 0) & (local >= 0) & (local < self.each)
        return Work(rows, torch.where(here, local * sources + source, -1), probs, slots, sources)

    def _wanted(self, indices_NK: Tensor) -> Tensor:
        """How many experts of a token each rank of the group has, [N, ep·etp]."""
        owner = torch.where(indices_NK < 0, self.ep, indices_NK % self.experts // self.each)
        slots = torch.zeros(len(indices_NK), self.ep + 1, dtype=torch.int64, device=indices_NK.device)
        slots.scatter_add_(1, owner, torch.ones_like(owner))
        return slots[:, : self.ep].repeat_interleave(self.etp, dim=1)


class AllGather(Dispatcher):
    """All tokens to all ranks; the sums are scattered. No size depends on the data."""

    def begin(self, x_ND: Tensor, indices_NK: Tensor, probs_NK: Tensor) -> Callable[[], tuple[Work, Combine]]:
        rows = gather_for_parts(x_ND, self.comm, AXES, fp8=self.fp8)
        probs = gather_for_parts(probs_NK, self.comm, AXES)
        work = self._work(rows, self.comm.all_gather(self._named(indices_NK).contiguous(), *AXES), probs)
        return lambda: (work, lambda y_RD: scatter_sum(y_RD, self.comm, AXES, fp8=self.fp8))


class AllToAll(Dispatcher):
    """A token travels once to each rank that has one of its experts."""

    def begin(self, x_ND: Tensor, indices_NK: Tensor, probs_NK: Tensor) -> Callable[[], tuple[Work, Combine]]:
        named = self._named(indices_NK)
        finish = hop(self.comm, self._wanted(named), x_ND, named, probs_NK, self.backend, self.fp8)

        def arrived() -> tuple[Work, Combine]:
            rows, indices, probs, slots, back = finish()
            return self._work(rows, indices, probs, slots), back

        return arrived


class ByNode(Dispatcher):
    """A token travels once to each node that has one of its experts, to the rank there with this rank's place, which
    hands it on inside the node (as DeepSeek-V3's training does, arXiv:2412.19437 §3.2)."""

    def begin(self, x_ND: Tensor, indices_NK: Tensor, probs_NK: Tensor) -> Callable[[], tuple[Work, Combine]]:
        place, size, named = self.comm.mesh.index(*AXES), self.node_ranks, self._named(indices_NK)
        by_node = self._wanted(named).unflatten(1, (-1, size)).sum(-1)
        across = by_node.new_zeros(len(x_ND), by_node.shape[1], size)
        across[:, :, place % size] = by_node
        finish = hop(self.comm, across.flatten(1), x_ND, named, probs_NK, self.backend, self.fp8)

        def arrived() -> tuple[Work, Combine]:
            rows, indices, probs, _, back_across = finish()
            inside = self._wanted(indices)
            elsewhere = torch.arange(inside.shape[1], device=inside.device) // size != place // size
            inside = inside.masked_fill(elsewhere, 0)
            begun = hop(self.comm, inside, rows, indices, probs, self.backend, self.fp8)
            rows, indices, probs, slots, back_inside = begun()
            return self._work(rows, indices, probs, slots), lambda y_RD: back_across(back_inside(y_RD))

        return arrived


DISPATCHERS = {"all_to_all": AllToAll, "all_gather": AllGather, "node": ByNode}


def make_dispatcher(
    kind: str, comm: Communicator, experts: int, node_ranks: int = 0, sources: Sources = ONE_SOURCE
) -> Dispatcher:
    """`kind`: a name of DISPATCHERS; `node_ranks`: ranks of ep x etp on one node, neighbours in the group (0: all);
    `sources`: the microbatches that are kept apart."""
    alone = comm.mesh.size(*AXES) == 1
    return (Dispatcher if alone else DISPATCHERS[kind])(comm, experts, node_ranks, sources)


Arrived = tuple[Tensor, Tensor, Tensor, int, Combine]


def hop(
    comm: Communicator,
    slots_NR: Tensor,
    x_ND: Tensor,
    indices_NK: Tensor,
    probs_NK: Tensor,
    backend: str,
    fp8: bool = False,
) -> Callable[[], Arrived]:
    """Starts sending each row to the ranks of ep x etp that have experts of it, so many `slots`; then (rows, indices,
    probs) of the rows that came, by sender, their slots here, and the way back, which sums what the ranks return of a
    row, in the order of ranks. `fp8`: as of `Dispatcher`."""
    ranks, wanted_NR = slots_NR.shape[1], slots_NR > 0
    counts_R2 = torch.stack((wanted_NR.sum(0), slots_NR.sum(0)), dim=1)
    told_R2 = comm.all_to_all(counts_R2, *AXES)
    (send, _), (receive, slots) = counts_R2.T.tolist(), told_R2.T.tolist()
    # A token's ranks side by side, no more than it can have: a GPU makes room for every place.
    most = min(ranks, indices_NK.shape[1] * comm.mesh.size("etp"))
    to_NR = torch.where(wanted_NR, torch.arange(ranks, device=wanted_NR.device), ranks).sort(dim=1).values[:, :most]
    to_NR = to_NR.masked_fill(to_NR == ranks, -1)
    rows, _, inverse = moe_permute(x_ND, to_NR, ranks, rows=sum(send), backend=backend)
    probs, _, _ = moe_permute(probs_NK, to_NR, ranks, rows=sum(send), backend=backend)
    indices = indices_NK[wanted_NR.t().nonzero()[:, 1]]
    came_probs = exchange(probs, comm, AXES, send, receive)
    came_indices = comm.all_to_all(indices, *AXES, send=send, receive=receive)
    _, came = begin_exchange(
        rows, comm, AXES, send, receive, fp8
    )  # last: what is waited for before it would wait for it

    def back(y_RD: Tensor) -> Tensor:
        return moe_unpermute(exchange(y_RD, comm, AXES, receive, send, fp8), inverse, backend=backend)

    return lambda: (came(), came_indices, came_probs, sum(slots), back)
