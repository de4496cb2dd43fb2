"""A byte-level n-gram model with interpolated modified Kneser-Ney smoothing, counted and evaluated in plain numpy.

Chen & Goodman, "An empirical study of smoothing techniques for language modeling" (1998), section 3. The highest order
counts occurrences; each lower order counts distinct left neighbours (continuations); order 1 is interpolated with the
uniform distribution, so every byte after every context has a positive probability and they sum to one.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megalite.progress import Progress

Keys = NDArray[np.uint64]
Floats = NDArray[np.float64]
BYTES = 256
MINIMUM_DISCOUNT, DEFAULT_DISCOUNT = 0.05, 0.75
"""Small texts leave gaps in the counts of counts: an undefined discount becomes the default, and none is below the
minimum (a discount of zero would give unseen bytes no probability)."""


@dataclass(frozen=True)
class Order:
    """One order's tables. An n-gram is the big-endian integer of its bytes, so those of one context are adjacent.

    `grams`, `contexts`: sorted. `weight`: each n-gram's discounted count over its context's total. `backoff`: each
    context's share left to the next lower order.
    """

    grams: Keys
    weight: Floats
    contexts: Keys
    backoff: Floats


class KneserNey:
    """Counts `text` for all orders up to `order` (at most 8: a key is 64 bits)."""

    def __init__(self, text: bytes, order: int = 5, progress: Progress | None = None) -> None:
        if not 1 <= order <= 8 or len(text) < order:
            raise ValueError(f"order {order} on {len(text)} bytes: it must lie in 1..8 and in the text's length")
        self.orders: list[Order] = []
        grams, counts = _unique(_keys(text, order))
        for n in range(order, 0, -1):
            self.orders.insert(0, _smoothed(grams, counts))
            if progress is not None:
                progress.advance()
            if n > 1:  # distinct n-grams, stripped of their first byte: how many different bytes came before the rest
                grams, counts = _unique(grams & np.uint64((1 << 8 * (n - 1)) - 1))

    def probabilities(self, context: bytes) -> Floats:
        """The distribution over the next byte [256] after `context` (its last order-1 bytes count)."""
        mass = np.full(BYTES, 1.0 / BYTES)
        following = np.arange(BYTES, dtype=np.uint64)
        for n, table in enumerate(self.orders[: len(context) + 1], start=1):
            key = np.uint64(int.from_bytes(context[len(context) - n + 1 :], "big"))
            mass = _interpolate(table, np.full(BYTES, key << np.uint64(8)) | following, mass)
        return mass

    def bits_per_byte(self, text: bytes) -> float:
        """Mean -log2 probability of each byte of `text` given the bytes before it; the first ones see less context."""
        if not text:
            raise ValueError("no bytes to evaluate")
        mass = np.full(len(text), 1.0 / BYTES)
        for n, table in enumerate(self.orders[: len(text)], start=1):
            mass[n - 1 :] = _interpolate(table, _keys(text, n), mass[n - 1 :])
        return float(-np.log2(mass).mean())


def _keys(text: bytes, n: int) -> Keys:
    """All n-grams of the text in order [len-n+1]."""
    data = np.frombuffer(text, np.uint8)
    count = len(data) - n + 1
    keys = np.zeros(count, np.uint64)
    for place in range(n):
        keys <<= np.uint64(8)
        keys |= data[place : place + count]
    return keys


def _unique(keys: Keys) -> tuple[Keys, NDArray[np.int64]]:
    """Sorted distinct keys and how often each occurs."""
    ordered = np.sort(keys)
    first = _starts(ordered)
    return ordered[first], np.diff(first, append=len(ordered))


def _starts(ordered: Keys) -> NDArray[np.int64]:
    """Positions at which a new value begins in a sorted array."""
    return np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))


def _smoothed(grams: Keys, counts: NDArray[np.int64]) -> Order:
    discounts = _discounts(counts)[np.minimum(counts, 3)]
    histories = grams >> np.uint64(8)
    first = _starts(histories)
    totals = np.add.reduceat(counts, first)
    backoff = np.add.reduceat(discounts, first) / totals
    weight = (counts - discounts) / np.repeat(totals, np.diff(first, append=len(grams)))
    return Order(grams, weight, histories[first], backoff)


def _discounts(counts: NDArray[np.int64]) -> Floats:
    """What is taken off counts of 0, 1, 2 and 3 or more [4], from the numbers of n-grams seen once to four times."""
    ones, twos, threes, fours = (int(np.count_nonzero(counts == count)) for count in (1, 2, 3, 4))
    result = [0.0]
    for count, seen, more in ((1, ones, twos), (2, twos, threes), (3, threes, fours)):
        if ones and twos and seen and more:
            value = count - (count + 1) * (ones / (ones + 2 * twos)) * more / seen
        else:
            value = DEFAULT_DISCOUNT
        result.append(min(max(value, MINIMUM_DISCOUNT), count))
    return np.array(result)


def _interpolate(table: Order, keys: Keys, lower: Floats) -> Floats:
    """P(byte | context) of each n-gram in `keys` from the next lower order's; an unseen context keeps those."""
    weight, _ = _look_up(table.grams, table.weight, keys)
    backoff, seen = _look_up(table.contexts, table.backoff, keys >> np.uint64(8))
    return np.where(seen, weight + backoff * lower, lower)


def _look_up(keys: Keys, values: Floats, wanted: Keys) -> tuple[Floats, NDArray[np.bool_]]:
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    found = keys[place] == wanted
    return np.where(found, values[place], 0.0), found
