"""From the configuration to everything the trainer reads: training set, validation sets, tokenizer."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from megalite.config.schema import Config
from megalite.data.batch import TrainingSet
from megalite.data.blend import cached_blend, normalised, samples_wanted
from megalite.data.parts import Opened, Part, open_parts
from megalite.data.tokenizer import Tokenizer
from megalite.data.training import BlendedSamples, GptSamples
from megalite.data.validation import ValidationSet
from megalite.errors import UserError

_LARGEST_TEXT = 1 << 28  # tokens that raw_bytes puts into memory as text


@dataclass
class DataBundle:
    """What `prepare_data` made. token_bytes: int64 [vocab] UTF-8 bytes of each id, 0 for end-of-document.

    `notes`: lines for the run's header, what is read and what was left out.
    """

    train: TrainingSet
    validation: list[ValidationSet]
    tokenizer: Tokenizer
    token_bytes: np.ndarray
    notes: list[str]
    parts: dict[str, list[Part]]

    def raw_bytes(self, split: Literal["train", "validation"]) -> bytes:
        """The text behind all training sets, or behind the first validation set, whose loss a run reports.

        Decoded from the tokens, documents end to end in the order of the files.
        Raises UserError when the tokenizer changes text or the text is too big for memory.
        """
        if not self.tokenizer.byte_exact:
            raise UserError("data.tokenizer: it changes text, so the text cannot be recovered; set log.baselines=false")
        chosen = self.parts["train"] if split == "train" else self.parts["validation"][:1]
        parts = [part.tokens() for part in chosen]
        size = sum(map(len, parts))
        if size > _LARGEST_TEXT:
            raise UserError(f"log.baselines: {size} tokens are too many to hold as text; set log.baselines=false")
        return b"".join(self.tokenizer.decode_bytes(tokens.tolist()) for tokens in parts)


def prepare_data(config: Config, samples: int) -> DataBundle:
    """Everything for `samples` training samples, from caches where they exist, else built into them.

    Safe on several processes at once: one builds, the others wait for it. Raises UserError for missing or damaged
    files, a tokenizer that does not fit them, an empty split, a cache that cannot be written.
    """
    opened = open_parts(config.data)
    tokenizer = opened.tokenizer
    validation = [
        ValidationSet(
            part.name,
            part.dataset,
            part.begin,
            part.end,
            sequence_length=config.data.sequence_length,
            eod=tokenizer.eod,
            token_bytes=tokenizer.token_bytes,
            documents=config.data.packing == "documents",
        )
        for part in opened.validation
    ]
    parts = {"train": opened.train, "validation": opened.validation}
    train = _training_set(config, opened, samples)
    return DataBundle(train, validation, tokenizer, tokenizer.token_bytes, opened.notes, parts)


def _training_set(config: Config, opened: Opened, samples: int) -> TrainingSet:
    shares = normalised(list(config.data.blend.values()) or [1.0])
    counts = [samples] if len(shares) == 1 else samples_wanted(samples, shares)
    sets = [
        GptSamples(
            part.dataset,
            part.begin,
            part.end,
            sequence_length=config.data.sequence_length,
            n_samples=count,
            seed=config.train.seed,
            vocab=opened.tokenizer.vocab,
            documents=config.data.packing == "documents",
            cache=part.cache,
        )
        for part, count in zip(opened.train, counts, strict=True)
    ]
    return sets[0] if len(sets) == 1 else BlendedSamples(sets, cached_blend(shares, samples, opened.train[0].cache))
