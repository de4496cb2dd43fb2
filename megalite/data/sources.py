"""Documents out of text, JSONL and Parquet files (also .gz and .zst), in order and in bounded memory.

A text file is one document; a JSONL line or Parquet row is one. Nothing is cleaned: what cannot be read is an error
that names file and line, and what holds no text is counted.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from glob import glob
from pathlib import Path
from typing import NamedTuple

from megalite.data.streams import COMPRESSED, open_seekable, open_stream
from megalite.data.words import segments
from megalite.errors import UserError

FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet", ".pq": "parquet"}
_BLOCK = 1 << 22  # bytes of a text file read, and about the characters tokenized, at once
_LONGEST_LINE = 1 << 28


class Piece(NamedTuple):
    """Part of a document's text; `end`: its last one."""

    text: str
    end: bool


class Reader:
    """Iterate for the pieces of all documents of `inputs`: files, patterns, or whole folders, in order of names.

    `format`: auto (by name, anything unknown is text), text, jsonl or parquet. `key`: JSON field or Parquet column.
    total: bytes of all files; position: bytes read so far; counts: what was left out or cut, for people.
    Raises UserError for a missing or unreadable file, bad UTF-8, a malformed line, a missing key or column.
    """

    def __init__(self, inputs: Iterable[str | Path], format: str = "auto", key: str = "text") -> None:
        self.counts: Counter[str] = Counter()
        self._format, self._key = format, key
        self.files = [file for path in inputs for file in self._find(Path(path).expanduser())]
        if not self.files:
            raise UserError("input: no files in it; give files or folders of text, JSONL or Parquet")
        self.total = sum(file.stat().st_size for file in self.files)
        self.position = 0

    def __iter__(self) -> Iterator[Piece]:
        before = 0
        for path in self.files:
            read = {"text": self._text, "jsonl": self._jsonl, "parquet": self._parquet}[self._kind(path)]
            for piece, position in read(path):
                self.position = before + position
                yield piece
            before += path.stat().st_size
            self.position = before

    def _find(self, path: Path) -> list[Path]:
        if path.is_file():
            return [path]
        if any(sign in str(path) for sign in "*?[") and not path.exists():
            return [file for file in map(Path, sorted(glob(str(path), recursive=True))) if file.is_file()]
        if not path.is_dir():
            raise UserError(f"input: {path} does not exist; give files or folders of text, JSONL or Parquet")
        found = []
        for file in sorted(path.rglob("*")):
            if any(part.startswith(".") for part in file.relative_to(path).parts):
                self.counts["hidden files left out"] += file.is_file()
            elif file.is_file():
                found.append(file)
        return found

    def _kind(self, path: Path) -> str:
        if self._format != "auto":
            return self._format
        return FORMATS.get((Path(path.stem) if path.suffix in COMPRESSED else path).suffix.lower(), "text")

    def _text(self, path: Path) -> Iterator[tuple[Piece, int]]:
        rest, at, pieces = b"", 0, 0
        with open_stream(path) as (stream, raw):
            while block := stream.read(_BLOCK):
                block = rest + block
                cut = _cut(block) if len(block) >= _BLOCK else 0
                if cut:
                    yield Piece(_decoded(block[:cut], path, at), False), raw.tell()
                    pieces += 1
                rest, at = block[cut:], at + cut
            if pieces == 0 and not rest:
                self.counts["empty documents left out"] += 1
                return
            yield Piece(_decoded(rest, path, at), True), raw.tell()
            self.counts["long documents tokenized in parts"] += pieces > 0

    def _jsonl(self, path: Path) -> Iterator[tuple[Piece, int]]:
        number = 0
        with open_stream(path) as (stream, raw):
            while line := stream.readline(_LONGEST_LINE):
                number += 1
                if len(line) == _LONGEST_LINE:
                    raise UserError(
                        f"{path}:{number}: a line of more than {_LONGEST_LINE >> 20} MiB; is it JSONL? split it"
                    )
                if line.isspace():
                    self.counts["blank lines left out"] += 1
                    continue
                for piece in self._document(self._field(line, f"{path}:{number}"), f"{path}:{number}"):
                    yield piece, raw.tell()

    def _field(self, line: bytes, where: str) -> object:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not JSON ({error}); each line must be a JSON object") from error
        if not isinstance(row, dict):
            raise UserError(f"{where}: {type(row).__name__} where a JSON object is wanted; each line must be one")
        if self._key not in row:
            raise UserError(
                f"{where}: no field '{self._key}'; it has {', '.join(map(str, row)) or 'none'}; set key=FIELD"
            )
        return row[self._key]

    def _parquet(self, path: Path) -> Iterator[tuple[Piece, int]]:
        import pyarrow
        import pyarrow.parquet

        row, size = 0, path.stat().st_size
        try:
            with open_seekable(path) as plain, pyarrow.parquet.ParquetFile(plain) as file:
                names = file.schema_arrow.names
                if self._key not in names:
                    raise UserError(f"{path}: no column '{self._key}'; it has {', '.join(names)}; set key=COLUMN")
                for batch in file.iter_batches(batch_size=256, columns=[self._key]):
                    for value in batch.column(0).to_pylist():
                        row += 1
                        for piece in self._document(value, f"{path}: row {row}"):
                            yield piece, size * row // file.metadata.num_rows
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{path}: not a readable Parquet file ({error}); write it again") from error

    def _document(self, value: object, where: str) -> Iterator[Piece]:
        if value is None or value == "":
            self.counts["empty documents left out"] += 1
            return
        if not isinstance(value, str):
            raise UserError(
                f"{where}: '{self._key}' is {type(value).__name__}, not text; set key to the field with the text"
            )
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{where}: half a surrogate pair, which is no character ({error}); repair the line"
            ) from error
        parts = segments(value, _BLOCK)
        self.counts["long documents tokenized in parts"] += len(parts) > 1
        for number, part in enumerate(parts, start=1):
            yield Piece(part, number == len(parts))


def _cut(block: bytes) -> int:
    """Where to end a piece: before the last line break after a letter, else at a line, else between two characters."""
    at = len(block)
    while (at := block.rfind(b"\n", 0, at)) > 0:
        if block[at - 1 : at].isalpha():
            return at
        if at < len(block) // 2:
            break
    at = block.rfind(b"\n") + 1 or len(block)
    if at == len(block):
        at = max(at - 4, 0)
        while at > 0 and block[at] & 0xC0 == 0x80:
            at -= 1
    return at


def _decoded(content: bytes, path: Path, at: int) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 at byte {at + error.start} ({error.reason}); convert it, for example with iconv"
        ) from error
