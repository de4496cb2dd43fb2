"""Training sets: samples of L+1 tokens read from memory-mapped corpora in Megatron's order, alone or in a blend."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from megalite.data.batch import Batch, check_ids, make_batch
from megalite.data.blend import Blend
from megalite.data.indexed import IndexedDataset
from megalite.data.samples import cached_sample_index


class GptSamples:
    """Samples of a corpus's sequences [begin, end); they run over document ends. Defined for sample < n_samples.

    `vocab`: ids in the corpus must be below it. `documents`: batches say which document each token belongs to.
    Raises UserError when the part is empty or the cache cannot be written.
    """

    def __init__(
        self,
        dataset: IndexedDataset,
        begin: int,
        end: int,
        *,
        sequence_length: int,
        n_samples: int,
        seed: int,
        vocab: int,
        documents: bool,
        cache: Path,
    ) -> None:
        self.dataset, self.n_samples, self.sequence_length, self.documents = (
            dataset,
            n_samples,
            sequence_length,
            documents,
        )
        self._vocab = vocab
        self._index = cached_sample_index(dataset.lengths[begin:end], begin, sequence_length, n_samples, seed, cache)

    def batch(self, samples: Sequence[int]) -> Batch:
        return _read_batch(self.read, samples, self)

    def read(self, sample: int, tokens: np.ndarray, documents: np.ndarray | None) -> None:
        """Fill a row of L+1 tokens, and a row of L+1 document numbers when given one."""
        if not 0 <= sample < self.n_samples:
            raise ValueError(f"sample {sample} of {self.n_samples} asked from {self.dataset.prefix}")
        index, dataset, at = self._index, self.dataset, 0
        row = int(index.shuffle[sample])
        (first, offset), (last, end) = index.samples[row : row + 2].tolist()
        for number, position in enumerate(range(first, last + 1)):
            sequence = int(index.documents[position])
            start = dataset.start(sequence)
            stop = start + (end + 1 if position == last else int(dataset.lengths[sequence]))
            piece = dataset.tokens[start + (offset if position == first else 0) : stop]
            tokens[at : at + len(piece)] = piece
            if documents is not None:
                documents[at : at + len(piece)] = number
            at += len(piece)
        assert at == len(tokens), "sample index and lengths disagree"
        check_ids(tokens, self._vocab, dataset.prefix)


class BlendedSamples:
    """Several sets mixed by weight: sample n is the next unread sample of the set furthest behind its share."""

    def __init__(self, sets: Sequence[GptSamples], blend: Blend) -> None:
        self._sets, self._blend, self.n_samples = sets, blend, len(blend)

    def batch(self, samples: Sequence[int]) -> Batch:
        return _read_batch(self._read, samples, self._sets[0])

    def _read(self, sample: int, tokens: np.ndarray, documents: np.ndarray | None) -> None:
        if not 0 <= sample < self.n_samples:
            raise ValueError(f"sample {sample} of {self.n_samples} asked from a blend")
        self._sets[self._blend.source[sample]].read(int(self._blend.sample[sample]), tokens, documents)


def _read_batch(
    read: Callable[[int, np.ndarray, np.ndarray | None], None], samples: Sequence[int], shape: GptSamples
) -> Batch:
    tokens = np.empty((len(samples), shape.sequence_length + 1), np.int64)
    documents = np.empty(tokens.shape, np.int32) if shape.documents else None
    for row, sample in enumerate(samples):
        read(sample, tokens[row], None if documents is None else documents[row])
    return make_batch(tokens[:, :-1], tokens[:, 1:], None if documents is None else documents[:, :-1])
