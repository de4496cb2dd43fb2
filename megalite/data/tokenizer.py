"""Text to token ids and back, byte for byte: BPE (trained here or any tokenizer.json) and raw bytes.

Hugging Face `tokenizers` does the BPE; it is imported where used. Special tokens spelled out in a text are read as
plain text, so no document can forge an end-of-document.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megalite.data.token_text import PROBE, byte_characters, token_texts
from megalite.data.words import WordEncoder, applies
from megalite.errors import UserError

END_OF_DOCUMENT = "<|endoftext|>"
_KNOWN_ENDS = (
    END_OF_DOCUMENT,
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "<｜end▁of▁sentence｜>",
    "[EOS]",
    "<|im_end|>",
)
_LARGEST_VOCABULARY = 1 << 24


class Tokenizer(ABC):
    """Ids in [0, vocab); `eod` ends a document and stands for no text."""

    vocab: int
    eod: int
    end: str  # how `eod` is spelled
    texts: list[bytes]  # UTF-8 bytes each id stands for; empty for special tokens

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One integer array of ids a text, without special tokens."""

    @abstractmethod
    def to_json(self) -> str:
        """The tokenizer as the content of a Hugging Face tokenizer.json."""

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0].tolist()

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join([self.texts[i] for i in ids])

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; bytes that are no valid UTF-8 (a character cut in two) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """int64 [vocab]: UTF-8 bytes of each id, 0 for end-of-document."""
        return np.array([len(text) for text in self.texts], dtype=np.int64)

    @cached_property
    def byte_exact(self) -> bool:
        """Whether decode_bytes(encode(text)) is the text, tried on a probe of what tokenizers usually change."""
        return all(self.decode_bytes(self.encode(text)) == text.encode() for text in PROBE)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything that decides how text becomes ids."""
        return hashlib.sha256(f"{self.to_json()}\0{self.eod}".encode()).hexdigest()[:32]

    @cached_property
    def vocabulary(self) -> str:
        """Hash of what each id stands for: two tokenizers that agree on it read each other's ids."""
        content = b"".join(len(text).to_bytes(4, "little") + text for text in self.texts)
        return hashlib.sha256(content + self.eod.to_bytes(4, "little")).hexdigest()[:32]

    def files(self) -> dict[str, str]:
        """Contents of the files that keep it: `load_tokenizer` and Hugging Face's AutoTokenizer read them."""
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self.end}
        return {"tokenizer.json": self.to_json(), "tokenizer_config.json": json.dumps(config, indent=1) + "\n"}

    def save(self, path: str | Path) -> None:
        """Write `path`, which ends in tokenizer.json, and the tokenizer_config.json beside it."""
        path = Path(path)
        assert path.name.endswith("tokenizer.json")
        for name, content in self.files().items():
            path.with_name(path.name.replace("tokenizer.json", name)).write_text(content, encoding="utf-8")


class ByteTokenizer(Tokenizer):
    """Every byte is its own id; 256 ends a document."""

    vocab, eod, end = 257, 256, END_OF_DOCUMENT

    def __init__(self) -> None:
        self.texts = [bytes([i]) for i in range(256)] + [b""]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]

    def to_json(self) -> str:
        from tokenizers import AddedToken

        tokenizer = _byte_level({character: byte for byte, character in enumerate(byte_characters())})
        tokenizer.add_special_tokens([AddedToken(END_OF_DOCUMENT, special=True, normalized=False)])
        return str(tokenizer.to_str())


class JsonTokenizer(Tokenizer):
    """Any Hugging Face tokenizer.json. `end` names the end-of-document token; None: the first known name it has."""

    def __init__(self, content: str, end: str | None = None, origin: str = "tokenizer.json") -> None:
        from tokenizers import Tokenizer as HuggingFaceTokenizer

        try:
            self._tokenizer = HuggingFaceTokenizer.from_str(content)
        except Exception as error:  # the library raises plain Exception
            raise UserError(
                f"{origin}: not a Hugging Face tokenizer.json ({error}); export one with save_pretrained"
            ) from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        self.end = end or next((name for name in _KNOWN_ENDS if name in ids), "")
        if self.end not in ids:
            raise UserError(
                f"{origin}: no end-of-document token ({self.end or 'none of ' + ' '.join(_KNOWN_ENDS)});"
                " name it as eos_token in a tokenizer_config.json beside the file"
            )
        if max(ids.values()) >= _LARGEST_VOCABULARY:
            raise UserError(f"{origin}: token id {max(ids.values())} is no sensible vocabulary; repair the file")
        self.eod, self.vocab = ids[self.end], max(ids.values()) + 1
        special = {i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}
        definition = json.loads(content)
        self.texts = token_texts(definition, ids, special | {self.eod})
        self._words = WordEncoder(self._encode_whole) if applies(definition) else None

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        if self._words:
            return [self._words.encode(text) for text in texts]
        return [np.array(ids, dtype=np.int32) for ids in self._encode_whole(texts)]

    def _encode_whole(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def to_json(self) -> str:
        return str(self._tokenizer.to_str())


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """`bytes`, or the path of a tokenizer.json (or of the folder that holds one).

    A tokenizer_config.json beside the file may name the end-of-document token as `eos_token`.
    Raises UserError when the file is missing, is no tokenizer, or has no token to end a document with.
    """
    if str(spec) == "bytes":
        return ByteTokenizer()
    path = Path(spec).expanduser()
    if path.is_dir():
        path = path / "tokenizer.json"
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise UserError(
            f"data.tokenizer: cannot read {path} ({reason}); give 'bytes' or the path of a tokenizer.json"
        ) from error
    return JsonTokenizer(content, _configured_end(path), str(path))


def train_bpe(texts: Iterable[str], vocab: int) -> JsonTokenizer:
    """A byte-level BPE of at most `vocab` ids, end-of-document being id 0; the same texts give the same tokenizer."""
    from tokenizers import trainers

    tokenizer = _byte_level({})
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=sorted(byte_characters()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return JsonTokenizer(tokenizer.to_str(), END_OF_DOCUMENT)


def _byte_level(vocab: dict[str, int]) -> Any:
    from tokenizers import Tokenizer as HuggingFaceTokenizer
    from tokenizers import decoders, models, pre_tokenizers

    tokenizer = HuggingFaceTokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _configured_end(tokenizer: Path) -> str | None:
    path = tokenizer.with_name(tokenizer.name.replace("tokenizer.json", "tokenizer_config.json"))
    if path == tokenizer or not path.is_file():
        return None
    try:
        end = json.loads(path.read_text(encoding="utf-8")).get("eos_token")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path}: not a JSON object ({error}); repair or remove it") from error
    name = end.get("content") if isinstance(end, dict) else end
    return name if isinstance(name, str) else None
