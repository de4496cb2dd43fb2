"""Writer of Megatron's .bin/.idx pair (layout in `indexed.py`): incremental, synced to disk, complete or absent."""

import errno
import fcntl
import os
from array import array
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np

from megalite.data.files import TEMPORARY, writing
from megalite.data.indexed import BLOCK, CODES, HEADER, MAGIC, data_path, index_path
from megalite.disk import sync
from megalite.errors import UserError


def token_dtype(vocab: int) -> np.dtype:
    """Megatron's rule: u16 below 65,500 ids, else i32."""
    return np.dtype("<u2" if vocab < 65500 else "<i4")


class IndexedWriter:
    """Writes a pair piece by piece; it appears when the `with` block ends without an error, or not at all.

    The index appears last and an old one goes first, so a kill at any instant leaves the old pair, no pair, or the new
    one. `beside` {suffix: text} are files that belong to the pair and appear with it. A second writer of the same
    prefix is refused; what a killed one left behind is overwritten.
    """

    def __init__(self, prefix: str | Path, vocab: int, key: str = "output") -> None:
        self.dtype, self.beside = token_dtype(vocab), dict[str, str]()
        self._prefix, self._vocab, self._key = Path(prefix), vocab, key
        self._lengths, self._open = array("i"), 0
        self._temporary = self._prefix.with_name(TEMPORARY + self._prefix.name)
        with writing(self._prefix, key):
            self._prefix.parent.mkdir(parents=True, exist_ok=True)
            self._data = self._claim(data_path(self._temporary))

    @property
    def n_documents(self) -> int:
        return len(self._lengths)

    def add(self, tokens: np.ndarray, end: bool = True) -> None:
        """Append `tokens` to the open document and, with `end`, close it. Ids must be in [0, vocab)."""
        assert not len(tokens) or (tokens.min() >= 0 and tokens.max() < self._vocab), "token id outside the vocabulary"
        with writing(self._prefix, self._key):
            self._data.write(tokens.astype(self.dtype, copy=False).tobytes())
        self._open += len(tokens)
        if self._open > np.iinfo(np.int32).max:
            raise UserError(
                f"{self._key}: a document of {self._open} tokens is longer than the format allows; split it"
            )
        if end:
            self._lengths.append(self._open)
            self._open = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                with writing(self._prefix, self._key):
                    self._finish()
        finally:
            for suffix in (".bin", ".idx", *self.beside):
                Path(f"{self._temporary}{suffix}").unlink(missing_ok=True)
            self._data.close()

    def _claim(self, path: Path) -> BinaryIO:
        """Open `path` and lock it; the lock dies with its process."""
        while True:
            handle = open(path, "ab")  # noqa: SIM115 closed by __exit__
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                handle.close()
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    raise
                raise UserError(
                    f"{self._key}: another process is writing {self._prefix}; wait for it to end"
                ) from error
            if path.exists() and os.path.samestat(os.fstat(handle.fileno()), path.stat()):
                handle.truncate(0)
                return handle
            handle.close()  # its writer renamed or removed it between our open and our lock

    def _finish(self) -> None:
        assert self._open == 0, "the last document was not ended"
        self._data.flush()
        os.fsync(self._data.fileno())
        self._write_index(index_path(self._temporary))
        for suffix, text in self.beside.items():
            path = Path(f"{self._temporary}{suffix}")
            path.write_text(text, encoding="utf-8")
            sync(path)
        index_path(self._prefix).unlink(missing_ok=True)
        for suffix in (".bin", *self.beside, ".idx"):
            os.replace(f"{self._temporary}{suffix}", f"{self._prefix}{suffix}")
        sync(self._prefix.parent)

    def _write_index(self, path: Path) -> None:
        code = next(code for code, name in CODES.items() if np.dtype(name) == self.dtype)
        lengths, at = np.frombuffer(self._lengths, np.int32) if self._lengths else np.empty(0, np.int32), 0
        with open(path, "wb") as index:
            index.write(HEADER.pack(MAGIC, 1, code, len(lengths), len(lengths) + 1))
            index.write(lengths.astype("<i4", copy=False).tobytes())
            for begin in range(0, len(lengths), BLOCK):
                sizes = lengths[begin : begin + BLOCK].astype(np.int64) * self.dtype.itemsize
                index.write((at + np.cumsum(sizes) - sizes).astype("<i8", copy=False).tobytes())
                at += int(sizes.sum())
            index.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())
            index.flush()
            os.fsync(index.fileno())
