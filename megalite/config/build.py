"""Plain values (from YAML or the command line) into typed dataclasses. Every wrong key and type is reported at once."""

import dataclasses
import math
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from megalite.config.tree import Leaf, leaves, nearest
from megalite.errors import UserError

T = TypeVar("T")


def build(schema: type[T], values: Mapping[str, Any]) -> T:
    """An instance of `schema` from a nested mapping; keys left out take their default. Raises UserError."""
    problems: list[str] = []
    tree = _build(schema, schema, values, "", problems)
    if problems:
        raise UserError(*problems)
    return typing.cast(T, tree)


def unknown_key(schema: Any, path: str) -> str:
    """The error line for a key that `schema` does not have."""
    return f"{path}: unknown key; nearest: {', '.join(nearest(path, leaves(schema)))}"


def _build(root: type, schema: Any, values: Any, prefix: str, problems: list[str]) -> Any:
    if not isinstance(values, Mapping):
        problems.append(f"{prefix.rstrip('.') or 'configuration'}={values}: holds keys of its own and takes no value")
        return schema()
    hints = typing.get_type_hints(schema)
    known = {entry.name: entry for entry in dataclasses.fields(schema)}
    made: dict[str, Any] = {}
    for name, value in values.items():
        path = f"{prefix}{name}"
        if name not in known:
            problems.append(unknown_key(root, path))
        elif dataclasses.is_dataclass(hints[name]):
            made[name] = _build(root, hints[name], value, f"{path}.", problems)
        else:
            leaf = leaves(root)[path]
            try:
                made[name] = convert(leaf, value)
            except ValueError as error:
                problems.append(str(error))
    return schema(**made)


def convert(leaf: Leaf, value: Any) -> Any:
    """`value` as the leaf's type. Raises ValueError with a line that names key, value and type."""
    if value is None:
        if leaf.optional:
            return None
        raise ValueError(f"{leaf.path}=null: expects {leaf.type_name}")
    if isinstance(value, bool) and str(value).lower() in leaf.choices:  # a choice that YAML reads as a truth value
        return str(value).lower()
    result = _convert(leaf.kind, leaf.item, value)
    if result is None:
        raise ValueError(f"{leaf.path}={value}: expects {leaf.type_name}")
    return result


def _convert(kind: type, item: type | None, value: Any) -> Any:
    """None when the value does not fit."""
    if kind is dict:
        if not isinstance(value, Mapping):
            return None
        if item is Any:  # who reads it has types for its entries
            return {str(name): entry for name, entry in value.items()}
        made = {str(name): _convert(item or str, None, entry) for name, entry in value.items()}
        return None if None in made.values() else made
    if kind is list:
        if not isinstance(value, (list, tuple)):
            return None
        listed = [_convert(item or str, None, entry) for entry in value]
        return None if None in listed else listed
    if kind is bool:
        words = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
        return value if isinstance(value, bool) else words.get(value.lower()) if isinstance(value, str) else None
    if isinstance(value, (bool, Mapping, list, tuple)):
        return None
    if kind in (str, Path):
        return kind(value) if not isinstance(value, float) else kind(repr(value))
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    if kind is int:
        return _whole(value, number)
    return None if math.isnan(number) else number


def _whole(value: Any, number: float) -> int | None:
    """Accepts 1e6 and 1_000_000 as well as 1000000, but no fraction."""
    if isinstance(value, int):
        return value
    try:
        return int(value) if isinstance(value, str) else int(number) if number.is_integer() else None
    except (ValueError, OverflowError):
        return int(number) if number.is_integer() else None
