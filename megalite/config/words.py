"""Override words made strict: unknown or repeated keys and unknown choices are errors that name the nearest known."""

import itertools
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException

from megalite.config.build import unknown_key
from megalite.config.schema import Config
from megalite.config.tree import Leaf, branches, leaves, nearest
from megalite.errors import UserError

PACKAGE = "megalite.configs"
GROUPS = ("model", "data", "optim", "precision", "recompute", "experiment")
"""Hydra groups in the order in which they are laid over each other."""
WORD = re.compile(r"(?P<sign>\+\+|\+|~)?(?P<key>[^=]*?)(?P<value>=.*)?", re.DOTALL)


def checked(words: Sequence[str], config_dir: Path | None) -> list[str]:
    """The words as Hydra is to see them. Raises UserError with every mistake found in them."""
    problems: list[str] = []
    accepted: dict[str, str] = {}
    for word in words:
        try:
            key, hydra_word = _check(word, config_dir)
        except UserError as error:
            problems += error.lines
            continue
        if key in accepted:
            problems.append(f"{key}: given twice; keep one")
        accepted[key] = hydra_word
    if problems:
        raise UserError(*problems)
    return list(accepted.values())


def expand(words: Sequence[str], config_dir: Path | None = None) -> list[list[str]]:
    """The jobs of `--multirun`: every combination of the listed values (`optim.lr=1e-3,3e-4 train.seed=1,2`)."""
    axes: list[list[str]] = []
    for word in words:
        key, override = word.partition("=")[0], _parse(word)
        value: Any = override.value()
        if isinstance(value, Glob):
            axes.append([f"{key}={name}" for name in value.filter(choices(key, config_dir))])
        elif override.is_sweep_override():
            axes.append([f"{key}={text}" for text in override.sweep_string_iterator()])
        else:
            axes.append([word])
    return [list(job) for job in itertools.product(*axes)]


def choices(group: str, config_dir: Path | None) -> list[str]:
    """Names of the group's files: the engine's, and those of the user's folder."""
    shipped = resources.files(PACKAGE) / group
    names = {entry.name for entry in shipped.iterdir()} if shipped.is_dir() else set()
    if config_dir is not None and (config_dir / group).is_dir():
        names |= {entry.name for entry in (config_dir / group).iterdir()}
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def keys_set(words: Sequence[str]) -> dict[str, Any]:
    """The keys (not groups) that good words set, as a nested mapping."""
    tree: dict[str, Any] = {}
    for key in map(_key, words):
        if key not in GROUPS:
            *outer, last = (_entry_of(key) or key).split(".")
            branch = tree
            for name in outer:
                branch = branch.setdefault(name, {})
            branch[last] = True
    return tree


def quoted(text: str) -> str:
    """`text` as a quoted string of Hydra's grammar."""
    escaped = re.sub(r'(\\*)("|$)', lambda m: m[1] * 2 + ('\\"' if m[2] else ""), text)
    return f'"{escaped}"'


def _key(word: str) -> str:
    match = WORD.fullmatch(word)
    assert match is not None
    return match["key"].partition("@")[0].strip()


def _entry_of(key: str) -> str | None:
    """The dictionary-valued key of which `key` is one entry: data.blend for data.blend.wiki."""
    known = leaves(Config).items()
    return next((path for path, leaf in known if leaf.kind is dict and key.startswith(f"{path}.")), None)


def _check(word: str, config_dir: Path | None) -> tuple[str, str]:
    """(key, word for Hydra). Signs are dropped: a known key needs none, an unknown one is an error behind them too."""
    match = WORD.fullmatch(word)
    assert match is not None
    sign, key, value = match["sign"] or "", _key(word), match["value"]
    if key in GROUPS:
        if value is None or sign == "~":
            raise UserError(f"{word}: expects {key}=CHOICE; choices: {', '.join(choices(key, config_dir))}")
        _check_choice(key, value[1:].strip("'\""), config_dir)
        return key, f"{key}{value}"
    leaf, entry_of = leaves(Config).get(key), _entry_of(key)
    if leaf is None and entry_of is None:
        raise UserError(_unknown(word, key, has_value=value is not None))
    if sign == "~":
        if leaf is None:
            return key, word
        default = "null" if leaf.default is None else leaf.default
        raise UserError(f"{word}: a key cannot be removed; set {key}={default} for its default")
    if value is None:
        raise UserError(f"{word}: expects {key}=VALUE")
    if leaf is None or leaf.kind is dict:
        _parse(f"{key}{value}")
        return key, f"++{key}{value}"
    return key, _for_hydra(leaf, value[1:])


def _unknown(word: str, key: str, has_value: bool) -> str:
    if key in branches(Config):
        example = next(path for path in leaves(Config) if path.startswith(f"{key}."))
        return f"{word}: {key} holds keys of its own; set one of them, such as {example}=VALUE"
    if has_value or "." in key:
        return unknown_key(Config, key)
    near = nearest(word.lstrip("-"), [*leaves(Config), *GROUPS])
    return f"{word}: expects key=value; nearest keys: {', '.join(near)}"


def _for_hydra(leaf: Leaf, text: str) -> str:
    """Text for a text key is taken as it stands, without Hydra's syntax, unless quoted, null or an interpolation."""
    is_quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    if leaf.kind is str and not is_quoted and "${" not in text and not (leaf.optional and text.lower() == "null"):
        return f"{leaf.path}={quoted(text)}"
    if _parse(f"{leaf.path}={text}").is_sweep_override():
        raise UserError(f"{leaf.path}={text}: several values make several jobs; add --multirun, or give one")
    return f"{leaf.path}={text}"


def _parse(word: str) -> Override:
    try:
        return OverridesParser.create().parse_override(word)
    except HydraException as error:
        key, what = word.partition("=")[0], str(error).splitlines()[0]
        raise UserError(f"{word}: cannot be read ({what}); check quotes and brackets after {key}=") from None


def _check_choice(group: str, choice: str, config_dir: Path | None) -> None:
    known = choices(group, config_dir)
    if choice == "null":
        return
    if choice not in known:
        if "," in choice:
            raise UserError(f"{group}={choice}: several choices make several jobs; add --multirun, or give one")
        near = ", ".join(nearest(choice, known))
        raise UserError(f"{group}={choice}: no such choice; nearest: {near}; all: {', '.join(known)}")
    mine = None if config_dir is None else config_dir / group / f"{choice}.yaml"
    if mine is not None and mine.exists() and (resources.files(PACKAGE) / group / f"{choice}.yaml").is_file():
        raise UserError(f"{mine}: the engine has its own {group}={choice}; give yours another name")
