"""Which corpus each sample of a weighted blend comes from: Megatron's rule, the largest deficit first.

Sample k goes to the source with the largest weight * max(k, 1) - samples given so far; ties to the first.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megalite.errors import UserError

_MOST_SOURCES = 32766


@dataclass(frozen=True)
class Blend:
    """source: i16 [N] number of the corpus; sample: i64 [N] which of that corpus's samples."""

    source: np.ndarray
    sample: np.ndarray

    def __len__(self) -> int:
        return len(self.source)


def normalised(weights: Sequence[float]) -> list[float]:
    """Weights that sum to 1. Raises UserError for none, too many, negative, or not finite."""
    if not 0 < len(weights) <= _MOST_SOURCES:
        raise UserError(f"data.blend: {len(weights)} sources; give 1 to {_MOST_SOURCES}")
    if any(not math.isfinite(weight) or weight <= 0 for weight in weights):
        raise UserError("data.blend: every weight must be a positive number; leave out what is not wanted")
    total = sum(weights)
    return [weight / total for weight in weights]


def samples_wanted(size: int, weights: Sequence[float]) -> list[int]:
    """Samples each source must be able to give for `size` samples of the blend (half a percent to spare, as Megatron)."""
    return [math.ceil(math.ceil(size * weight) * 1.005) for weight in weights]


def build_blend(weights: Sequence[float], size: int) -> Blend:
    """The first `size` choices for normalised `weights`."""
    source = np.empty(size, np.int16)
    given, indices = [0] * len(weights), range(len(weights))
    sample = np.empty(size, np.int64)
    for k in range(size):
        step = max(k, 1)
        best, largest = 0, -math.inf
        for i in indices:
            deficit = weights[i] * step - given[i]
            if deficit > largest:
                best, largest = i, deficit
        source[k], sample[k] = best, given[best]
        given[best] += 1
    return Blend(source, sample)
