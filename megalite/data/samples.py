"""In which order a corpus is read: Megatron's document, sample and shuffle indices, bit for bit.

Samples of L+1 tokens are cut from E shuffled copies of the documents laid end to end; neighbours share one token. The
order is a function of seed, sequence lengths, L and E alone. Built vectorised, kept as .npy files, memory-mapped.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megalite.data.files import cached_folder, load_array
from megalite.data.indexed import BLOCK
from megalite.errors import UserError


class Epochs(NamedTuple):
    """Copies of the documents, and whether the last one is shuffled apart (it gives few samples)."""

    copies: int
    separate: bool


@dataclass(frozen=True)
class SampleIndex:
    """Sample n reads from row `shuffle[n]` of `samples` to the row after it, through `documents`.

    documents: i32 [E * sequences] sequence numbers; samples: i32 or i64 [N+1, 2] (position in documents, token offset);
    shuffle: u32 or i64 [N].
    """

    documents: np.ndarray
    samples: np.ndarray
    shuffle: np.ndarray

    def __len__(self) -> int:
        return len(self.shuffle)


def epochs_needed(n_tokens: int, sequence_length: int, n_samples: int) -> Epochs:
    """Smallest number of copies that gives `n_samples` samples, from a corpus of `n_tokens`."""
    count = -(-(n_samples * sequence_length + 1) // n_tokens)
    if count == 1:
        return Epochs(1, False)
    before_last = ((count - 1) * n_tokens - 1) // sequence_length
    an_epoch = (n_tokens - 1) // sequence_length
    return Epochs(count, n_samples - before_last < int(0.80 * an_epoch))


def build_sample_index(lengths: np.ndarray, first: int, sequence_length: int, epochs: Epochs, seed: int) -> SampleIndex:
    """The three indices for sequences numbered first, first+1, … whose lengths in tokens are `lengths`."""
    random = np.random.RandomState(seed)  # the legacy generator: its streams are frozen, and Megatron's
    sequences = np.arange(first, first + len(lengths), dtype=np.int32)
    groups = [epochs.copies - 1, 1] if epochs.separate else [epochs.copies]
    documents = np.concatenate([_shuffled(np.tile(sequences, copies), random) for copies in groups])

    ends = np.cumsum(lengths[documents - first], dtype=np.int64)
    n_samples = (int(ends[-1]) - 1) // sequence_length
    starts = np.arange(n_samples + 1, dtype=np.int64) * sequence_length
    position = np.searchsorted(ends, starts, side="right")
    position[0] = 0  # Megatron starts at the first document even if that is empty
    offset = starts - ends[position] + lengths[documents[position] - first]
    offset[0] = 0
    largest = max(len(documents), int(lengths.max()))
    kind = np.int32 if largest <= np.iinfo(np.int32).max else np.int64
    samples = np.stack([position, offset], axis=1).astype(kind)

    wide = n_samples >= np.iinfo(np.uint32).max - 1
    apart = (
        ((epochs.copies - 1) * int(lengths.sum(dtype=np.int64)) - 1) // sequence_length
        if epochs.separate
        else n_samples
    )
    ranges = [(0, apart), (apart, n_samples)] if epochs.separate else [(0, n_samples)]
    shuffle = np.concatenate(
        [_shuffled(np.arange(*bounds, dtype=np.int64 if wide else np.uint32), random) for bounds in ranges]
    )
    return SampleIndex(documents, samples, shuffle)


def cached_sample_index(
    lengths: np.ndarray, first: int, sequence_length: int, n_samples: int, seed: int, cache: Path
) -> SampleIndex:
    """The indices for at least `n_samples` samples, from `cache` or built into it; arrays are memory-mapped.

    Raises UserError when there is nothing to read or the cache cannot be written.
    """
    n_tokens = int(lengths.sum(dtype=np.int64))
    if n_tokens == 0:
        raise UserError("data.path: no tokens to train on; check data.split and the dataset")
    epochs = epochs_needed(n_tokens, sequence_length, n_samples)
    if epochs.copies * len(lengths) > np.iinfo(np.int32).max:
        raise UserError(
            f"data.path: {n_tokens} tokens would be repeated {epochs.copies} times; give more text or fewer train.steps"
        )
    digest = hashlib.sha256(f"{first} {sequence_length} {epochs} {seed} ".encode())
    for at in range(0, len(lengths), BLOCK):
        digest.update(lengths[at : at + BLOCK].astype("<i4").tobytes())
    names = ("documents", "samples", "shuffle")

    def build(folder: Path) -> None:
        index = build_sample_index(np.asarray(lengths), first, sequence_length, epochs, seed)
        for name in names:
            np.save(folder / f"{name}.npy", getattr(index, name), allow_pickle=False)

    folder = cached_folder(cache / f"order-{digest.hexdigest()[:32]}", "data.cache", build)
    return SampleIndex(*(load_array(folder / f"{name}.npy") for name in names))


def _shuffled(values: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    random.shuffle(values)
    return values
