"""Reading what a run left behind, forgivingly: a file may be absent, torn by a crash, or written by another version."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megalite.errors import UserError

Row = dict[str, Any]


@dataclass
class RunFolder:
    """The contents of runs/<name>; whatever is missing is empty."""

    path: Path
    name: str
    config_text: str = ""
    environment: Row = field(default_factory=dict)
    metrics: list[Row] = field(default_factory=list)
    events: list[Row] = field(default_factory=list)
    baselines: Row = field(default_factory=dict)
    sample: str = ""

    @property
    def facts(self) -> Row:
        facts = self.environment.get("facts")
        return facts if isinstance(facts, dict) else {}


def read_run(path: Path) -> RunFolder:
    """Everything the report needs. Raises UserError when `path` is no run folder."""
    if not path.is_dir():
        raise UserError(f"{path}: no such run folder; give the folder that holds metrics.jsonl, such as runs/default")
    if not (path / "metrics.jsonl").exists() and not (path / "config.yaml").exists():
        raise UserError(f"{path}: neither metrics.jsonl nor config.yaml is in it, so it is not a run folder")
    rows = [row for row in read_rows(path / "metrics.jsonl") if number(row, "step") is not None]
    return RunFolder(
        path,
        path.resolve().name,
        _text(path / "config.yaml"),
        parse_row(_text(path / "environment.json")) or {},
        sorted(rows, key=lambda row: row["step"]),
        read_rows(path / "events.jsonl"),
        parse_row(_text(path / "baselines.json")) or {},
        _text(path / "sample.txt"),
    )


def read_rows(path: Path) -> list[Row]:
    """The objects of a .jsonl file; a line that is not one (torn by a crash) is left out."""
    return [row for line in _text(path).split("\n") if (row := parse_row(line)) is not None]


def parse_row(text: str) -> Row | None:
    """A JSON object, or None for anything else."""
    try:
        row = json.loads(text)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def number(row: Row, name: str) -> float | None:
    """A number of the row that can be drawn (finite, below 1e100), else None."""
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e100:
        return None
    return value


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
