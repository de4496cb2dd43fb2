"""Reader of Megatron's .bin/.idx pair: token arrays one after the other, and an index of where each begins and ends.

Index, little endian: 9 bytes magic, u64 version, u8 dtype code, u64 S sequences, u64 D document bounds, i32[S] lengths
in tokens, i64[S] byte offsets, i64[D] document bounds as sequence numbers (first 0, last S). A file is hostile until
every one of these is checked against the others and against the size of the files. `indexed_writer.py` writes the pair.
"""

import struct
from pathlib import Path

import numpy as np

from megalite.errors import UserError

HEADER = struct.Struct("<9sQBQQ")
MAGIC = b"MMIDIDX\x00\x00"
CODES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
BLOCK = 1 << 20  # sequences checked or written at once: bounds memory


def index_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.idx")


def data_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.bin")


def check_exists(prefix: str | Path, key: str) -> tuple[Path, Path]:
    """The two files of a pair. Raises UserError, naming the configuration key `key`, when one is missing."""
    for path in (index_path(prefix), data_path(prefix)):
        if not path.is_file():
            raise UserError(f"{key}: {path} does not exist; give the prefix of a .bin/.idx pair (made by `data build`)")
    return index_path(prefix), data_path(prefix)


class IndexedDataset:
    """Memory-mapped, validated pair. Sequences are what gets shuffled; `data build` writes one a document.

    lengths: i32 [S] tokens of each sequence; documents: i64 [D] bounds; tokens: the whole data file, one integer array.
    Raises UserError when either file is missing, foreign, truncated or contradicts itself.
    """

    def __init__(self, prefix: str | Path, key: str = "data.path") -> None:
        self.prefix = str(prefix)
        index, data = check_exists(prefix, key)
        try:
            content = _mapped(index, np.dtype(np.uint8))
            self._size = data.stat().st_size
            self._parse(content, index)
            self.tokens = _mapped(data, self.dtype)
        except OSError as error:
            where = error.filename or index
            raise UserError(f"{key}: cannot read {where} ({error.strerror}); check its permissions") from error

    def __len__(self) -> int:
        return len(self.lengths)

    def start(self, i: int) -> int:
        """Position in `tokens` of sequence `i`'s first token; for i = S, of the end."""
        return int(self._offsets[i]) // self.dtype.itemsize if i < len(self) else len(self.tokens)

    def sequence(self, i: int) -> np.ndarray:
        """Tokens of sequence `i`, a read-only view of the file."""
        return self.tokens[self.start(i) : self.start(i + 1)]

    def _parse(self, content: np.ndarray, path: Path) -> None:
        if len(content) < HEADER.size:
            raise _damaged(path, f"{len(content)} bytes are less than a header")
        magic, version, code, n_sequences, n_bounds = HEADER.unpack(content[: HEADER.size].tobytes())
        again = "build it again with `megalite data build`"
        if magic != MAGIC:
            raise UserError(f"{path}: not a Megatron index (it begins with {magic!r}); {again}")
        if version != 1:
            raise UserError(f"{path}: index version {version} is unknown, 1 is read; {again}")
        if code not in CODES or "f" in CODES[code]:
            raise UserError(f"{path}: token type code {code} is no integer type; {again}")
        wanted = HEADER.size + 12 * n_sequences + 8 * n_bounds
        if len(content) not in (wanted, wanted + n_sequences):  # one more byte a sequence: modes of multimodal files
            what = f"{n_sequences} sequences and {n_bounds} bounds need {wanted} bytes, it has {len(content)}"
            raise _damaged(path, what)
        self.dtype = np.dtype(CODES[code])
        offsets_at, documents_at = HEADER.size + 4 * n_sequences, HEADER.size + 12 * n_sequences
        self.lengths = content[HEADER.size : offsets_at].view("<i4")
        self._offsets = content[offsets_at:documents_at].view("<i8")
        self.documents = content[documents_at : documents_at + 8 * n_bounds].view("<i8")
        self._check(path)

    def _check(self, path: Path) -> None:
        """Lengths, offsets, bounds and the data file's size must tell the same story."""
        item, expected = self.dtype.itemsize, 0
        for at in range(0, len(self.lengths), BLOCK):
            lengths = self.lengths[at : at + BLOCK].astype(np.int64)
            if lengths.min() < 0:
                raise _damaged(path, f"sequence {at + int(lengths.argmin())} has a negative length")
            starts = expected + np.cumsum(lengths * item) - lengths * item
            wrong = np.flatnonzero(self._offsets[at : at + BLOCK] != starts)
            if len(wrong):
                raise _damaged(path, f"sequence {at + int(wrong[0])} does not begin where the one before it ends")
            expected = int(starts[-1] + lengths[-1] * item)
        if expected != self._size:
            raise UserError(
                f"{data_path(self.prefix)}: {self._size} bytes, its index promises {expected}; copy or build it again"
            )
        bounds, n_sequences = self.documents, len(self.lengths)
        if len(bounds) == 0 or bounds[0] != 0 or bounds[-1] != n_sequences:
            raise _damaged(path, f"document bounds do not go from 0 to {n_sequences}")
        for at in range(0, len(bounds), BLOCK):
            block = bounds[at : at + BLOCK + 1]
            if (block[1:] < block[:-1]).any():
                raise _damaged(path, "document bounds go backwards")


def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    """A file as a read-only array; a plain ndarray, because slicing np.memmap is slow."""
    return np.asarray(np.memmap(path, dtype=dtype, mode="r")) if path.stat().st_size else np.empty(0, dtype)


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"{path}: damaged index ({what}); copy or build it again")
