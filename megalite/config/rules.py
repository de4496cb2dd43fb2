"""What a rule is, what it sees of a job, and how it words the nearest legal values. The rules stand in other files."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megalite.config.schema import Config
from megalite.config.tree import leaves

Rule = Callable[["Job"], Iterator[str]]


class Rules(list[tuple[tuple[str, ...], Rule]]):
    """(keys that the rule reads, rule), in the order in which they are reported."""

    def reads(self, *keys: str) -> Callable[[Rule], Rule]:
        """Adds the decorated rule. It is skipped when one of `keys` is outside the key's own limits."""
        unknown = set(keys) - leaves(Config).keys()
        assert not unknown, f"rule reads unknown keys {unknown}"

        def add(function: Rule) -> Rule:
            self.append((keys, function))
            return function

        return add


@dataclass(frozen=True)
class Job:
    """A configuration and the ranks it is to run on; None: no job is running yet, then dp -1 stands for 1. `trains`:
    False where a model is only described.

    What the keys' -1, 0 and null stand for. Only `inner`, `dp` and `stages` have a meaning before all rules hold.
    """

    config: Config
    world_size: int | None
    trains: bool = True

    @property
    def inner(self) -> int:
        """Ranks of one data-parallel replica."""
        parallel = self.config.parallel
        return parallel.pp * parallel.cp * parallel.tp

    @property
    def dp(self) -> int:
        """Data-parallel ranks; what the other axes leave when parallel.dp is -1, at least 1."""
        if self.config.parallel.dp != -1:
            return self.config.parallel.dp
        return max(1, (self.world_size or self.inner) // self.inner)

    @property
    def counts_ranks(self) -> bool:
        """Whether `dp` is more than a stand-in."""
        return self.world_size is not None or self.config.parallel.dp != -1

    @property
    def knows_dp(self) -> bool:
        """False where parallel.dp itself is wrong, or is to be what an impossible layout leaves."""
        fits = self.world_size is None or self.world_size % self.inner == 0
        return self.dp >= 1 and (fits or self.config.parallel.dp != -1)

    @property
    def batch_divides(self) -> bool:
        return self.knows_dp and self.config.train.global_batch % (self.config.train.micro_batch * self.dp) == 0

    @property
    def accumulation(self) -> int:
        """Microbatches a rank computes in a step."""
        return self.config.train.global_batch // (self.config.train.micro_batch * self.dp)

    @property
    def head_dim(self) -> int:
        return self.config.model.head_dim or self.config.model.hidden // self.config.model.heads

    @property
    def kv_heads(self) -> int:
        return self.config.model.kv_heads or self.config.model.heads

    @property
    def query_dim(self) -> int:
        """Size of a head of queries and of keys."""
        mla = self.config.model.mla
        return self.head_dim + (mla.rope_dim if mla.kv_rank else 0)

    @property
    def order(self) -> tuple[str, ...]:
        """The mesh axes over the ranks, outermost first."""
        return tuple(axis.strip() for axis in self.config.parallel.order.split(","))

    @property
    def ulysses(self) -> int:
        """Ranks of cp that spread heads; cp divided by it is the ring."""
        parallel = self.config.parallel
        if parallel.cp_kind != "hybrid":
            return parallel.cp if parallel.cp_kind == "ulysses" else 1
        return parallel.ulysses or math.gcd(parallel.cp, self.config.model.heads // parallel.tp)

    @property
    def shard_ranks(self) -> int:
        """zero 3: ranks that share one copy of the weights."""
        return self.config.parallel.shard_ranks or self.dp * self.config.parallel.cp

    @property
    def stages(self) -> int:
        return self.config.parallel.pp * self.config.parallel.chunks

    @property
    def stage_layers(self) -> list[int] | None:
        """Layers of each stage where parallel.layers lists them; None for null and auto. Raises ValueError."""
        text = self.config.parallel.layers
        if text is None or text == "auto":
            return None
        listed = []
        for word in text.strip("[]").split(","):
            layers, _, times = word.partition("*")
            listed += [int(layers)] * int(times or 1)
        return listed


def around(value: int, step: int) -> str:
    """The positive multiples of `step` on both sides of `value`."""
    below = value // step * step
    return " or ".join(str(n) for n in (below, below + step) if n > 0)


def divisors(total: int) -> list[int]:
    """Every divisor, ascending."""
    return sorted({d for n in range(1, math.isqrt(total) + 1) if total % n == 0 for d in (n, total // n)})


def nearest_numbers(value: int, legal: list[int]) -> str:
    """The numbers nearest to `value`, at most three."""
    return ", ".join(str(n) for n in sorted(sorted(legal, key=lambda n: (abs(n - value), n))[:3]))


def divisors_near(value: int, total: int) -> str:
    """The divisors of `total` nearest to `value`, at most three."""
    return nearest_numbers(value, divisors(total))
