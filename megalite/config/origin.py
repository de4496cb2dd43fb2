"""Where each value came from: the resolved configuration as YAML with its origin behind every key."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from megalite.config.build import build
from megalite.config.compose import compose
from megalite.config.schema import Config
from megalite.config.tree import leaves, value_at
from megalite.config.validate import derived, violations


def explained(
    words: Sequence[str], config_dir: Path | None, config_name: str, world_size: int | None
) -> tuple[str, list[str]]:
    """(commented YAML, violated rules). Raises UserError when the words compose to no configuration."""
    composition = compose(words, config_dir, config_name, trace=True)
    config = build(Config, composition.values)
    problems = violations(config, world_size)
    in_force = {} if problems else derived(config, world_size)
    return commented_yaml(config, origins(composition.layers), in_force), problems


def origins(layers: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, str]:
    """Key -> the last layer that sets it."""
    found = dict.fromkeys(leaves(Config), "schema default")
    for label, values in layers:
        for path in found:
            branch: Any = values
            for name in path.split("."):
                branch = branch.get(name, _Absent) if isinstance(branch, Mapping) else _Absent
            if branch is not _Absent:
                found[path] = label
    return found


class _Absent:
    """Marks a key that a layer does not set (null is a value)."""


def commented_yaml(config: Config, origin: Mapping[str, str], in_force: Mapping[str, Any]) -> str:
    lines: list[tuple[str, str]] = []
    open_branches: list[str] = []
    for path in leaves(Config):
        *outer, last = path.split(".")
        shared = next((n for n, (a, b) in enumerate(zip(outer, open_branches, strict=False)) if a != b), None)
        first_new = min(len(outer), len(open_branches)) if shared is None else shared
        lines += [("  " * depth + f"{outer[depth]}:", "") for depth in range(first_new, len(outer))]
        open_branches = outer
        comment = origin[path]
        if path in in_force:
            comment += f"; derived: {in_force[path]}"
        lines.append(("  " * len(outer) + f"{last}: {_inline(value_at(config, path))}", comment))
    width = min(48, max(len(text) for text, _ in lines))
    return "".join(f"{text:<{width}}  # {comment}\n" if comment else f"{text}\n" for text, comment in lines)


def _inline(value: Any) -> str:
    """A value as YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**9)
    return text.removesuffix("...\n").strip()
