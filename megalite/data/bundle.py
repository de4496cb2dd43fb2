"""From the configuration to everything the trainer reads: training set, validation sets, tokenizer."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from megalite.config.schema import Config, DataConfig
from megalite.data.batch import TrainingSet
from megalite.data.blend import build_blend, normalised, samples_wanted
from megalite.data.corpus import Corpus, embedded_corpus
from megalite.data.files import cached_folder
from megalite.data.indexed import IndexedDataset, IndexedWriter
from megalite.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from megalite.data.training import BlendedSamples, GptSamples
from megalite.data.validation import ValidationSet
from megalite.errors import UserError

EMBEDDED = "embedded"
_LARGEST_TEXT = 1 << 30  # bytes of text that raw_bytes puts into memory


@dataclass(frozen=True)
class Part:
    """Sequences [begin, end) of a corpus: what one set reads."""

    name: str
    dataset: IndexedDataset
    begin: int
    end: int

    def tokens(self) -> np.ndarray:
        first, last = self.dataset.span(self.begin, self.end)
        return self.dataset.tokens[first:last]


@dataclass
class DataBundle:
    """What `prepare_data` made. token_bytes: int64 [vocab] UTF-8 bytes of each id, 0 for end-of-document."""

    train: TrainingSet
    validation: list[ValidationSet]
    tokenizer: Tokenizer
    token_bytes: np.ndarray
    notes: list[str] = field(default_factory=list)  # for the run's header: what is read, what was left out
    parts: dict[str, list[Part]] = field(default_factory=dict)

    def raw_bytes(self, split: Literal["train", "validation"]) -> bytes:
        """The text behind a split, decoded from its tokens, documents end to end in the order of the files.

        Raises UserError when the tokenizer changes text or the text is too big for memory.
        """
        if not self.tokenizer.byte_exact:
            raise UserError(
                "data.tokenizer: it changes the text it reads, so the text cannot be recovered; set log.baselines=false"
            )
        parts = self.parts[split]
        size = sum(len(part.tokens()) for part in parts)
        if size > _LARGEST_TEXT:
            raise UserError(f"log.baselines: {size} tokens are too many to hold as text; set log.baselines=false")
        return b"".join(self.tokenizer.decode_bytes(part.tokens().tolist()) for part in parts)


def prepare_data(config: Config, samples: int) -> DataBundle:
    """Everything for `samples` training samples, from caches where they exist, else built into them.

    Safe on several processes at once: one builds, the others wait for it. Raises UserError for missing or damaged
    files, a tokenizer that does not fit them, an empty split, a cache that cannot be written.
    """
    data = config.data
    weights = data.blend or {data.path: 1.0}
    shares = normalised(list(weights.values()))
    split = _split(data.split)
    tokenizer = _tokenizer(data, list(weights))
    notes: list[str] = []
    train, validation = [], []
    for prefix in weights:
        tokenizer, training_part, validation_part = _open(prefix, data, split, tokenizer, notes)
        train.append(training_part)
        validation.append(validation_part)
    assert tokenizer is not None
    if config.model.vocab is not None and config.model.vocab < tokenizer.vocab:
        raise UserError(
            f"model.vocab: {config.model.vocab} is smaller than the tokenizer's {tokenizer.vocab}; raise it or leave it null"
        )
    if data.validation:
        validation = [_whole(name, prefix) for name, prefix in data.validation.items()]
    return DataBundle(
        _training_set(config, train, shares, samples, tokenizer),
        [
            ValidationSet(
                part.name,
                part.dataset,
                part.begin,
                part.end,
                sequence_length=data.sequence_length,
                eod=tokenizer.eod,
                token_bytes=tokenizer.token_bytes,
                packing=data.packing,
            )
            for part in validation
            if part.end > part.begin
        ],
        tokenizer,
        tokenizer.token_bytes,
        notes,
        {"train": train, "validation": validation},
    )


def _training_set(
    config: Config, parts: list[Part], shares: list[float], samples: int, tokenizer: Tokenizer
) -> TrainingSet:
    data = config.data
    counts = [samples] if len(parts) == 1 else samples_wanted(samples, shares)
    sets = [
        GptSamples(
            part.dataset,
            part.begin,
            part.end,
            sequence_length=data.sequence_length,
            n_samples=count,
            seed=config.train.seed,
            vocab=tokenizer.vocab,
            packing=data.packing,
            cache=_cache(data, part.dataset.prefix),
        )
        for part, count in zip(parts, counts, strict=True)
    ]
    return sets[0] if len(sets) == 1 else BlendedSamples(sets, build_blend(shares, samples))


def _open(
    prefix: str, data: DataConfig, split: tuple[float, float], tokenizer: Tokenizer | None, notes: list[str]
) -> tuple[Tokenizer, Part, Part]:
    if prefix != EMBEDDED:
        assert tokenizer is not None
        dataset = IndexedDataset(prefix)
        cut, end = int(round(split[0] * len(dataset))), int(round((split[0] + split[1]) * len(dataset)))
        if data.validation:
            cut = end = len(dataset)
        name = Path(prefix).name
        notes.append(f"data: {prefix}, {len(dataset)} documents, {dataset.n_tokens} tokens")
        return tokenizer, Part(name, dataset, 0, cut), Part(name, dataset, cut, end)
    corpus = embedded_corpus(split[1], data.max_bytes)
    folder, tokenizer = _embedded(data, corpus, tokenizer)
    notes += corpus.notes
    parts = [_whole(EMBEDDED, str(folder / name)) for name in ("train", "validation")]
    return tokenizer, parts[0], parts[1]


def _embedded(data: DataConfig, corpus: Corpus, tokenizer: Tokenizer | None) -> tuple[Path, Tokenizer]:
    """The tokenized corpus's folder, and its tokenizer: the given one, or a BPE trained on the training part."""
    import tokenizers

    settings = [corpus.digest, data.split, data.max_bytes, tokenizers.__version__]
    settings.append(tokenizer.fingerprint if tokenizer else f"bpe {data.vocab}")
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]

    def build(folder: Path) -> None:
        chosen = tokenizer or train_bpe(corpus.train, data.vocab)
        chosen.save(folder / "tokenizer.json")
        for name, documents in (("train", corpus.train), ("validation", corpus.validation)):
            _write(documents, folder / name, chosen)

    folder = cached_folder(_cache(data, EMBEDDED) / f"embedded-{digest}", "data.cache", build)
    return folder, tokenizer or load_tokenizer(folder / "tokenizer.json")


def _write(documents: Iterable[str], prefix: Path, tokenizer: Tokenizer) -> None:
    end = np.array([tokenizer.eod], np.int32)
    with IndexedWriter(prefix, tokenizer.vocab, "data.cache") as writer:
        for tokens in tokenizer.encode_batch(list(documents)):
            writer.add(np.concatenate([tokens, end]))


def _whole(name: str, prefix: str) -> Part:
    dataset = IndexedDataset(prefix)
    return Part(name, dataset, 0, len(dataset))


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
            f"data.tokenizer: {beside[0]} does not exist; give the tokenizer.json that the dataset was built with"
        )
    return load_tokenizer(found)


def _cache(data: DataConfig, prefix: str) -> Path:
    if data.cache:
        return Path(data.cache).expanduser()
    if prefix == EMBEDDED or "/embedded-" in prefix:
        return Path.home() / ".cache" / "megalite"
    return Path(f"{prefix}.cache")


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
