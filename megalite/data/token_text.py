"""Which bytes of text a token of a tokenizer.json stands for: byte-level alphabets, SentencePiece, byte fall-back."""

import re
from functools import cache
from typing import Any

_FALLBACK_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# What tokenizers are known to change: control characters, runs of spaces, composed and decomposed letters, ligatures,
# full-width forms, their own space mark, joiners, text that begins with a space or spells a special token.
PROBE = (
    "".join(map(chr, range(256))),
    " a  b   c\t\td \n\n\r\n e ",
    "Word wORD don't 1234567 e\u0301 \u00e9 \ufb01 \uff21 \u2581 \u00a0\u200b\u200d\u3000 \ufeff",
    "\U0001f468\u200d\U0001f469 \u6f22\u5b57 \u0639\u0631\u0628",
    "<|endoftext|></s>[UNK]",
)


@cache
def byte_characters() -> tuple[str, ...]:
    """GPT-2's alphabet: the printable character that stands for each of the 256 byte values."""
    plain = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    shifted = iter(range(256, 512))
    return tuple(chr(byte) if byte in plain else chr(next(shifted)) for byte in range(256))


def token_texts(definition: dict[str, Any], ids: dict[str, int], special: set[int]) -> list[bytes]:
    """Bytes of every id in [0, max id], empty for `special` ones and for ids without a token.

    `definition` is a parsed tokenizer.json and `ids` its whole vocabulary {token: id}.
    """
    added = {token["id"] for token in definition.get("added_tokens") or []}
    byte_level = "ByteLevel" in _types(definition.get("decoder"))
    values = {character: byte for byte, character in enumerate(byte_characters())}
    texts = [b""] * (max(ids.values()) + 1)
    for token, i in ids.items():
        if i in special:
            continue
        if i in added:
            texts[i] = token.encode()
        elif byte_level and all(character in values for character in token):
            texts[i] = bytes(values[character] for character in token)
        elif match := _FALLBACK_BYTE.fullmatch(token):
            texts[i] = bytes([int(match[1], 16)])
        else:
            texts[i] = token.replace("\u2581", " ").encode()
    return texts


def _types(component: dict[str, Any] | None) -> set[str]:
    """Type names in a decoder or normaliser, through sequences."""
    if not component:
        return set()
    parts = [part for field in ("decoders", "normalizers", "pretokenizers") for part in component.get(field) or []]
    return {component.get("type", "")}.union(*(_types(part) for part in parts))
