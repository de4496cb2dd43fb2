"""The schema as a flat table of dotted keys, and the search for the nearest known word. Reads dataclasses only."""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any


@dataclass(frozen=True)
class Leaf:
    """One key of a schema: `kind` is its type without None, `optional` says whether null is legal."""

    path: str
    kind: type
    optional: bool
    default: Any
    help: str
    choices: tuple[Any, ...]
    minimum: float | None
    item: type | None = None  # of a dict's values or a list's entries

    @property
    def required(self) -> bool:
        return self.default is dataclasses.MISSING

    @property
    def type_name(self) -> str:
        names: dict[Any, str] = {
            int: "a whole number", float: "a number", bool: "true or false", str: "text", Any: "its value"
        }  # fmt: skip
        name = names.get(self.kind, self.kind.__name__)
        if self.kind in (dict, list):
            item = names.get(self.item, "text")
            name = f"a mapping {{name: {item}}}" if self.kind is dict else f"a list of entries, each {item}"
        return f"{name} or null" if self.optional else name


def leaves(schema: Any, prefix: str = "") -> dict[str, Leaf]:
    """Every key below the dataclass `schema`, in definition order."""
    return _leaves(schema, prefix)


@cache
def _leaves(schema: Any, prefix: str) -> dict[str, Leaf]:
    found: dict[str, Leaf] = {}
    hints = typing.get_type_hints(schema)
    for entry in dataclasses.fields(schema):
        path = f"{prefix}{entry.name}"
        if dataclasses.is_dataclass(hints[entry.name]):
            found |= _leaves(hints[entry.name], f"{path}.")
        else:
            found[path] = _leaf(path, hints[entry.name], entry)
    return found


def _leaf(path: str, hint: Any, entry: "dataclasses.Field[Any]") -> Leaf:
    optional = typing.get_origin(hint) in (types.UnionType, typing.Union)
    if optional:
        (hint,) = (part for part in typing.get_args(hint) if part is not type(None))
    kind = typing.get_origin(hint) or hint
    item = typing.get_args(hint)[-1] if kind in (dict, list) else None
    default = entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()
    meta = entry.metadata
    return Leaf(path, kind, optional, default, meta.get("help", ""), meta.get("choices", ()), meta.get("minimum"), item)


def branches(schema: Any) -> set[str]:
    """Every dotted path that is not a key but holds keys: 'train', 'model', 'model.rope', ..."""
    parts = (path.split(".") for path in leaves(schema))
    return {".".join(words[:n]) for words in parts for n in range(1, len(words))}


def value_at(tree: Any, path: str) -> Any:
    """The value of a dotted key in a dataclass tree."""
    for name in path.split("."):
        tree = getattr(tree, name)
    return tree


def outside(leaf: Leaf, value: Any) -> str | None:
    """The line that says how `value` breaks the key's own limits, if it does."""
    if value is None:
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return f"{leaf.path}={value}: not a finite number"
    if leaf.choices and value not in leaf.choices:
        near = f"; nearest: {nearest(value, leaf.choices, 1)[0]}" if isinstance(value, str) else ""
        return f"{leaf.path}={value}: not a choice{near}; legal: {', '.join(map(str, leaf.choices))}"
    if leaf.minimum is not None and value < leaf.minimum:
        return f"{leaf.path}={value}: too small; at least {leaf.minimum:g}"
    return None


def nearest(word: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The known words that look most like `word`, best first: by the whole path and by the last segment."""
    last = word.rsplit(".", 1)[-1]

    def likeness(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, word.lower(), candidate.lower()).ratio()
        tail = difflib.SequenceMatcher(None, last.lower(), candidate.rsplit(".", 1)[-1].lower()).ratio()
        return max(whole, tail) + 0.1 * min(whole, tail)

    ranked = sorted(known, key=likeness, reverse=True)
    return ranked[:count]
