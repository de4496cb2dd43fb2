"""Files as streams of plain bytes: as they are, .gz and .zst, in bounded memory; a cut-off archive is an error."""

import gzip
import io
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO

from megalite.errors import UserError

COMPRESSED = (".gz", ".zst")
_ZSTD_INPUT = 2048  # bytes decompressed at once: zstd makes at most 32 KiB of each, so no archive fills the memory


@contextmanager
def open_stream(path: Path) -> Iterator[tuple[io.BufferedReader, BinaryIO]]:
    """(decompressed stream, the file, whose position tells the progress). Read errors inside become UserError."""
    try:
        with open(path, "rb") as raw:
            if path.suffix == ".gz":
                yield io.BufferedReader(gzip.GzipFile(fileobj=raw), 1 << 18), raw
            elif path.suffix == ".zst":
                yield io.BufferedReader(_Zstd(raw), 1 << 18), raw
            else:
                yield raw, raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: damaged or cut-off archive ({error}); get or compress it again") from error
    except OSError as error:
        raise UserError(
            f"{path}: cannot read ({error.strerror or error}); check the path and its permissions"
        ) from error


@contextmanager
def open_seekable(path: Path) -> Iterator[Path | IO[bytes]]:
    """The file, or what it holds unpacked into a temporary file, for formats that are not read from front to back."""
    if path.suffix not in COMPRESSED:
        yield path
        return
    with open_stream(path) as (stream, _), tempfile.TemporaryFile() as file:
        shutil.copyfileobj(stream, file)
        yield file


class _Zstd(io.RawIOBase):
    """Decompresses the frames of `raw` one after the other; raises EOFError when the last one is cut off."""

    def __init__(self, raw: BinaryIO) -> None:
        import zstandard

        self._raw, self._decompressor, self._error = raw, zstandard.ZstdDecompressor(), zstandard.ZstdError
        self._frame = self._decompressor.decompressobj()
        self._begun, self._waiting, self._ready = False, b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._ready:
            chunk = self._waiting or self._raw.read(_ZSTD_INPUT)
            if not chunk:
                if self._begun:
                    raise EOFError("the last zstd frame ends early")
                return 0
            self._ready, self._waiting = memoryview(self._decompress(chunk)), b""
            if self._frame.eof:
                self._waiting = self._frame.unused_data
                self._frame, self._begun = self._decompressor.decompressobj(), False
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _decompress(self, chunk: bytes) -> bytes:
        self._begun = True
        try:
            return self._frame.decompress(chunk)
        except self._error as error:
            raise EOFError(str(error)) from error
