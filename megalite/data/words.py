"""Fast path of byte-level BPE: text cut into GPT-2's words, each distinct word encoded once and remembered.

BPE never looks beyond a word, so ids of a text are the ids of its words joined. The cut is a regular expression over
characters whose Unicode category is settled (the same in Unicode 3.2 and today); text around any other character is
left to the slow path, so both always agree.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np

_MOST_CHARACTERS = 1 << 26  # of remembered words; then they are forgotten
_SEGMENT = 2048  # characters around an unsettled one that take the slow path, at least
# Every known pre-tokenizer ends a word between a letter and the line break after it.
_BOUNDARY = re.compile(r"(?<=[A-Za-z])(?=\n)")
_EMOJI = "\U0001f300-\U0001f64f\U0001f680-\U0001f6ff\U0001f900-\U0001f9ff"  # no letter, number or space among them


class WordEncoder:
    """`encode` of a whole text from `encode_words`, which gives the ids of each of a list of texts."""

    def __init__(self, encode_words: Callable[[Sequence[str]], list[list[int]]]) -> None:
        self._encode_words = encode_words
        self._ids: dict[str, bytes] = {}
        self._characters = 0

    def encode(self, text: str) -> np.ndarray:
        """int32 ids of `text`."""
        words, unsettled = patterns()
        if unsettled.search(text) is None:
            return np.frombuffer(self._encode(words.findall(text)), np.int32)
        parts = []
        for segment in segments(text, _SEGMENT):
            settled = unsettled.search(segment) is None
            parts.append(self._encode(words.findall(segment)) if settled else self._slow([segment])[0])
        return np.frombuffer(b"".join(parts), np.int32)

    def _encode(self, words: list[str]) -> bytes:
        missing = list(set(words).difference(self._ids))
        if missing:
            if self._characters > _MOST_CHARACTERS:
                self._ids, self._characters, missing = {}, 0, list(set(words))
            self._ids.update(zip(missing, self._slow(missing), strict=True))
            self._characters += sum(map(len, missing))
        return b"".join(map(self._ids.__getitem__, words))

    def _slow(self, texts: list[str]) -> list[bytes]:
        return [np.array(ids, np.int32).tobytes() for ids in self._encode_words(texts)]


def segments(text: str, size: int) -> list[str]:
    """`text` cut where a word surely ends, into parts of at least `size` characters (the last may be shorter)."""
    parts, begin = [], 0
    while match := _BOUNDARY.search(text, begin + size):
        parts.append(text[begin : match.start()])
        begin = match.start()
    return [*parts, text[begin:]]


def applies(definition: dict) -> bool:
    """Whether a parsed tokenizer.json is plain byte-level BPE with GPT-2's words and nothing around it."""
    cut, model = definition.get("pre_tokenizer") or {}, definition.get("model") or {}
    return (
        definition.get("normalizer") is None
        and cut.get("type") == "ByteLevel"
        and cut.get("add_prefix_space") is False
        and cut.get("use_regex", True) is True
        and model.get("type") == "BPE"
        and not model.get("dropout")
        and all(token.get("special") for token in definition.get("added_tokens") or [])
    )


@cache
def patterns() -> tuple[re.Pattern[str], re.Pattern[str]]:
    """GPT-2's words, and a character that is not settled."""
    letters, numbers, spaces, others = list[str](), list[str](), list[str](), list[str]()
    for point in range(0x10000):
        character = chr(point)
        category = unicodedata.category(character)
        if category in ("Cn", "Co", "Cs", "Cf") or category != unicodedata.ucd_3_2_0.category(character):
            continue
        kinds = {"L": letters, "N": numbers, "Z": spaces}
        kind = spaces if character in "\t\n\v\f\r\x85" else kinds.get(category[0], others)
        kind.append(character)
    letter, number, space, other = map(_ranges, (letters, numbers, spaces, others))
    other += _EMOJI
    words = rf"'(?:[stmd]|re|ve|ll)| ?[{letter}]+| ?[{number}]+| ?[{other}]+|[{space}]+(?![^{space}])|[{space}]+"
    return re.compile(words), re.compile(f"[^{letter}{number}{space}{other}]")


def _ranges(characters: list[str]) -> str:
    """The inside of a character class."""
    parts, begin = [], 0
    for at in range(1, len(characters) + 1):
        if at == len(characters) or ord(characters[at]) != ord(characters[at - 1]) + 1:
            parts.append(f"{re.escape(characters[begin])}-{re.escape(characters[at - 1])}")
            begin = at
    return "".join(parts)
