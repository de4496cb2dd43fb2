"""A verb's own few options: a small dataclass of documented keys, filled from `key=value` words."""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

from megalite.config.build import convert
from megalite.config.tree import Leaf, leaves, nearest, value_at
from megalite.errors import UserError

T = TypeVar("T")


class HelpRequested(Exception):
    """`--help` was among the words; str() is the text to print. The command line prints it and exits with 0."""


def required(help: str, *, choices: tuple[Any, ...] = ()) -> Any:
    """A documented field without a default (its dataclass needs `kw_only=True` or it comes first)."""
    return dataclasses.field(metadata={"help": help, "choices": choices, "minimum": None})


def parse_options(cls: type[T], arguments: Sequence[str], usage: str, positional: Sequence[str] = ()) -> T:
    """`cls` from `key=value` words, `group.key=value` for a dataclass inside; words without '=' fill the `positional`
    keys in their order.

    Values are taken literally (no quoting rules); lists are separated by commas. All mistakes are reported at once.
    Raises UserError, or HelpRequested on -h and --help.
    """
    table = leaves(cls)
    if any(word in ("-h", "--help") for word in arguments):
        raise HelpRequested(describe(table, usage))
    problems: list[str] = []
    values: dict[str, Any] = {}
    waiting = list(positional)
    for word in arguments:
        name, equals, text = word.partition("=")
        if name == "log.traceback":  # of every verb; `megalite.cli.main` reads it
            continue
        if not equals and waiting:
            name, text = waiting.pop(0), word
        elif not equals:
            problems.append(f"{word}: expects key=value; keys are {', '.join(table)}")
            continue
        if name not in table:
            problems.append(f"{name}: unknown key; nearest: {', '.join(nearest(name, table))}")
        elif name in values:
            problems.append(f"{name}: given twice; keep one")
        else:
            try:
                values[name] = _value(table[name], text)
            except ValueError as error:
                problems.append(str(error))
    missing = [leaf for leaf in table.values() if leaf.required and leaf.path not in values]
    problems += [f"{leaf.path}: is needed ({leaf.help})" for leaf in missing]
    if problems:
        raise UserError(*problems)
    made = cls(**{name: value for name, value in values.items() if "." not in name})
    for name, value in values.items():
        owner, dot, last = name.rpartition(".")
        if dot:
            setattr(value_at(made, owner), last, value)
    return made


def _value(leaf: Leaf, text: str) -> Any:
    raw: Any = text
    if leaf.kind is list:
        raw = [part for part in text.split(",") if part]
    elif leaf.optional and text in ("null", "none"):
        raw = None
    value = convert(leaf, raw)
    if value is not None:
        for part in value if leaf.kind is list else [value]:
            if leaf.choices and part not in leaf.choices:
                near = ", ".join(map(str, leaf.choices))
                raise ValueError(f"{leaf.path}={part}: not a choice; legal: {near}")
            if leaf.minimum is not None and part < leaf.minimum:
                raise ValueError(f"{leaf.path}={part}: at least {leaf.minimum:g}")
    return value


def describe(table: dict[str, Leaf], usage: str) -> str:
    """The help text: usage, then a line a key."""
    width = max((len(path) for path in table), default=0)
    lines = [usage.rstrip(), "", "Options (key=value):"]
    for leaf in table.values():
        default = "needed" if leaf.required else "default " + ("null" if leaf.default is None else str(leaf.default))
        choices = f" [{'|'.join(map(str, leaf.choices))}]" if leaf.choices else ""
        lines.append(f"  {leaf.path:<{width}}  {leaf.help}{choices} ({default})")
    return "\n".join(lines)
