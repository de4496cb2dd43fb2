"""Which corpus each sample of a weighted blend comes from: Megatron's rule, the largest deficit first.

Sample k goes to the source with the largest weight * max(k, 1) - samples given so far; ties to the first.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megalite.data.files import cached_folder, load_array
from megalite.errors import UserError
from megalite.progress import Progress

_MOST_SOURCES = 32766
_BLOCK = 1 << 17  # choices between two movements of the progress bar


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
    """Samples each source must be able to give for `size` samples of the blend (Megatron's half percent to spare)."""
    return [math.ceil(math.ceil(size * weight) * 1.005) for weight in weights]


def cached_blend(weights: Sequence[float], size: int, cache: Path) -> Blend:
    """The blend from `cache`, memory-mapped, or built into it."""
    digest = hashlib.sha256(f"{[weight.hex() for weight in weights]} {size}".encode()).hexdigest()[:32]

    def build(folder: Path) -> None:
        blend = build_blend(weights, size)
        np.save(folder / "source.npy", blend.source, allow_pickle=False)
        np.save(folder / "sample.npy", blend.sample, allow_pickle=False)

    folder = cached_folder(cache / f"blend-{digest}", "data.cache", build)
    return Blend(load_array(folder / "source.npy"), load_array(folder / "sample.npy"))


def build_blend(weights: Sequence[float], size: int) -> Blend:
    """The first `size` choices for normalised `weights`."""
    source, sample = np.empty(size, np.int16), np.empty(size, np.int64)
    given = [0] * len(weights)
    with Progress("blending", size, "samples") as bar:
        for begin in range(0, size, _BLOCK):
            block = range(begin, min(begin + _BLOCK, size))
            choices = _choose(weights, given, block)
            source[block.start : block.stop] = [i for i, _ in choices]
            sample[block.start : block.stop] = [n for _, n in choices]
            bar.advance(len(block))
    return Blend(source, sample)


def _choose(weights: Sequence[float], given: list[int], block: range) -> list[tuple[int, int]]:
    """(source, its sample) for each number in `block`; counted in `given`. Each choice needs the last: a plain loop."""
    choices = []
    for k in block:
        step, best, largest = k or 1, 0, -math.inf
        for i, weight in enumerate(weights):
            deficit = weight * step - given[i]
            if deficit > largest:
                best, largest = i, deficit
        choices.append((best, given[best]))
        given[best] += 1
    return choices
