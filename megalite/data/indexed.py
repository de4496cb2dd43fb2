"""Megatron's .bin/.idx pair: token arrays one after the other, and an index that says where each begins and ends.

Index, little endian: 9 bytes magic, u64 version, u8 dtype code, u64 S sequences, u64 D document bounds, i32[S] lengths
in tokens, i64[S] byte offsets, i64[D] document bounds as sequence numbers (first 0, last S). A file is hostile until
every one of these is checked against the others and against the size of the files.
"""

import os
import struct
from array import array
from pathlib import Path
from typing import Self

import numpy as np

from megalite.data.files import TEMPORARY, sync, writing
from megalite.errors import UserError

_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\x00\x00"
_CODES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
_BLOCK = 1 << 20  # sequences checked or written at once: bounds memory


def token_dtype(vocab: int) -> np.dtype:
    """Megatron's rule: u16 below 65,500 ids, else i32."""
    return np.dtype("<u2" if vocab < 65500 else "<i4")


def index_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.idx")


def data_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.bin")


class IndexedDataset:
    """Memory-mapped, validated pair. Sequences are what gets shuffled; `data build` writes one a document.

    lengths: i32 [S] tokens; starts: i64 [S] position of the first token, in tokens; documents: i64 [D] bounds;
    tokens: the whole data file as one integer array.
    Raises UserError when either file is missing, foreign, truncated or contradicts itself.
    """

    def __init__(self, prefix: str | Path, key: str = "data.path") -> None:
        self.prefix = str(prefix)
        index, data = index_path(prefix), data_path(prefix)
        for path in (index, data):
            if not path.is_file():
                raise UserError(
                    f"{key}: {path} does not exist; give the prefix of a .bin/.idx pair (`megalite data build` makes one)"
                )
        try:
            content = np.memmap(index, dtype=np.uint8, mode="r") if index.stat().st_size else np.empty(0, np.uint8)
            self._size = data.stat().st_size
            self._parse(content, index)
            self.tokens = np.memmap(data, dtype=self.dtype, mode="r") if self._size else np.empty(0, self.dtype)
        except OSError as error:
            raise UserError(
                f"{key}: cannot read {error.filename or index} ({error.strerror}); check its permissions"
            ) from error

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def n_tokens(self) -> int:
        return len(self.tokens)

    def sequence(self, i: int) -> np.ndarray:
        """Tokens of sequence `i`, a read-only view of the file."""
        start = int(self._pointers[i]) // self.dtype.itemsize
        return self.tokens[start : start + int(self.lengths[i])]

    def span(self, begin: int, end: int) -> tuple[int, int]:
        """First and last-plus-one position in `tokens` of the sequences [begin, end)."""
        if begin >= end:
            return 0, 0
        item = self.dtype.itemsize
        return int(self._pointers[begin]) // item, int(self._pointers[end - 1]) // item + int(self.lengths[end - 1])

    def start(self, i: int) -> int:
        """Position in `tokens` of sequence `i`'s first token."""
        return int(self._pointers[i]) // self.dtype.itemsize

    def _parse(self, content: np.ndarray, path: Path) -> None:
        if len(content) < _HEADER.size:
            raise _damaged(path, f"{len(content)} bytes are less than a header")
        magic, version, code, n_sequences, n_bounds = _HEADER.unpack(content[: _HEADER.size].tobytes())
        if magic != _MAGIC:
            raise UserError(
                f"{path}: not a Megatron index (it begins with {magic!r}); build one with `megalite data build`"
            )
        if version != 1:
            raise UserError(
                f"{path}: index version {version} is unknown, 1 is read; build it again with `megalite data build`"
            )
        if code not in _CODES or "f" in _CODES[code]:
            raise UserError(
                f"{path}: token type code {code} is no integer type; build it again with `megalite data build`"
            )
        wanted = _HEADER.size + 12 * n_sequences + 8 * n_bounds
        if len(content) not in (wanted, wanted + n_sequences):  # one more byte a sequence: modes of multimodal files
            raise _damaged(
                path, f"{n_sequences} sequences and {n_bounds} bounds need {wanted} bytes, it has {len(content)}"
            )
        self.dtype = np.dtype(_CODES[code])
        pointers_at, documents_at = _HEADER.size + 4 * n_sequences, _HEADER.size + 12 * n_sequences
        self.lengths = content[_HEADER.size : pointers_at].view("<i4")
        self._pointers = content[pointers_at:documents_at].view("<i8")
        self.documents = content[documents_at : documents_at + 8 * n_bounds].view("<i8")
        self._check(path)

    def _check(self, path: Path) -> None:
        """Lengths, offsets, bounds and the data file's size must tell the same story."""
        item, expected = self.dtype.itemsize, 0
        for at in range(0, len(self.lengths), _BLOCK):
            lengths = self.lengths[at : at + _BLOCK].astype(np.int64)
            if lengths.min() < 0:
                raise _damaged(path, f"sequence {at + int(lengths.argmin())} has a negative length")
            ends = expected + np.cumsum(lengths * item)
            wrong = np.flatnonzero(self._pointers[at : at + _BLOCK] != ends - lengths * item)
            if len(wrong):
                raise _damaged(path, f"sequence {at + int(wrong[0])} does not begin where the one before it ends")
            expected = int(ends[-1])
        if expected != self._size:
            raise UserError(
                f"{data_path(self.prefix)}: {self._size} bytes, but its index promises {expected}; copy or build it again"
            )
        bounds, n_sequences = self.documents, len(self.lengths)
        if len(bounds) == 0 or bounds[0] != 0 or bounds[-1] != n_sequences:
            raise _damaged(path, f"document bounds do not go from 0 to {n_sequences}")
        for at in range(0, len(bounds), _BLOCK):
            block = bounds[at : at + _BLOCK + 1]
            if (block[1:] < block[:-1]).any():
                raise _damaged(path, "document bounds go backwards")


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"{path}: damaged index ({what}); copy or build it again")


