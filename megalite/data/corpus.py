"""The corpus that every machine already has: the standard library's Python sources (several MB, PSF licence).

The same Python gives the same documents in the same order. Nothing is cleaned; what is left out is counted and said.
"""

import hashlib
import os
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megalite.errors import UserError

LICENCE = "Python Software Foundation License 2 (PSF-2.0)"
_EXCLUDED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "lib-dynload"}
_EXCLUDED_PREFIXES = ("_sysconfigdata", "config-")  # this machine's build settings, not library source
_LARGEST_SHARE = 0.1  # of the validation part that one file may fill, so that no single file decides the score


@dataclass(frozen=True)
class Corpus:
    """Documents of both parts, in order, and what a reader should know about them."""

    train: list[str]
    validation: list[str]
    notes: list[str]  # for people: sizes, licence, everything that was left out
    digest: str  # of every document and its part


def embedded_corpus(validation_share: float = 0.05, max_bytes: int = 0, folder: Path | None = None) -> Corpus:
    """The sources under `folder` (default: this Python's library), split by file into training and validation.

    Files are in order of their relative paths. Which ones are validation depends on a hash of their content, so copies
    of one file stay together: in the order of the hashes files are taken until they fill `validation_share` of the
    bytes. `max_bytes` cuts the training part (0: all of it).
    """
    folder = folder or Path(sysconfig.get_path("stdlib"))
    documents, undecodable, empty = list[str](), list[str](), 0
    for name in _source_files(folder):
        content = (folder / name).read_bytes()
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            undecodable.append(name)
            continue
        if text:
            documents.append(text)
        else:
            empty += 1
    if not documents:
        raise UserError(f"data.path: no Python sources in {folder}; give data.path=PREFIX of a built dataset instead")
    held_out = _held_out(documents, validation_share)
    train = [text for text in documents if text not in held_out]
    validation = [text for text in documents if text in held_out]
    if max_bytes:
        train = _first_bytes(train, max_bytes)
    left_out = f"corpus: left out {empty} empty files and {len(undecodable)} that are not UTF-8"
    if undecodable:
        left_out += f" ({', '.join(undecodable)})"
    notes = [
        f"corpus: Python standard library sources, {LICENCE}",
        f"corpus: {_described(train)} to train, {_described(validation)} to validate",
        f"{left_out}; tests and installed packages are no part of it",
    ]
    return Corpus(train, validation, notes, _digest(train, validation))


def _source_files(folder: Path) -> list[str]:
    names = []
    for root, folders, files in os.walk(folder):
        folders[:] = [f for f in folders if f not in _EXCLUDED_FOLDERS and not f.startswith(_EXCLUDED_PREFIXES)]
        names += [
            (Path(root) / file).relative_to(folder).as_posix()
            for file in files
            if file.endswith(".py") and not file.startswith(_EXCLUDED_PREFIXES)
        ]
    return sorted(names)


def _held_out(texts: Iterable[str], share: float) -> set[str]:
    hashes = {hashlib.sha256(text.encode()).digest(): text for text in texts}
    sizes = {text: len(text.encode()) for text in hashes.values()}
    wanted, taken, filled = share * sum(sizes.values()), set[str](), 0
    for _, text in sorted(hashes.items()):
        if filled >= wanted:
            break
        if sizes[text] <= max(wanted * _LARGEST_SHARE, 4096):
            taken.add(text)
            filled += sizes[text]
    return taken


def _first_bytes(documents: list[str], limit: int) -> list[str]:
    kept = []
    for text in documents:
        content = text.encode()[:limit]
        kept.append(content.decode("utf-8", errors="ignore"))  # only a character cut in two at the limit is dropped
        limit -= len(content)
        if limit <= 0:
            break
    return [text for text in kept if text]


def _digest(*parts: list[str]) -> str:
    digest = hashlib.sha256()
    for number, part in enumerate(parts):
        for text in part:
            content = text.encode()
            digest.update(f"{number} {len(content)} ".encode())
            digest.update(content)
    return digest.hexdigest()


def _described(documents: list[str]) -> str:
    return f"{len(documents)} files of {sum(len(text.encode()) for text in documents) / 1e6:.1f} MB"
