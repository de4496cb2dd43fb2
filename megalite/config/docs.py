"""docs/config.md from the schema: `python -m megalite.config.docs` writes it, a test holds it current."""

import sys
from pathlib import Path

from megalite.config.schema import Config
from megalite.config.tree import Leaf, leaves

TARGET = Path(__file__).parents[2] / "docs" / "config.md"
HEAD = """\
# Configuration keys

Made from `megalite/config/schema.py` by `make docs`; edit there. Set a key with `key=value` behind `megalite train`;
`megalite config` shows all values of a job and where each came from. Groups (`model=`, `data=`, `optim=`, `precision=`,
`recompute=`, `experiment=`) choose a file of `configs/`, which sets several keys at once; single keys win over groups.
"""


def document() -> str:
    """The whole page."""
    sections: dict[str, list[Leaf]] = {}
    for path, leaf in leaves(Config).items():
        sections.setdefault(path.rsplit(".", 1)[0], []).append(leaf)
    return "\n".join([HEAD, *(_section(name, keys) for name, keys in sections.items())])


def _section(name: str, keys: list[Leaf]) -> str:
    rows = [f"## {name}", "", "| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for leaf in keys:
        cells = (f"`{leaf.path}`", _kind(leaf), f"`{_shown(leaf.default)}`", leaf.help)
        rows.append("| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |")
    return "\n".join([*rows, ""])


def _kind(leaf: Leaf) -> str:
    if leaf.choices:
        return ", ".join(f"`{choice}`" for choice in leaf.choices)
    limit = f", at least {leaf.minimum:g}" if leaf.minimum is not None else ""
    return leaf.type_name.removeprefix("a ") + limit


def _shown(value: object) -> str:
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(value)


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else TARGET
    target.write_text(document(), encoding="utf-8")
