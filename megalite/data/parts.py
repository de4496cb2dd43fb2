"""Opens what the configuration names: indexed corpora, the embedded one (tokenized once, cached), their tokenizer."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megalite.config.schema import DataConfig
from megalite.data.corpus import Corpus, embedded_corpus
from megalite.data.files import cached_folder
from megalite.data.indexed import IndexedDataset, check_exists
from megalite.data.indexed_writer import IndexedWriter
from megalite.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from megalite.errors import UserError
from megalite.progress import Progress

EMBEDDED = "embedded"
_BATCH = 1 << 20  # characters tokenized between two movements of the progress bar


@dataclass(frozen=True)
class Part:
    """Sequences [begin, end) of a corpus: what one set reads. `cache`: where its sample order is kept."""

    name: str
    dataset: IndexedDataset
    begin: int
    end: int
    cache: Path

    def tokens(self) -> np.ndarray:
        return self.dataset.tokens[self.dataset.start(self.begin) : self.dataset.start(self.end)]


@dataclass(frozen=True)
class Opened:
    """The parts named by the configuration, all in ids of `tokenizer`; `notes` say what they are, for people."""

    train: list[Part]
    validation: list[Part]
    tokenizer: Tokenizer
    notes: list[str]


def open_parts(data: DataConfig) -> Opened:
    """Open every corpus, training the BPE and tokenizing the embedded corpus if that was never done.

    Raises UserError for missing or damaged files, a bad split, or a tokenizer that a corpus was not built with.
    """
    prefixes = list(data.blend) or [data.path]
    for prefix in prefixes:  # before the tokenizer: a mistyped path must not look like a missing tokenizer
        if prefix != EMBEDDED:
            check_exists(prefix, "data.blend" if data.blend else "data.path")
    for name, prefix in data.validation.items():
        check_exists(prefix, f"data.validation.{name}")
    tokenizer, notes = _tokenizer(data, prefixes), list[str]()
    train, validation = [], []
    for prefix in prefixes:
        if prefix == EMBEDDED:
            corpus = embedded_corpus(_split(data.split)[1], data.max_bytes)
            notes += corpus.notes
            folder, tokenizer = _tokenized(data, corpus, tokenizer)
            train.append(_whole(EMBEDDED, folder / "train", folder.parent))
            validation.append(_whole(EMBEDDED, folder / "validation", folder.parent))
        else:
            both = _whole(Path(prefix).name, prefix, cache_folder(data, prefix))
            share, rest = (0.0, 0.0) if data.validation else _split(data.split)
            cut = both.end if data.validation else round(share * both.end)  # Megatron's rounding
            end = both.end if data.validation else round((share + rest) * both.end)
            train.append(Part(both.name, both.dataset, 0, cut, both.cache))
            validation.append(Part(both.name, both.dataset, cut, end, both.cache))
            notes.append(f"corpus: {prefix}, {len(both.dataset)} documents, {len(both.dataset.tokens)} tokens")
    if data.validation:
        validation = [_whole(name, path, cache_folder(data, path)) for name, path in data.validation.items()]
    assert tokenizer is not None
    for part in train + validation:
        _check_fits(part.dataset.prefix, tokenizer)
    return Opened(train, [part for part in validation if part.end > part.begin], tokenizer, notes)


def cache_folder(data: DataConfig, prefix: str) -> Path:
    if data.cache:
        return Path(data.cache).expanduser()
    return Path.home() / ".cache" / "megalite" / "data" if prefix == EMBEDDED else Path(f"{prefix}.cache")


def _whole(name: str, prefix: str | Path, cache: Path) -> Part:
    dataset = IndexedDataset(prefix)
    return Part(name, dataset, 0, len(dataset), cache)


def _tokenized(data: DataConfig, corpus: Corpus, tokenizer: Tokenizer | None) -> tuple[Path, Tokenizer]:
    """Folder of the tokenized corpus, and its tokenizer: the given one, or a BPE trained on the training part."""
    from tokenizers import __version__ as version

    how = tokenizer.fingerprint if tokenizer else f"bpe {data.vocab} by tokenizers {version}"
    settings = json.dumps([corpus.digest, how])

    def build(folder: Path) -> None:
        chosen = tokenizer or _trained(corpus.train, data.vocab)
        chosen.save(folder / "tokenizer.json")
        total = sum(map(len, corpus.train)) + sum(map(len, corpus.validation))
        with Progress("tokenizing", total, "characters") as bar:
            for name, documents in (("train", corpus.train), ("validation", corpus.validation)):
                with IndexedWriter(folder / name, chosen.vocab, "data.cache") as writer:
                    for batch in _batches(documents):
                        for tokens in chosen.encode_batch(batch):
                            writer.add(np.append(tokens, np.int32(chosen.eod)))
                        bar.advance(sum(map(len, batch)))

    name = f"embedded-{hashlib.sha256(settings.encode()).hexdigest()[:32]}"
    folder = cached_folder(cache_folder(data, EMBEDDED) / name, "data.cache", build)
    return folder, tokenizer or load_tokenizer(folder / "tokenizer.json")


def _trained(documents: list[str], vocab: int) -> Tokenizer:
    with Progress("training the tokenizer", sum(map(len, documents)), "characters") as bar:

        def texts() -> Iterator[str]:
            for text in documents:
                bar.advance(len(text))
                yield text

        return train_bpe(texts(), vocab)


def _batches(documents: list[str]) -> Iterator[list[str]]:
    batch, size = list[str](), 0
    for text in documents:
        batch.append(text)
        size += len(text)
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _tokenizer(data: DataConfig, prefixes: list[str]) -> Tokenizer | None:
    """The configured tokenizer; None: a BPE still to be trained on the embedded corpus."""
    if data.tokenizer != "bpe":
        return load_tokenizer(data.tokenizer)
    if prefixes == [EMBEDDED]:
        return None
    beside = [Path(f"{prefix}.tokenizer.json") for prefix in prefixes]
    found = next((path for path in beside if path.is_file()), None)
    if found is None:
        raise UserError(
            f"data.tokenizer: 'bpe' needs {beside[0]}, which does not exist;"
            " give the tokenizer.json that the dataset was built with"
        )
    return load_tokenizer(found)


def _check_fits(prefix: str, tokenizer: Tokenizer) -> None:
    """A corpus built by `data build` says which vocabulary its ids belong to."""
    facts = Path(f"{prefix}.json")
    if not facts.is_file():
        return
    try:
        vocabulary = json.loads(facts.read_text(encoding="utf-8"))["vocabulary"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{facts}: not the facts of a dataset ({error!r}); remove it or build the dataset again"
        ) from error
    if vocabulary != tokenizer.vocabulary:
        raise UserError(
            f"data.tokenizer: {prefix} was built with another vocabulary; leave data.tokenizer at its default"
            f" to use {prefix}.tokenizer.json, or build the dataset again"
        )


def _split(text: str) -> tuple[float, float]:
    """Shares of training and validation in '0.95,0.05' or Megatron's '969,30,1', normalised."""
    try:
        shares = [float(share) for share in text.split(",")]
    except ValueError:
        shares = []
    if not 1 <= len(shares) <= 3 or not all(0 <= share < float("inf") for share in shares) or shares[0] == 0:
        raise UserError(f"data.split: '{text}' is not a list of shares; write for example 0.95,0.05")
    total = sum(shares)
    return shares[0] / total, (shares[1] / total if len(shares) > 1 else 0.0)
