"""Training sets: samples of L+1 tokens read from memory-mapped corpora in Megatron's order, alone or in a blend."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megalite.data.batch import Batch, check_ids, make_batch
from megalite.data.blend import Blend
from megalite.data.indexed import IndexedDataset
from megalite.data.samples import cached_sample_index


class GptSamples:
    """Samples of one corpus's sequences [begin, end); they run over document ends.

    Raises UserError when the part is empty or holds ids outside `vocab`.
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
        packing: str,
        cache: Path,
    ) -> None:
        self.dataset, self.n_samples = dataset, n_samples
        self._length, self._vocab, self._packing = sequence_length, vocab, packing
        self._index = cached_sample_index(dataset.lengths[begin:end], begin, sequence_length, n_samples, seed, cache)

    def batch(self, samples: Sequence[int]) -> Batch:
        block = np.empty((len(samples), self._length + 1), np.int64)
        documents = np.empty(block.shape, np.int32) if self._packing == "documents" else None
        for row, sample in enumerate(samples):
            self.read(sample, block[row], None if documents is None else documents[row])
        return make_batch(block[:, :-1], block[:, 1:], None if documents is None else documents[:, :-1])

    def read(self, sample: int, tokens: np.ndarray, documents: np.ndarray | None) -> None:
        """Fill one row of L+1 tokens, and of document numbers when asked for."""
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
    """Several sets mixed by weight: sample n is the next unread sample of the set that lags furthest behind its share."""

    def __init__(self, sets: Sequence[GptSamples], blend: Blend) -> None:
        self._sets, self._blend, self.n_samples = sets, blend, len(blend)
        self._length, self._packing = sets[0]._length, sets[0]._packing

    def batch(self, samples: Sequence[int]) -> Batch:
        block = np.empty((len(samples), self._length + 1), np.int64)
        documents = np.empty(block.shape, np.int32) if self._packing == "documents" else None
        for row, sample in enumerate(samples):
            chosen = self._sets[int(self._blend.source[sample])]
            chosen.read(int(self._blend.sample[sample]), block[row], None if documents is None else documents[row])
        return make_batch(block[:, :-1], block[:, 1:], None if documents is None else documents[:, :-1])
