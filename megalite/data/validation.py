"""Validation sets: every token of every document is a target exactly once, in the order of the file."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from megalite.data.batch import NOT_COUNTED, Batch, check_ids, make_batch
from megalite.data.indexed import IndexedDataset

_BLOCK = 1 << 22  # tokens looked up at once


class ValidationSet:
    """Sequences [begin, end) of a corpus laid end to end and cut into rows of `sequence_length` targets.

    A document's first token is predicted from the end-of-document token before it (the very first from one put there);
    the last row is filled up with targets that are not counted.
    """

    def __init__(
        self,
        name: str,
        dataset: IndexedDataset,
        begin: int,
        end: int,
        *,
        sequence_length: int,
        eod: int,
        token_bytes: np.ndarray,
        documents: bool,
    ) -> None:
        self.name, self._dataset, self._length, self._eod = name, dataset, sequence_length, eod
        self._token_bytes, self._with_documents = token_bytes, documents
        self._first, self._last = dataset.start(begin), dataset.start(end)
        self._begin, self._end = begin, end
        self.n_tokens = self._last - self._first
        self.n_samples = -(-self.n_tokens // sequence_length)

    @cached_property
    def n_bytes(self) -> int:
        """UTF-8 bytes that all targets stand for."""
        total = 0
        for at in range(self._first, self._last, _BLOCK):
            tokens = self._dataset.tokens[at : min(at + _BLOCK, self._last)]
            check_ids(tokens, len(self._token_bytes), self._dataset.prefix)
            total += int(self._token_bytes[tokens].sum())
        return total

    def batch(self, samples: Sequence[int]) -> Batch:
        shape = (len(samples), self._length)
        tokens, targets = np.full(shape, self._eod, np.int64), np.full(shape, NOT_COUNTED, np.int64)
        documents = np.zeros(shape, np.int32) if self._with_documents else None
        for row, sample in enumerate(samples):
            if not 0 <= sample < self.n_samples:
                raise ValueError(f"validation set {self.name} has no sample {sample}, only {self.n_samples}")
            start = self._first + sample * self._length
            read = self._dataset.tokens[start : min(start + self._length, self._last)]
            targets[row, : len(read)] = read
            tokens[row, 1 : len(read)] = read[:-1]
            if sample:
                tokens[row, 0] = self._dataset.tokens[start - 1]
            check_ids(targets[row, : len(read)], len(self._token_bytes), self._dataset.prefix)
            if documents is not None:
                documents[row] = self._document_numbers(start)
        return make_batch(tokens, targets, documents)

    def _document_numbers(self, start: int) -> np.ndarray:
        """Numbers inside a row with inputs start-1, start, …; the token put before the very first is on its own."""
        inputs = np.arange(start - 1, start - 1 + self._length)
        numbers = np.searchsorted(self._ends, inputs, side="right").astype(np.int32)
        if start == self._first:
            numbers[1:] += 1
        return numbers - numbers[0]

    @cached_property
    def _ends(self) -> np.ndarray:
        """Position after each sequence's last token."""
        return self._first + np.cumsum(self._dataset.lengths[self._begin : self._end], dtype=np.int64)