class IndexedWriter:
    """Writes a pair piece by piece; it appears, complete, when the `with` block ends, or not at all.

    An existing pair loses its index first, so a kill at any instant leaves the old pair, no pair, or the new one.
    """

    def __init__(self, prefix: str | Path, vocab: int, key: str = "output") -> None:
        self.dtype, self._prefix, self._key, self._vocab = token_dtype(vocab), Path(prefix), key, vocab
        self._lengths, self._bounds, self._open = array("i"), array("q", [0]), 0
        self._temporary = self._prefix.with_name(f"{TEMPORARY}{self._prefix.name}.{os.getpid()}")
        with writing(self._prefix, key):
            self._prefix.parent.mkdir(parents=True, exist_ok=True)
            self._data = open(data_path(self._temporary), "wb")

    def add(self, tokens: np.ndarray, end: bool = True) -> None:
        """Append `tokens` to the open document and, with `end`, close it. Ids must be in [0, vocab)."""
        assert not len(tokens) or (tokens.min() >= 0 and tokens.max() < self._vocab), "token id outside the vocabulary"
        with writing(self._prefix, self._key):
            self._data.write(tokens.astype(self.dtype, copy=False).tobytes())
        self._open += len(tokens)
        if end:
            if self._open > np.iinfo(np.int32).max:
                raise UserError(
                    f"{self._prefix}: a document of {self._open} tokens is longer than the format allows; split it"
                )
            self._lengths.append(self._open)
            self._bounds.append(len(self._lengths))
            self._open = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                with writing(self._prefix, self._key):
                    self._finish()
        finally:
            self._data.close()
            for path in (data_path(self._temporary), index_path(self._temporary)):
                path.unlink(missing_ok=True)

    def _finish(self) -> None:
        assert self._open == 0, "the last document was not ended"
        self._data.flush()
        os.fsync(self._data.fileno())
        code = next(code for code, name in _CODES.items() if np.dtype(name) == self.dtype)
        with open(index_path(self._temporary), "wb") as index:
            index.write(_HEADER.pack(_MAGIC, 1, code, len(self._lengths), len(self._bounds)))
            index.write(np.frombuffer(self._lengths, np.int32).astype("<i4", copy=False))
            at = 0
            for begin in range(0, len(self._lengths), _BLOCK):
                sizes = np.array(self._lengths[begin : begin + _BLOCK], np.int64) * self.dtype.itemsize
                index.write((at + np.cumsum(sizes) - sizes).astype("<i8", copy=False))
                at += int(sizes.sum())
            index.write(np.frombuffer(self._bounds, np.int64).astype("<i8", copy=False))
            index.flush()
            os.fsync(index.fileno())
        index_path(self._prefix).unlink(missing_ok=True)
        os.replace(data_path(self._temporary), data_path(self._prefix))
        os.replace(index_path(self._temporary), index_path(self._prefix))
        sync(self._prefix.parent)
