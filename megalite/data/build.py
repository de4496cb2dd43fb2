"""`data build`: documents to a .bin/.idx pair with a tokenizer, in parallel processes, in the order of the input.

Needs no torch. Batches of about a megabyte of text go to the workers and come back in order; no more than a few are
in flight, so memory stays bounded however big the input is.
"""

import json
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from megalite.data.indexed import index_path
from megalite.data.indexed_writer import IndexedWriter
from megalite.data.sources import Piece, Reader
from megalite.data.tokenizer import JsonTokenizer, Tokenizer, load_tokenizer
from megalite.errors import RunError, UserError
from megalite.progress import Progress

_BATCH = 1 << 20  # characters
_ALONE = 1 << 23  # bytes of input below which starting workers takes longer than it saves
_worker: list[Tokenizer] = []  # the tokenizer of a worker process, set once when it starts


@dataclass(frozen=True)
class Built:
    """What a build did. left_out: what was not written and why, with counts."""

    documents: int
    tokens: int
    text_bytes: int
    seconds: float
    left_out: dict[str, int]


def build_dataset(
    reader: Reader, prefix: str | Path, tokenizer: Tokenizer, workers: int = 0, overwrite: bool = False
) -> Built:
    """Write PREFIX.bin, PREFIX.idx, PREFIX.tokenizer.json and PREFIX.json (facts), complete or not at all.

    Every document ends with the tokenizer's end-of-document. workers: processes; 0: one a core.
    Raises UserError when the output exists, the input is bad or empty, or the disk refuses.
    """
    check_output(prefix, overwrite)
    started, text_bytes, tokens = time.perf_counter(), 0, 0
    end_of_document = np.array([tokenizer.eod])
    with IndexedWriter(prefix, tokenizer.vocab) as writer, Progress("tokenizing", reader.total, "B") as bar:
        for pieces, ids, position in _tokenized(reader, tokenizer, workers or len(os.sched_getaffinity(0))):
            for piece, part in zip(pieces, ids, strict=True):
                writer.add(np.append(part, end_of_document) if piece.end else part, piece.end)
                tokens += len(part) + piece.end
                text_bytes += len(piece.text.encode())
            bar.advance(position - bar.done)
        if writer.n_documents == 0:
            raise UserError("input: not one document with text in it; nothing was written")
        built = Built(writer.n_documents, tokens, text_bytes, time.perf_counter() - started, dict(+reader.counts))
        facts = {"documents": built.documents, "tokens": tokens, "text_bytes": text_bytes, "left_out": built.left_out}
        facts |= {"vocabulary": tokenizer.vocabulary, "tokenizer": tokenizer.fingerprint}
        facts |= {"inputs": [{"name": file.name, "bytes": file.stat().st_size} for file in reader.files]}
        writer.beside = {f".{name}": content for name, content in tokenizer.files().items()}
        writer.beside[".json"] = json.dumps(facts, indent=1) + "\n"
    return built


def check_output(prefix: str | Path, overwrite: bool) -> None:
    """Refuse to replace an existing pair unasked."""
    if index_path(prefix).exists() and not overwrite:
        raise UserError(f"output: {index_path(prefix)} exists; choose another prefix or set overwrite=true")


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch, size = list[Piece](), 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _tokenized(
    reader: Reader, tokenizer: Tokenizer, workers: int
) -> Iterator[tuple[list[Piece], list[np.ndarray], int]]:
    """(pieces, ids of each, position in the input after them), in order."""
    if workers == 1 or reader.total < _ALONE:
        for batch in _batches(reader):
            yield batch, tokenizer.encode_batch([piece.text for piece in batch]), reader.position
        return
    start = (tokenizer.to_json(), tokenizer.end) if isinstance(tokenizer, JsonTokenizer) else None
    waiting: deque[tuple[list[Piece], Future[list[np.ndarray]], int]] = deque()
    # A fresh interpreter a worker: forking would copy the locks of whatever threads this process runs.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start_worker, initargs=(start,))
    try:
        for batch in _batches(reader):
            waiting.append((batch, pool.submit(_work, [piece.text for piece in batch]), reader.position))
            if len(waiting) > 2 * workers:
                yield _result(*waiting.popleft())
        while waiting:
            yield _result(*waiting.popleft())
    except BrokenProcessPool as error:
        raise RunError("workers: a tokenizing process died, perhaps for want of memory; set fewer workers") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _result(
    batch: list[Piece], ids: Future[list[np.ndarray]], position: int
) -> tuple[list[Piece], list[np.ndarray], int]:
    return batch, ids.result(), position


def _start_worker(start: tuple[str, str] | None) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the library reads it; one thread a worker is what was asked for
    _worker.append(JsonTokenizer(*start) if start else load_tokenizer("bytes"))


def _work(texts: list[str]) -> list[np.ndarray]:
    return _worker[0].encode_batch(texts)
